"""The provider adapter on the real wires: aimock speaks them, and raw bytes where aimock cannot make the fault."""

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from tapeline import limits
from tapeline.settings import ConfigError

from services.inference import demo
from services.inference.model import Models
from services.inference.part import CallInput, Finish, Part, ProviderError, Text, Thinking
from services.inference.prompt import AnswerTurn, Call, Prompt, ResultTurn, ToolSpec, Turn, UserTurn
from tests.model_server import STREAM_HEAD, ModelServer, RawServer, answers, refuses, sse

OPENAI, RESPONSES, ANTHROPIC = "openai:gpt-5-mini", "openai-responses:gpt-5-mini", "anthropic:claude-sonnet-5-5"
STALL_S = 0.3
WAIT_S = 20.0
CLOSED_S = WAIT_S / 2  # long before a provider that says nothing would be given up
LOADED_S_MAX = 50.0

CLOCK = ToolSpec("clock", "The time", {"type": "object", "properties": {"timezone": {"type": "string"}}})
CALCULATE = ToolSpec(
    "calculate",
    "Arithmetic",
    {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
)
SEARCH = ToolSpec(
    "search_notes",
    "Search",
    {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
)
FAIL = ToolSpec(
    "fail", "Fails", {"type": "object", "properties": {"message": {"type": "string"}}, "required": ["message"]}
)
TOOLS = [CLOCK, CALCULATE, SEARCH, FAIL]


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    """As a service does at start: the time limits here are not for loading."""
    for name in (OPENAI, RESPONSES, ANTHROPIC):
        models = Models(name, {"OPENAI_API_KEY": "k", "ANTHROPIC_API_KEY": "k"})
        models.check()
        asyncio.run(models.aclose())


@pytest.fixture(scope="module")
def server() -> Iterator[ModelServer]:
    broken = answers("broken arguments", calls=[("clock", '{"timezone": "Mars')])
    with ModelServer(broken) as server:
        yield server


@pytest.fixture
async def models(server: ModelServer) -> AsyncIterator[Models]:
    models = Models(OPENAI, server.environ)
    yield models
    await models.aclose()


@pytest.fixture(params=[OPENAI, RESPONSES, ANTHROPIC])
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def said(request: pytest.FixtureRequest) -> str:
    """What the user says: different in every test, so that one server's answers do not meet."""
    return f"this is {request.node.name}"


def prompt(model: str, *turns: Turn | str, tools: list[ToolSpec] | None = None) -> Prompt:
    return Prompt(
        "You are a test.", [UserTurn(turn) if isinstance(turn, str) else turn for turn in turns], tools or [], model
    )


async def heard(models: Models, prompt: Prompt) -> list[Part]:
    async with asyncio.timeout(WAIT_S), aclosing(models.stream(prompt)) as parts:
        return [part async for part in parts]


async def failed(models: Models, prompt: Prompt) -> tuple[list[Part], ProviderError]:
    parts: list[Part] = []
    async with asyncio.timeout(WAIT_S):
        try:
            async for part in models.stream(prompt):
                parts.append(part)  # noqa: PERF401 (what came before the error counts)
        except ProviderError as error:
            return parts, error
    raise AssertionError(f"no error, but {parts}")


def text(parts: list[Part], kind: type[Text] | type[Thinking] = Text) -> str:
    return "".join(part.text for part in parts if isinstance(part, kind))


def finish(parts: list[Part]) -> Finish:
    assert isinstance(parts[-1], Finish)
    assert not any(isinstance(part, Finish) for part in parts[:-1])
    return parts[-1]


def written(parts: list[Part], index: int) -> str:
    """The arguments of a call as its fragments have them."""
    return "".join(part.text for part in parts if isinstance(part, CallInput) and part.index == index)


# Answers


async def test_text_comes_in_the_provider_s_own_chunks(
    server: ModelServer, models: Models, model: str, said: str
) -> None:
    whole = "Ein schöner Tag 😀 und viel mehr."
    server.add(answers(said, whole, chunk_chars=5))
    parts = await heard(models, prompt(model, said))
    assert text(parts) == whole
    assert len(parts) == -(-len(whole.encode("utf-16-le")) // 2 // 5) + 1
    assert finish(parts).reason == "stop"
    assert finish(parts).calls == []


async def test_reasoning_comes_before_the_text_and_apart_from_it(
    server: ModelServer, models: Models, model: str, said: str
) -> None:
    server.add(answers(said, "It is 42.", thinking="Let me think about that."))
    parts = await heard(models, prompt(model, said))
    assert text(parts, Thinking) == "Let me think about that."
    assert text(parts) == "It is 42."
    kinds = [type(part) for part in parts]
    assert kinds == sorted(kinds, key=[Thinking, Text, Finish].index)


async def test_one_call(server: ModelServer, models: Models, model: str, said: str) -> None:
    server.add(answers(said, calls=[("clock", {"timezone": "Europe/Paris"})]))
    parts = await heard(models, prompt(model, said, tools=TOOLS))
    assert finish(parts).reason == "tool_calls"
    [call] = finish(parts).calls
    assert (call.tool, call.arguments) == ("clock", {"timezone": "Europe/Paris"})
    fragments = [part for part in parts if isinstance(part, CallInput)]
    assert len(fragments) > 2
    assert {(part.index, part.id, part.tool) for part in fragments} == {(0, call.id, "clock")}
    assert json.loads(written(parts, 0)) == call.arguments


async def test_three_parallel_calls_keep_their_order(
    server: ModelServer, models: Models, model: str, said: str
) -> None:
    asked = [("clock", {}), ("calculate", {"expression": "6 * 7"}), ("search_notes", {"query": "überall"})]
    server.add(answers(said, "I will look.", calls=asked))
    parts = await heard(models, prompt(model, said, tools=TOOLS))
    calls = finish(parts).calls
    assert [(call.tool, call.arguments) for call in calls] == asked
    assert len({call.id for call in calls}) == 3
    assert text(parts) == "I will look."
    for index, (_, arguments) in enumerate(asked):
        assert json.loads(written(parts, index)) == arguments


async def test_two_sequential_steps(server: ModelServer, models: Models, model: str, said: str) -> None:
    server.add(
        answers(said, "It is 1764.", result="1764"),
        answers(said, calls=[("calculate", {"expression": "42 * 42"})], result="42"),
        answers(said, "First.", calls=[("calculate", {"expression": "6 * 7"})], after_results=False),
    )
    turns: list[Turn | str] = [said]
    for result in ("42", "1764"):
        parts = await heard(models, prompt(model, *turns, tools=TOOLS))
        [call] = finish(parts).calls
        turns += [AnswerTurn(text(parts), calls=[call]), ResultTurn(call.id, call.tool, result)]
    parts = await heard(models, prompt(model, *turns, tools=TOOLS))
    assert text(parts) == "It is 1764."
    assert finish(parts).reason == "stop"


async def test_arguments_that_are_no_json_are_kept_raw_and_can_be_sent_back(
    server: ModelServer, models: Models, said: str
) -> None:
    said = f"broken arguments, {said}"
    parts = await heard(models, prompt(OPENAI, said, tools=TOOLS))
    [call] = finish(parts).calls
    assert call.arguments == written(parts, 0) == '{"timezone": "Mars'
    server.add(answers("and again", "Sorry."))
    for model in (OPENAI, RESPONSES, ANTHROPIC):
        turns: list[Turn | str] = [
            said,
            AnswerTurn("", calls=[call]),
            ResultTurn(call.id, call.tool, "bad", is_error=True),
            "and again",
        ]
        assert text(await heard(models, prompt(model, *turns, tools=TOOLS))) == "Sorry."
        assistant = next(m for m in server.journal()[-1]["body"]["messages"] if m["role"] == "assistant")
        [sent] = assistant["tool_calls"]
        assert json.loads(sent["function"]["arguments"]) == {"not_a_json_object": call.arguments}


async def test_arguments_that_are_json_but_no_object_are_kept_raw(
    server: ModelServer, models: Models, said: str
) -> None:
    server.add(answers(said, calls=[("clock", "[1, 2]")]))
    [call] = finish(await heard(models, prompt(OPENAI, said, tools=TOOLS))).calls
    assert call.arguments == "[1, 2]"


async def test_arguments_too_deep_for_a_reader_of_the_tape_are_kept_raw(
    server: ModelServer, models: Models, said: str
) -> None:
    for levels, kind in ((limits.JSON_DEPTH_MAX, dict), (limits.JSON_DEPTH_MAX + 1, str), (900, str), (5_000, str)):
        deep = '{"a":' * levels + "1" + "}" * levels
        server.add(answers(f"{said}: {levels} levels", calls=[("clock", deep)]))
        [call] = finish(await heard(models, prompt(OPENAI, f"{said}: {levels} levels", tools=TOOLS))).calls
        assert type(call.arguments) is kind
        assert call.arguments in (deep, msgspec.json.decode(deep) if kind is dict else None)


async def test_a_huge_chunk_passes_whole(server: ModelServer, models: Models, model: str, said: str) -> None:
    whole = "0123456789" * 200_000
    server.add(answers(said, whole, chunk_chars=len(whole)))
    parts = await heard(models, prompt(model, said))
    assert [part.text for part in parts if isinstance(part, Text)] == [whole]


async def test_usage_is_reported(server: ModelServer, models: Models, said: str) -> None:
    server.add(answers(said, "Hi.", usage={"prompt_tokens": 11, "completion_tokens": 7}))
    parts = await heard(models, prompt(OPENAI, said))
    assert finish(parts).usage == {"input_tokens": 11, "output_tokens": 7}


@pytest.mark.parametrize("model", [OPENAI, ANTHROPIC])
async def test_an_answer_cut_by_the_token_limit_says_so(
    server: ModelServer, models: Models, model: str, said: str
) -> None:
    server.add(answers(said, "Once upon a", finishReason="length"))
    assert finish(await heard(models, prompt(model, said))).reason == "length"


async def test_a_prompt_a_stopped_run_left_behind_is_still_accepted(
    server: ModelServer, models: Models, model: str, said: str
) -> None:
    """A call without a result, results in another order and late, an empty answer, a tool's name made up."""
    server.add(answers(said, "Fine."))
    calls = [Call("run-1-0", "clock", {}), Call("run-1-1", "what is this?", {}), Call("run-1-2", "calculate", {})]
    turns: list[Turn | str] = [
        "earlier",
        AnswerTurn("", calls=calls),
        AnswerTurn(""),
        "stop",
        ResultTurn("run-1-2", "calculate", "42"),
        ResultTurn("run-1-0", "clock", "noon"),
        said,
    ]
    assert text(await heard(models, prompt(model, *turns, tools=TOOLS))) == "Fine."
    messages = server.journal()[-1]["body"]["messages"]
    results = [message for message in messages if message["role"] == "tool"]
    assert [message["tool_call_id"] for message in results] == [call.id for call in calls]
    if model == OPENAI:  # of the other wires aimock keeps its own rendering
        order = [message["role"] for message in messages]
        assert order == ["system", "user", "assistant", "tool", "tool", "tool", "user", "user"]
    assert [("noon" in m["content"], "no result" in m["content"], "42" in m["content"]) for m in results] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]
    assert "what_is_this_" in json.dumps([m.get("tool_calls") for m in messages])


# Faults that aimock makes


@pytest.mark.parametrize(
    ("status", "code", "retryable"),
    [
        (400, "provider_rejected", False),
        (401, "provider_auth", False),
        (403, "provider_auth", False),
        (404, "provider_rejected", False),
        (408, "provider_unavailable", True),
        (413, "provider_rejected", False),
        (429, "provider_rate_limited", True),
        (500, "provider_unavailable", True),
        (503, "provider_unavailable", True),
        (529, "provider_unavailable", True),
    ],
)
async def test_a_refusal_by_status(
    server: ModelServer, models: Models, model: str, said: str, status: int, code: str, retryable: bool
) -> None:
    server.add(refuses(said, status, f"no, {said}"))
    before = len(server.journal())
    parts, error = await failed(models, prompt(model, said))
    assert (parts, error.code, error.retryable) == ([], code, retryable)
    assert said in error.message
    assert str(status) in error.message
    assert len(server.journal()) == before + 1, "only the engine tries again"


async def test_retry_after_is_passed_on(server: ModelServer, models: Models, model: str, said: str) -> None:
    server.add(refuses(said, 429, "slow down", retry_after_s=7))
    _, error = await failed(models, prompt(model, said))
    assert (error.code, error.retry_after_s) == ("provider_rate_limited", 7.0)


async def test_an_error_never_quotes_a_key(server: ModelServer, models: Models, model: str, said: str) -> None:
    keys = [value for name, value in server.environ.items() if name.endswith("_KEY")]
    server.add(refuses(said, 401, f"bad keys {keys}"))
    _, error = await failed(models, prompt(model, said))
    assert not any(key in error.message for key in keys)
    assert "***" in error.message


async def test_a_cut_keeps_what_came_before_it(server: ModelServer, models: Models, model: str, said: str) -> None:
    server.add(answers(said, "one two three four five six seven eight", chunk_chars=4, delay_ms=10, cut_after_chunks=8))
    parts, error = await failed(models, prompt(model, said))
    assert (error.code, error.retryable) == ("provider_cut", True)
    assert text(parts).startswith("one")
    assert "eight" not in text(parts)


async def test_a_clean_end_without_a_finish_reason_is_no_answer(server: ModelServer, models: Models, said: str) -> None:
    server.add(answers(said, "one two three", finishReason=""))
    parts, error = await failed(models, prompt(OPENAI, said))
    assert (text(parts), error.code) == ("one two three", "provider_cut")


async def test_silence_between_chunks_is_a_timeout(server: ModelServer, model: str, said: str) -> None:
    server.add(answers(said, "one two three", delay_ms=60_000))
    models = Models(OPENAI, {**server.environ, "TAPELINE_PROVIDER_STALL_S": str(STALL_S)})
    _, error = await failed(models, prompt(model, said))
    assert (error.code, error.retryable) == ("provider_timeout", True)
    await models.aclose()


async def test_connection_refused() -> None:
    models = Models(OPENAI, {"OPENAI_BASE_URL": "http://127.0.0.1:9/v1"})
    parts, error = await failed(models, prompt(OPENAI, "hi"))
    assert (parts, error.code, error.retryable) == ([], "provider_unavailable", True)
    await models.aclose()


# Faults in bytes


@dataclass(frozen=True)
class Wire:
    """How a provider's stream looks, recorded from aimock: what opens it, one text chunk, and what ends it."""

    model: str
    opening: list[dict[str, Any]]
    chunk: Callable[[str], dict[str, Any]]
    end: list[dict[str, Any] | str]
    error: dict[str, Any]

    def stream(self, *texts: str) -> bytes:
        return STREAM_HEAD + sse(*self.opening, *map(self.chunk, texts))


def chat_chunk(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}


def response_event(kind: str, **more: Any) -> dict[str, Any]:
    return {"type": f"response.{kind}", **more}


RESPONSE = {"id": "r", "object": "response", "created_at": 1, "model": "m", "status": "in_progress", "output": []}
MESSAGE: dict[str, Any] = {
    "id": "m",
    "type": "message",
    "role": "assistant",
    "content": [],
    "model": "m",
    "stop_reason": None,
}
WIRES = [
    Wire(
        OPENAI,
        [chat_chunk({"role": "assistant", "content": ""})],
        lambda text: chat_chunk({"content": text}),
        [chat_chunk({}, "stop"), "[DONE]"],
        {"error": {"message": "overloaded", "type": "server_error", "code": "server_error"}},
    ),
    Wire(
        RESPONSES,
        [response_event("created", response=RESPONSE)],
        lambda text: response_event("output_text.delta", item_id="i", output_index=0, content_index=0, delta=text),
        [response_event("completed", response={**RESPONSE, "status": "completed"})],
        response_event(
            "failed",
            response={**RESPONSE, "status": "failed", "error": {"code": "server_error", "message": "overloaded"}},
        ),
    ),
    Wire(
        ANTHROPIC,
        [
            {"type": "message_start", "message": {**MESSAGE, "usage": {"input_tokens": 0, "output_tokens": 0}}},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        ],
        lambda text: {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}},
        [
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 1}},
            {"type": "message_stop"},
        ],
        {"type": "error", "error": {"type": "overloaded_error", "message": "overloaded"}},
    ),
]
CHAT = WIRES[0]


@pytest.fixture(params=WIRES, ids=lambda wire: str(wire.model.partition(":")[0]))
def wire(request: pytest.FixtureRequest) -> Wire:
    param: Wire = request.param
    return param


def at(server: RawServer, stall_s: float = WAIT_S) -> Models:
    urls = {"OPENAI_BASE_URL": server.url, "ANTHROPIC_BASE_URL": server.url}
    return Models(OPENAI, {**urls, "ANTHROPIC_API_KEY": "none", "TAPELINE_PROVIDER_STALL_S": str(stall_s)})


def sends(*blocks: bytes) -> Callable[[RawServer, asyncio.StreamWriter], Any]:
    async def handler(_: RawServer, writer: asyncio.StreamWriter) -> None:
        for block in blocks:
            writer.write(block)
        await writer.drain()

    return handler


@pytest.mark.parametrize("sent", [0, 1, 2])
async def test_an_early_clean_end_is_a_cut_wherever_it_comes(wire: Wire, sent: int) -> None:
    whole = [STREAM_HEAD, sse(*wire.opening), sse(wire.chunk("Hello"))]
    async with RawServer(sends(*whole[: sent + 1])) as server:
        models = at(server)
        parts, error = await failed(models, prompt(wire.model, "hi"))
        await models.aclose()
    assert (error.code, error.retryable) == ("provider_cut", True)
    assert text(parts) == ("Hello" if sent == 2 else "")


async def test_a_malformed_chunk(wire: Wire) -> None:
    broken = sse(wire.chunk("never")).replace(b"}", b"", 1)
    async with RawServer(sends(wire.stream("Hello"), broken, sse(*wire.end))) as server:
        models = at(server)
        parts, error = await failed(models, prompt(wire.model, "hi"))
        await models.aclose()
    assert (text(parts), error.code, error.retryable) == ("Hello", "provider_malformed", True)


async def test_a_chunk_of_the_wrong_shape() -> None:
    wrong = {**chat_chunk({}), "choices": [{"delta": {"tool_calls": [7]}}]}
    async with RawServer(sends(CHAT.stream("Hello"), sse(wrong, *CHAT.end))) as server:
        models = at(server)
        parts, error = await failed(models, prompt(OPENAI, "hi"))
        await models.aclose()
    assert (text(parts), error.code) == ("Hello", "provider_malformed")


async def test_an_error_inside_the_stream(wire: Wire) -> None:
    async with RawServer(sends(wire.stream("Hello"), sse(wire.error))) as server:
        models = at(server)
        parts, error = await failed(models, prompt(wire.model, "hi"))
        await models.aclose()
    assert (text(parts), error.code, error.retryable) == ("Hello", "provider_unavailable", True)
    assert "overloaded" in error.message


async def test_silence_before_the_first_byte_is_a_timeout(wire: Wire) -> None:
    async def never(_: RawServer, __: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async with RawServer(never) as server:
        models = at(server, STALL_S)
        _, error = await failed(models, prompt(wire.model, "hi"))
        async with asyncio.timeout(CLOSED_S):
            await server.hung_up.wait()
        await models.aclose()
    assert error.code == "provider_timeout"


async def test_an_answer_that_finished_is_complete_though_the_connection_hangs() -> None:
    async def hangs(_: RawServer, writer: asyncio.StreamWriter) -> None:
        writer.write(CHAT.stream("Hello") + sse(CHAT.end[0]))
        await asyncio.Event().wait()

    async with RawServer(hangs) as server:
        models = at(server, STALL_S)
        parts = await heard(models, prompt(OPENAI, "hi"))
        await models.aclose()
    assert (text(parts), finish(parts).reason) == ("Hello", "stop")


async def test_call_ids_are_made_unique_and_stop_after_calls_means_calls() -> None:
    def call(index: int, id_: str | None, arguments: str) -> dict[str, Any]:
        function = {"name": "clock", "arguments": arguments}
        return chat_chunk({"tool_calls": [{"index": index, "id": id_, "type": "function", "function": function}]})

    calls = [call(0, "same", "{}"), call(1, "same", '{"timezone":"UTC"}'), call(2, None, ""), call(3, "", " ")]
    async with RawServer(sends(STREAM_HEAD, sse(*calls, *CHAT.end))) as server:
        models = at(server)
        parts = await heard(models, prompt(OPENAI, "hi", tools=TOOLS))
        await models.aclose()
    asked = finish(parts).calls
    assert [call.arguments for call in asked] == [{}, {"timezone": "UTC"}, {}, {}]
    assert len({call.id for call in asked}) == 4
    assert all(call.id for call in asked)
    assert finish(parts).reason == "tool_calls"


async def test_interleaved_calls_keep_their_fragments_apart() -> None:
    def fragment(index: int, arguments: str, **more: str) -> dict[str, Any]:
        call = {"index": index, "function": {"arguments": arguments, **more}}
        return chat_chunk({"tool_calls": [{**call, "id": f"c{index}"} if more else call]})

    chunks = [
        fragment(0, "", name="clock"),
        fragment(1, '{"expr', name="calculate"),
        fragment(0, '{"timezone":'),
        fragment(1, 'ession":"1+1"}'),
        fragment(0, '"UTC"}'),
        chat_chunk({}, "tool_calls"),
    ]
    async with RawServer(sends(STREAM_HEAD, sse(*chunks, "[DONE]"))) as server:
        models = at(server)
        parts = await heard(models, prompt(OPENAI, "hi", tools=TOOLS))
        await models.aclose()
    assert [call.arguments for call in finish(parts).calls] == [{"timezone": "UTC"}, {"expression": "1+1"}]
    assert (written(parts, 0), written(parts, 1)) == ('{"timezone":"UTC"}', '{"expression":"1+1"}')


async def test_calls_without_a_tool_are_malformed() -> None:
    nameless = chat_chunk({"tool_calls": [{"index": 0, "id": "c", "function": {"arguments": "{}"}}]})
    async with RawServer(sends(STREAM_HEAD, sse(nameless, chat_chunk({}, "tool_calls"), "[DONE]"))) as server:
        models = at(server)
        _, error = await failed(models, prompt(OPENAI, "hi", tools=TOOLS))
        await models.aclose()
    assert error.code == "provider_malformed"


async def test_a_character_cut_in_two_is_joined_and_half_a_character_is_not_passed_on() -> None:
    async with RawServer(sends(CHAT.stream("a\ud83d", "\ude00b", "c\ud83d", "d"), sse(*CHAT.end))) as server:
        models = at(server)
        parts = await heard(models, prompt(OPENAI, "hi"))
        await models.aclose()
    assert text(parts) == "a😀bc\ufffdd"


async def test_a_refusal_is_read_as_text() -> None:
    refusal = [chat_chunk({"refusal": "I can"}), chat_chunk({"refusal": "not."}), *CHAT.end]
    async with RawServer(sends(STREAM_HEAD, sse(*CHAT.opening, *refusal))) as server:
        models = at(server)
        parts = await heard(models, prompt(OPENAI, "hi"))
        await models.aclose()
    assert (text(parts), finish(parts).reason) == ("I cannot.", "content_filter")


# Time


async def test_each_chunk_arrives_before_the_next_is_sent(wire: Wire) -> None:
    """In lock-step: the server sends a chunk only when the reader has the one before."""
    received = asyncio.Semaphore(0)

    async def in_step(_: RawServer, writer: asyncio.StreamWriter) -> None:
        writer.write(wire.stream())
        for number in range(10):
            writer.write(sse(wire.chunk(f"{number} ")))
            await received.acquire()
        writer.write(sse(*wire.end))

    got = []
    async with RawServer(in_step) as server, asyncio.timeout(WAIT_S):
        models = at(server)
        async for part in models.stream(prompt(wire.model, "hi")):
            got.append(part)
            received.release()
        await models.aclose()
    assert text(got) == "0 1 2 3 4 5 6 7 8 9 "
    assert len(got) == 11


async def one_chunk_then_nothing(wire: Wire, writer: asyncio.StreamWriter) -> None:
    writer.write(wire.stream("Hello"))
    await asyncio.Event().wait()


async def test_closing_the_stream_closes_the_connection(wire: Wire) -> None:
    async with RawServer(lambda _, writer: one_chunk_then_nothing(wire, writer)) as server:
        own = at(server)
        async with aclosing(own.stream(prompt(wire.model, "hi"))) as parts:
            assert await anext(parts) == Text("Hello")
            assert not server.hung_up.is_set()
        async with asyncio.timeout(CLOSED_S):
            await server.hung_up.wait()
        await own.aclose()


@pytest.mark.parametrize("answered", [True, False])
async def test_cancelling_the_reader_closes_the_connection(wire: Wire, answered: bool) -> None:
    reached = asyncio.Event()

    async def handler(_: RawServer, writer: asyncio.StreamWriter) -> None:
        if not answered:
            reached.set()
            await asyncio.Event().wait()
        await one_chunk_then_nothing(wire, writer)

    async def read() -> None:
        async with aclosing(own.stream(prompt(wire.model, "hi"))) as parts:
            async for _ in parts:
                reached.set()

    async with RawServer(handler) as server:
        own = at(server)
        task = asyncio.create_task(read())
        async with asyncio.timeout(WAIT_S):
            await reached.wait()
        task.cancel()
        async with asyncio.timeout(CLOSED_S):
            await server.hung_up.wait()
            with pytest.raises(asyncio.CancelledError):
                await task
        await own.aclose()


async def test_requests_share_one_connection(server: ModelServer, model: str, said: str) -> None:
    """Counted by a relay between the two: a second request must not wait for a handshake."""
    accepted = 0
    over = asyncio.Event()
    port = int(server.url.rpartition(":")[2])

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while block := await reader.read(65536):
            writer.write(block)

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal accepted
        accepted += 1
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        back = asyncio.create_task(copy(far_reader, writer))
        await copy(reader, far_writer)
        back.cancel()
        for one in (writer, far_writer):
            one.close()
            await one.wait_closed()
        over.set()

    server.add(answers(said, "Hello again."))
    async with await asyncio.start_server(relay, "127.0.0.1", 0) as front, asyncio.timeout(WAIT_S):
        url = f"http://127.0.0.1:{front.sockets[0].getsockname()[1]}"
        own = Models(model, {**server.environ, "OPENAI_BASE_URL": f"{url}/v1", "ANTHROPIC_BASE_URL": url})
        for _ in range(3):
            assert text(await heard(own, prompt(model, said))) == "Hello again."
        await own.aclose()
        await over.wait()
    assert accepted == 1


# Settings


@pytest.mark.parametrize(
    ("name", "environ", "says"),
    [
        (OPENAI, {}, "OPENAI_API_KEY is not set; export it or set TAPELINE_MODEL=demo"),
        (OPENAI, {"OPENAI_API_KEY": ""}, "OPENAI_API_KEY is not set; export it or set TAPELINE_MODEL=demo"),
        (ANTHROPIC, {}, "ANTHROPIC_API_KEY is not set; export it or set TAPELINE_MODEL=demo"),
        ("deepseek:chat", {}, "DEEPSEEK_API_KEY is not set; export it or set TAPELINE_MODEL=demo"),
        ("groq:llama", {}, 'pip install "pydantic-ai-slim[groq]"'),
        ("nobody:model", {}, "'nobody' is no provider"),
        ("gpt-5", {}, "'gpt-5' is not a model; use demo or provider:name"),
        ("openai:", {"OPENAI_API_KEY": "k"}, "'openai:' is not a model"),
        (":gpt-5", {}, "':gpt-5' is not a model"),
        ("demo", {"TAPELINE_DEMO_DELAY_MS": "fast"}, "TAPELINE_DEMO_DELAY_MS is 'fast'"),
        ("demo", {"TAPELINE_PROVIDER_STALL_S": "-1"}, "TAPELINE_PROVIDER_STALL_S is '-1'"),
        ("demo", {"TAPELINE_PROVIDER_STALL_S": "0"}, "it must be a number, 0.01 or more"),
        ("demo", {"TAPELINE_PROVIDER_STALL_S": "nan"}, "TAPELINE_PROVIDER_STALL_S is 'nan'"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(name: str, environ: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Models(name, environ).check()
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "environ"),
    [
        ("demo", {}),
        (OPENAI, {"OPENAI_API_KEY": "k"}),
        (OPENAI, {"OPENAI_BASE_URL": "http://127.0.0.1:1/v1"}),
        (RESPONSES, {"OPENAI_API_KEY": "k"}),
        (ANTHROPIC, {"ANTHROPIC_API_KEY": "k"}),
    ],
)
async def test_settings_that_work(name: str, environ: dict[str, str]) -> None:
    models = Models(name, environ)
    models.check()
    await models.aclose()


async def test_a_conversation_s_unknown_model_fails_its_run_only() -> None:
    parts, error = await failed(Models("demo", {}), prompt("nobody:model", "hi"))
    assert (parts, error.code, error.retryable) == ([], "provider_rejected", False)
    assert "nobody" in error.message


FRESH = """
import asyncio, sys
from services.inference import app
from services.inference.part import Text
from services.inference.prompt import Prompt, UserTurn

async def said(models, model):
    parts = [part async for part in models.stream(Prompt("", [UserTurn(sys.argv[2])], [], model))]
    return "".join(part.text for part in parts if isinstance(part, Text))

async def main():
    models = app.Models("demo", app.os.environ)
    models.check()
    print(await said(models, ""))
    print("pydantic_ai" in sys.modules)
    print(*await asyncio.gather(*(said(models, sys.argv[1]) for _ in range(2))), sep="\\n")
    await models.aclose()

asyncio.run(main())
"""


async def test_what_a_provider_needs_is_loaded_by_the_first_message_that_names_one(
    server: ModelServer, said: str
) -> None:
    server.add(answers(said, "Hello."))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", FRESH, OPENAI, said),
        env={**os.environ, **server.environ, "TAPELINE_DEMO_DELAY_MS": "0"},
        stdout=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(LOADED_S_MAX):
        out, _ = await process.communicate()
    demo_said, _, rest = out.decode().rpartition("```\n")
    assert demo_said.startswith(demo.LABEL)
    assert rest.split() == ["False", "Hello.", "Hello."]
    assert process.returncode == 0


# The demo model


@pytest.fixture
def demo_models() -> Models:
    return Models("demo", {"TAPELINE_DEMO_DELAY_MS": "0"})


async def demo_run(models: Models, said: str, tools: list[ToolSpec], results: dict[str, str]) -> list[list[Part]]:
    """A run as the engine would make it: every call gets its result, until an answer asks for none."""
    turns: list[Turn | str] = [said]
    steps = []
    while True:
        steps.append(await heard(models, prompt("", *turns, tools=tools)))
        calls = [Call(f"{len(turns)}-{call.id}", call.tool, call.arguments) for call in finish(steps[-1]).calls]
        assert {call.tool for call in calls} <= {tool.name for tool in tools}
        turns.append(AnswerTurn(text(steps[-1]), text(steps[-1], Thinking), calls))
        turns += [
            ResultTurn(call.id, call.tool, results.get(call.tool, "done"), is_error=call.tool == "fail")
            for call in calls
        ]
        if not calls:
            return steps


async def test_the_demo_shows_thinking_parallel_tools_a_table_and_code(demo_models: Models) -> None:
    tools_step, answer = await demo_run(demo_models, "Hello there", TOOLS, {"clock": "noon", "calculate": "42"})
    assert text(tools_step, Thinking)
    assert text(tools_step).startswith(demo.LABEL)
    assert "Hello there" in text(tools_step)
    assert [call.tool for call in finish(tools_step).calls] == ["clock", "calculate"]
    for shown in ("noon", "42", "|---|", "```python"):
        assert shown in text(answer)
    assert finish(answer).reason == "stop"


async def test_the_demo_calls_no_tool_that_is_not_offered(demo_models: Models) -> None:
    for said in ("Hello", "parallel", "steps", "fail", "use a tool", "what time is it?"):
        [answer] = await demo_run(demo_models, said, [], {})
        assert text(answer).startswith(demo.LABEL)
        assert "No tools are offered" in text(answer)


@pytest.mark.parametrize(
    ("said", "calls"),
    [
        ("parallel please", [["clock", "calculate", "search_notes"]]),
        ("two steps", [["clock"], ["calculate"]]),
        ("now fail", [["fail"]]),
        ("What time is it?", [["clock"]]),
        ("How is the weather?", [["search_notes"]]),
        ("use your tools", [["clock", "calculate", "search_notes"]]),
        ("long 20", []),
    ],
)
async def test_the_demo_reacts_to_words(demo_models: Models, said: str, calls: list[list[str]]) -> None:
    *steps, answer = await demo_run(demo_models, said, TOOLS, {"fail": "it broke"})
    assert [[call.tool for call in finish(step).calls] for step in steps] == calls
    assert text([*steps, answer][0]).startswith(demo.LABEL)
    if "fail" in said:
        assert "`fail` failed: it broke" in text(answer)
    if "long" in said:
        assert len(text(answer).split()) in range(20, 40)


async def test_the_demo_calls_a_tool_of_one_s_own(demo_models: Models) -> None:
    properties = {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["C", "F"]}}
    own = ToolSpec("get_forecast", "", {"type": "object", "properties": properties, "required": [*properties]})
    step, _ = await demo_run(demo_models, "The forecast for Bern", [own, *TOOLS], {})
    [call] = finish(step).calls
    assert (call.tool, call.arguments) == (
        "get_forecast",
        {"city": "The forecast for Bern", "days": 1, "unit": "C"},
    )


async def test_the_demo_fills_in_what_any_schema_asks_for(demo_models: Models) -> None:
    deep: object = "ground"
    for _ in range(limits.JSON_DEPTH_MAX):
        deep = [deep]
    for schema, argument in (
        (True, {}),
        ({"type": ["string", "null"]}, "forecast"),
        ({"anyOf": [True]}, {}),
        ({"minimum": 3, "type": "integer"}, 3),
        ({"default": deep}, None),  # deeper than a reader of the tape would take
    ):
        own = ToolSpec("forecast", "", {"type": "object", "properties": {"a": schema}, "required": ["a"]})
        [call] = finish(await heard(demo_models, prompt("", "forecast", tools=[own]))).calls
        assert call.arguments == ({} if argument is None else {"a": argument})


async def test_the_demo_remembers_the_conversation(demo_models: Models) -> None:
    parts = await heard(demo_models, prompt("demo", "My name is Ada", AnswerTurn("Hi."), "And now?"))
    assert "My name is Ada" in text(parts)
    assert "message 2" in text(parts)


async def test_the_demo_keeps_its_pace() -> None:
    models = Models("demo", {"TAPELINE_DEMO_DELAY_MS": "5"})
    began = time.monotonic()
    parts = await heard(models, prompt("demo", "long 40"))
    assert time.monotonic() - began >= 0.005 * (len(parts) - 1)
    assert len(parts) > 40
