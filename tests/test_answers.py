"""Real answers over the real wires: the whole of Tapeline asks a model server that others wrote, and every reader,
the snapshot and the log agree on what came of it.

Each test runs over OpenAI's wire and over Anthropic's, but where the stand-in has the fault on one only.
"""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any, Final, NamedTuple

import pytest
from tapeline import limits

from tests.client import Client, Received, as_received, log_of, types
from tests.model_server import Fixture, ModelServer, refuses
from tests.model_server import answers as _answers
from tests.stack import Stack, free_port

USAGE: Final = {"input_tokens": 11, "output_tokens": 7}  # of every request
ENDED_S: Final = 40.0

Events = list[dict[str, Any]]


class Wire(NamedTuple):
    """One provider, and the environment in which every run asks it."""

    model: str
    continues: str
    """A model of it that is said to go on from its own words."""
    nobody: str
    """A model whose server is not there."""
    environ: dict[str, str]


class Told(NamedTuple):
    """A run, as its reader was told of it and as the snapshot has it; both agree with the log."""

    conversation: str
    events: Events
    snapshot: dict[str, Any]

    @property
    def run(self) -> dict[str, Any]:
        run: dict[str, Any] = self.snapshot["runs"][-1]
        return run

    @property
    def end(self) -> dict[str, Any]:
        return self.events[-1]

    def of(self, kind: str, **fields: Any) -> Events:
        """The events of a type that have these values."""
        return [one for one in self.events if one["type"] == kind and fields.items() <= one.items()]

    def text(self, kind: str = "token", **fields: Any) -> str:
        """What these deltas add up to."""
        return "".join(one["text"] for one in self.of(kind, **fields))


@pytest.fixture(scope="module")
def server() -> Iterator[ModelServer]:
    with ModelServer() as server:
        yield server


@pytest.fixture(scope="module", params=["openai", "anthropic"])
def wire(request: pytest.FixtureRequest, server: ModelServer) -> Wire:
    nowhere = f"http://127.0.0.1:{free_port()}"
    if request.param == "openai":
        environ = {"OPENAI_BASE_URL": f"{server.url}/v1", "ANTHROPIC_BASE_URL": nowhere}
        models = ("openai:gpt-5-mini", "openai:goes-on", "anthropic:claude-sonnet-5-5")
    else:
        environ = {"ANTHROPIC_BASE_URL": server.url, "OPENAI_BASE_URL": nowhere}
        models = ("anthropic:claude-sonnet-5-5", "anthropic:goes-on", "openai:gpt-5-mini")
    keys = {"OPENAI_API_KEY": "test", "ANTHROPIC_API_KEY": "test"}
    settings = {"TAPELINE_MODEL": models[0], "TAPELINE_CONTINUES": "*:goes-on"}
    return Wire(*models, {**settings, **environ, **keys})


@pytest.fixture(scope="module")
def asking(tmp_path_factory: pytest.TempPathFactory, wire: Wire) -> Iterator[Stack]:
    """The whole of Tapeline, asking the stand-in."""
    stack = Stack(tmp_path_factory.mktemp("stack"), wire.environ)
    try:
        yield stack.start()
    finally:
        stack.stop()


@pytest.fixture
async def client(asking: Stack) -> AsyncIterator[Client]:
    async with Client(asking.url) as client:
        yield client


_numbers = itertools.count(1)


@pytest.fixture
def said() -> str:
    """What the user says: different in every test, so that one server's answers do not meet."""
    return f"message number {next(_numbers)}."


def answers(said: str, text: str = "", **more: Any) -> Fixture:
    """As the stand-in's own, each request being counted as `USAGE`."""
    return _answers(said, text, usage=USAGE, **more)


def nth(number: int, fixture: Fixture) -> Fixture:
    """The fixture for the request of this number only, from 0."""
    return {**fixture, "match": {**fixture["match"], "sequenceIndex": number}}


async def told(asking: Stack, client: Client, said: str, **message: Any) -> Told:
    """Says it in a new conversation, and reads the run to its end."""
    conversation = await client.create()
    run = (await client.post(conversation, said, **message)).run
    async with asyncio.timeout(ENDED_S):
        received: list[Received] = await client.run(conversation, run)
    log = await log_of(asking.nats.url, conversation)
    assert received == as_received(log, run)
    assert [kind for kind in types(received) if kind in ("done", "error")] == [received[-1].event]
    snapshot = await client.snapshot(conversation)
    assert snapshot["last_event_id"] == log[-1].seq
    return Told(conversation, [json.loads(one.data) for one in received], snapshot)


def assert_done(told: Told, text: str, reason: str = "stop") -> None:
    """It is done, and its newest answer says so everywhere: in its tokens, its `answer`, the snapshot."""
    end, answer = told.end, told.of("answer")[-1]
    assert (end["type"], end["reason"]) == ("done", reason), end
    assert told.text(step=answer["step"], attempt=answer["attempt"]) == text
    assert answer["text"] == text
    assert told.run["steps"][-1]["text"] == text
    assert (told.run["status"], told.run["reason"]) == ("done", reason)
    assert end["usage"] == {name: count * len(told.of("answer")) for name, count in USAGE.items()}
    assert 0 <= end["first_token_ms"] <= end["duration_ms"] < ENDED_S * 1000
    assert end["facts"] == sum(
        one["type"] not in ("token", "thinking", "tool_input", "tool_progress") for one in told.events
    )


def assert_failed(told: Told, code: str, partial: str = "") -> None:
    """It failed, and what there was of an answer is kept: in the `answer` event and in the snapshot."""
    end = told.end
    assert (end["type"], end["code"]) == ("error", code), end
    assert told.run["status"] == "error"
    assert told.run["error"]["code"] == code
    answer = told.of("answer")[-1]
    assert answer["finish"] == "error"
    assert answer.get("text", "") == told.run["steps"][-1]["text"] == partial


def asked(server: ModelServer, said: str) -> list[dict[str, Any]]:
    """The requests about this message, as the stand-in has noted them."""
    return [entry for entry in server.journal() if said in json.dumps(entry["body"]["messages"])]


def results(server: ModelServer, said: str) -> list[str]:
    """What the model was told of its calls, by the newest request about this message."""
    return [one["content"] for one in asked(server, said)[-1]["body"]["messages"] if one["role"] == "tool"]


# Answers


async def test_text_arrives_as_the_model_said_it(asking: Stack, client: Client, server: ModelServer, said: str) -> None:
    text = "Ein schöner Tag 😀,\nzwei Zeilen\r\nund mehr.\n\n" + "Wort für Wort. " * 20
    server.add(answers(said, text, chunk_chars=7, delay_ms=10))
    it = await told(asking, client, said)
    assert_done(it, text)
    assert len(it.of("token")) > 3, "in chunks, not in one lump"
    assert [one["role"] for one in it.snapshot["messages"]] == ["user", "assistant"]
    assert [one["content"] for one in it.snapshot["messages"]] == [said, text]


async def test_reasoning_is_kept_apart_from_the_answer(
    asking: Stack, client: Client, server: ModelServer, said: str
) -> None:
    server.add(answers(said, "It is 42.", thinking="Let me think about that."))
    it = await told(asking, client, said)
    assert_done(it, "It is 42.")
    assert it.text("thinking") == "Let me think about that."
    assert it.of("answer")[-1]["thinking"] == it.run["steps"][-1]["thinking"] == "Let me think about that."
    kinds = [one["type"] for one in it.events]
    assert max(n for n, kind in enumerate(kinds) if kind == "thinking") < kinds.index("token")


async def test_the_model_hears_what_was_said_before(
    asking: Stack, client: Client, server: ModelServer, said: str
) -> None:
    server.add(answers(f"first {said}", "Nice to meet you."), answers(f"second {said}", "You are Ada."))
    first = await told(asking, client, f"first {said}")
    run = (await client.post(first.conversation, f"second {said}")).run
    received = await client.run(first.conversation, run)
    assert received == as_received(await log_of(asking.nats.url, first.conversation), run)
    heard = asked(server, f"second {said}")[-1]["body"]["messages"]
    assert [one["content"] for one in heard] == [f"first {said}", "Nice to meet you.", f"second {said}"]


# Calls


async def test_one_call_and_its_result_reaches_the_model(
    asking: Stack, client: Client, server: ModelServer, said: str
) -> None:
    server.add(
        answers(said, "It is 1764.", result="1764"),
        answers(said, "I calculate.", calls=[("calculate", {"expression": "42 * 42"})], after_results=False),
    )
    it = await told(asking, client, said)
    assert_done(it, "It is 1764.")
    assert json.loads(it.text("tool_input")) == {"expression": "42 * 42"}
    [call], [result] = it.of("tool_call"), it.of("tool_result")
    assert (call["tool"], call["arguments"]) == ("calculate", {"expression": "42 * 42"})
    assert (result["call"], result["outcome"], result["content"]) == (call["call"], "ok", 1764)
    assert "is_error" not in result
    assert results(server, said) == ["1764"]
    assert [step["text"] for step in it.run["steps"]] == ["I calculate.", "It is 1764."]
    assert it.run["steps"][0]["calls"][0]["content"] == 1764


async def test_three_parallel_calls_and_one_next_step(
    asking: Stack, client: Client, server: ModelServer, said: str
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = [
        ("calculate", {"expression": "6 * 7"}),
        ("search_notes", {"query": "fence", "seconds": 0.3}),
        ("fail", {"message": "out of order"}),
    ]
    server.add(answers(said, "All three.", after_results=True), answers(said, "Looking.", calls=calls))
    it = await told(asking, client, said)
    assert_done(it, "All three.")
    assert [(one["tool"], one["arguments"]) for one in it.of("tool_call")] == calls
    by_tool = {one["tool"]: one for one in it.of("tool_result")}
    assert len(it.of("tool_result")) == 3
    assert by_tool["calculate"]["content"] == 42
    assert "The fence" in json.dumps(by_tool["search_notes"]["content"])
    assert (by_tool["fail"]["is_error"], by_tool["fail"]["message"]) == (True, "out of order")
    assert len(it.of("step")) == 2, "three results start one next step"
    for heard, result in zip(results(server, said), ("42", "The fence", "out of order"), strict=True):
        assert result in heard, "in the order of the calls"
    assert len(asked(server, said)) == 2


async def test_two_steps_of_calls_one_after_the_other(
    asking: Stack, client: Client, server: ModelServer, said: str
) -> None:
    server.add(
        answers(said, "It is 1764.", result="1764"),
        answers(said, "Then.", calls=[("calculate", {"expression": "42 * 42"})], result="42"),
        answers(said, "First.", calls=[("calculate", {"expression": "6 * 7"})], after_results=False),
    )
    it = await told(asking, client, said)
    assert_done(it, "It is 1764.")
    assert [one["step"] for one in it.of("answer")] == [1, 2, 3]
    assert [one["text"] for one in it.of("answer")] == ["First.", "Then.", "It is 1764."]
    assert [one["content"] for one in it.of("tool_result")] == [42, 1764]
    assert results(server, said) == ["42", "1764"]


async def test_a_tool_that_nobody_offers_is_an_error_the_model_can_react_to(
    asking: Stack, client: Client, server: ModelServer, said: str
) -> None:
    server.add(answers(said, "My mistake.", after_results=True), answers(said, calls=[("fly_to_the_moon", {})]))
    it = await told(asking, client, said)
    assert_done(it, "My mistake.")
    [result] = it.of("tool_result")
    assert (result["is_error"], result["outcome"]) == (True, "error")
    [heard] = results(server, said)
    assert "fly_to_the_moon" in heard
    assert "search_notes" in heard, "it says which tools there are"


async def test_bad_arguments_are_an_error_the_model_can_react_to(
    asking: Stack, client: Client, server: ModelServer, said: str
) -> None:
    server.add(answers(said, "Sorry.", after_results=True), answers(said, calls=[("calculate", {"expression": 7})]))
    it = await told(asking, client, said)
    assert_done(it, "Sorry.")
    [result] = it.of("tool_result")
    assert (result["is_error"], result["outcome"]) == (True, "error")
    assert "expression" in results(server, said)[0]


async def test_a_loop_of_calls_without_end_is_ended(
    asking: Stack, client: Client, server: ModelServer, said: str
) -> None:
    server.add(answers(said, "Again.", calls=[("calculate", {"expression": "1 + 1"})]))
    it = await told(asking, client, said)
    assert_done(it, "Again.", "max_steps")
    assert len(it.of("step")) == len(it.of("answer")) == limits.STEPS_MAX
    assert len(it.of("tool_call")) == limits.STEPS_MAX - 1, "the last step's calls are not carried out"
    assert len(asked(server, said)) == limits.STEPS_MAX


# Faults before anything is visible


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_a_passing_refusal_is_not_seen_by_the_reader(
    asking: Stack, client: Client, server: ModelServer, said: str, status: int
) -> None:
    server.add(nth(0, refuses(said, status, "not now")), nth(1, answers(said, "Here I am.")))
    it = await told(asking, client, said)
    assert_done(it, "Here I am.")
    assert [one["attempt"] for one in it.of("step")] == [1]
    assert len(asked(server, said)) == 2


async def test_retry_after_is_waited_for(asking: Stack, client: Client, server: ModelServer, said: str) -> None:
    wait_s = 2
    assert wait_s > limits.PROVIDER_RETRY_S[0]
    server.add(nth(0, refuses(said, 429, "slow down", retry_after_s=wait_s)), nth(1, answers(said, "Here I am.")))
    it = await told(asking, client, said)
    assert_done(it, "Here I am.")
    first, second = asked(server, said)
    assert wait_s * 1000 <= second["timestamp"] - first["timestamp"]


async def test_refusals_that_do_not_pass_end_the_run_with_their_reason(
    asking: Stack, client: Client, wire: Wire, server: ModelServer, said: str
) -> None:
    """At the same time, for each takes all the back-off there is: 429, 500, and a server that is not there."""
    server.add(refuses(f"limited {said}", 429, "slow down"), refuses(f"broken {said}", 500, "oh no"))
    limited, broken, refused = await asyncio.gather(
        told(asking, client, f"limited {said}"),
        told(asking, client, f"broken {said}"),
        told(asking, client, said, model=wire.nobody),
    )
    tries = len(limits.PROVIDER_RETRY_S) + 1
    assert_failed(limited, "provider_rate_limited")
    assert len(asked(server, f"limited {said}")) == tries
    assert_failed(broken, "provider_unavailable")
    assert "oh no" in broken.end["message"]
    assert len(asked(server, f"broken {said}")) == tries
    assert_failed(refused, "provider_unavailable")
    assert "cannot be reached" in refused.end["message"]
    for one in (limited, broken, refused):
        assert one.end["retryable"] is True
        assert [step["attempt"] for step in one.of("step")] == [1]
        assert one.of("token") == []


async def test_refused_credentials_end_the_run_at_once(
    asking: Stack, client: Client, server: ModelServer, said: str
) -> None:
    server.add(refuses(said, 401, "who are you?"))
    it = await told(asking, client, said)
    assert_failed(it, "provider_auth")
    assert "who are you?" in it.end["message"]
    assert it.end.get("retryable", False) is False
    assert len(asked(server, said)) == 1


async def test_after_a_failed_run_the_conversation_goes_on(
    asking: Stack, client: Client, server: ModelServer, said: str
) -> None:
    # In this order: Anthropic's wire makes one message of two that have no answer between them.
    server.add(answers(f"second {said}", "Now I can."), refuses(f"first {said}", 401, "who are you?"))
    failed = await told(asking, client, f"first {said}")
    assert_failed(failed, "provider_auth")
    run = (await client.post(failed.conversation, f"second {said}")).run
    received = await client.run(failed.conversation, run)
    assert received == as_received(await log_of(asking.nats.url, failed.conversation), run)
    snapshot = await client.snapshot(failed.conversation)
    assert_done(Told(failed.conversation, [json.loads(one.data) for one in received], snapshot), "Now I can.")


# Faults in the middle of an answer

CUT: Final = "one two three four five six seven eight"


async def test_a_cut_is_mended_by_a_fresh_attempt_that_says_what_it_supersedes(
    asking: Stack, client: Client, server: ModelServer, said: str
) -> None:
    cut = answers(said, CUT, chunk_chars=4, delay_ms=20, cut_after_chunks=8)
    server.add(nth(0, cut), nth(1, answers(said, "Nine and ten.")))
    it = await told(asking, client, said)
    assert_done(it, "Nine and ten.")
    first, second = it.of("step")
    assert (first["attempt"], second["attempt"], second["resume"]) == (1, 2, "restart")
    partial = it.text(attempt=1)
    assert partial
    assert CUT.startswith(partial), "what came before the cut stays on the tape"
    log = await log_of(asking.nats.url, it.conversation)
    superseded = second["supersedes"]
    assert superseded["attempt"] == 1
    covered = [record for record in log if superseded["first"] <= record.seq <= superseded["last"]]
    left = [record for record in as_received(covered) if record.event == "token"]
    assert "".join(json.loads(one.data)["text"] for one in left) == partial
    assert [step["text"] for step in it.run["steps"]] == ["Nine and ten."], "the snapshot shows one answer"


async def test_a_model_that_goes_on_from_its_own_words_is_asked_to_after_a_cut(
    asking: Stack, client: Client, wire: Wire, server: ModelServer, said: str
) -> None:
    cut = answers(said, CUT, chunk_chars=4, delay_ms=20, cut_after_chunks=8)
    server.add(nth(0, cut), nth(1, answers(said, " and so on.")))
    it = await told(asking, client, said, model=wire.continues)
    claim = it.of("step")[1]
    kept = it.text(attempt=1).rstrip()
    assert kept
    assert (claim["attempt"], claim["resume"], claim["text"]) == (2, "continue", kept)
    prompt = asked(server, said)[-1]["body"]["messages"]
    assert [(one["role"], one["content"]) for one in prompt] == [("user", said), ("assistant", kept)]
    assert it.text(attempt=2) == " and so on."
    assert it.of("answer")[-1]["text"] == it.run["steps"][-1]["text"] == f"{kept} and so on."
    assert (it.end["type"], it.end["reason"]) == ("done", "stop")


async def test_cuts_without_end_are_an_error_and_the_partial_is_kept(
    asking: Stack, client: Client, server: ModelServer, said: str
) -> None:
    server.add(answers(said, CUT, chunk_chars=4, delay_ms=20, cut_after_chunks=8))
    it = await told(asking, client, said)
    partial = it.text(attempt=limits.STEP_ATTEMPTS_MAX)
    assert partial
    assert CUT.startswith(partial)
    assert_failed(it, "provider_cut", partial)
    assert [one["attempt"] for one in it.of("step")] == [*range(1, limits.STEP_ATTEMPTS_MAX + 1)]
    assert it.end["retryable"] is True


async def test_a_clean_end_that_comes_too_early_is_never_an_answer(
    asking: Stack, client: Client, wire: Wire, server: ModelServer, said: str
) -> None:
    if wire.model.startswith("anthropic"):
        pytest.skip("the stand-in always finishes on this wire; test_provider sends it in bytes")
    server.add(answers(said, "This is not all", finishReason=""))
    it = await told(asking, client, said)
    assert_failed(it, "provider_cut", "This is not all")
    assert it.of("done") == []


async def test_an_answer_the_provider_cuts_for_length_is_done_and_says_so(
    asking: Stack, client: Client, server: ModelServer, said: str
) -> None:
    server.add(answers(said, "Once upon a", finishReason="length"))
    assert_done(await told(asking, client, said), "Once upon a", "length")
