"""Saying it again: a message that replaces a run, and what the model is told then; and saying it to another model. What
counts is pure; the rest is seen on the real stack, by what reaches a provider.
"""

import asyncio
import signal
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tapeline import audit, subjects
from tapeline.events import Conversation, Event, Message, Step, encode
from tapeline.fold import State, fold
from tapeline.record import Record
from tapeline.settings import ConfigError, Settings

from services.edge.models import Models
from services.inference.decide import Budget, Claim, End, Rest, Trigger, decide
from tests import PATIENT_S
from tests.client import Client, log_of, problem
from tests.model_server import STREAM_HEAD, RawServer, sse
from tests.stack import Stack
from tests.test_deadlines import CHUNK

MODEL: Final = "openai:x"


def log(*said: str) -> list[Record]:
    """A conversation in which this is said: `c/a` is the run c, which replaces a."""
    events: list[Event] = [Conversation(run="-", ts=0, owner="o")]
    for one in said:
        run, _, replaces = one.partition("/")
        events.append(Message(run=run, ts=0, content=run, replaces=replaces))
    subject = subjects.chain(0, "c", subjects.INPUT)
    return [Record(seq, seq - 1, subject, encode(event), {}) for seq, event in enumerate(events, start=1)]


def counted(state: State, run: str) -> str:
    return " ".join(one.run for one in state.before(state.runs[run]))


def given_up(state: State) -> dict[str, str]:
    return {run.run: run.replaced_by for run in state.runs.values() if run.replaced_by}


def test_what_counts_for_a_run() -> None:
    for said, before, replaced in (
        ("a", "", {}),
        ("a b c", "a b", {}),
        ("a b/a", "", {"a": "b"}),  # the first again
        ("a b c/b", "a", {"b": "c"}),  # regenerated
        ("a b c/b d/c", "a", {"b": "c", "c": "d"}),  # and once more
        ("a b c/b d", "a c", {"b": "c"}),  # and gone on
        ("a b c d/a e", "d", {"a": "d", "b": "d", "c": "d"}),  # an early message edited, and gone on
        ("a b c/b d/b", "a", {"b": "d", "c": "d"}),  # two people regenerate the same: the later one's counts
        ("a b c d/b e/c f", "a e", {"b": "d", "c": "e", "d": "e"}),  # one that was replaced: what came after it, too
        ("a b c/a d/b", "", {"a": "c", "b": "d", "c": "d"}),
        ("a b c/x", "a b", {}),  # no such run
        ("a b/b", "a", {}),  # not yet
    ):
        state = fold(log(*said.split()))
        last = next(reversed(state.runs))
        assert counted(state, last) == before, said
        assert given_up(state) == replaced, said


def test_a_message_that_replaces_nothing_is_told_of_by_the_audit() -> None:
    assert audit.violations(log("a", "b/a"), complete=False) == []
    (broken,) = audit.violations(log("a", "b/x"), complete=False)
    assert broken == "3 Message: replaces the run x, which has no message"
    assert fold(log("a", "b/x")).runs["b"].replaces == ""


@given(st.lists(st.none() | st.integers(0, 11), min_size=1, max_size=12))
def test_what_no_other_replaces_is_what_counts(replaced: list[int | None]) -> None:
    said = [f"r{number}" + ("" if named is None else f"/r{named}") for number, named in enumerate(replaced)]
    seen: dict[str, str] = {}
    for length in range(1, len(said) + 1):
        state = fold(log(*said[:length]))
        last = next(reversed(state.runs))
        shown = [run.run for run in state.runs.values() if not run.replaced_by]
        assert [*counted(state, last).split(), last] == shown
        seen[last] = counted(state, last)
        assert {run: counted(state, run) for run in state.runs} == seen, "what is said later changed what counted"


def test_a_replaced_run_is_answered_only_where_that_has_begun() -> None:
    budget, trigger = Budget(), Trigger(9, 1)
    end = decide(fold(log("a", "b/a")), trigger, 0, budget)
    assert isinstance(end, End)
    assert (end.run.run, end.reason) == ("a", "stopped"), "its turn had come, and no more"
    begun = Step(run="a", ts=0, step=1, attempt=1, worker="w", trigger=2)
    records = log("a", "b", "c/b")
    records.insert(2, Record(3, 2, subjects.chain(0, "c", subjects.MODEL), encode(begun), {}))
    end = decide(fold(records), trigger, 0, budget)
    assert isinstance(end, End)
    assert (end.run.run, end.reason) == ("b", "stopped"), "it was queued"
    records = [*records[:3], *log("a", "b/a")[2:]]
    assert decide(fold(records), trigger, 0, budget) == Rest(), "it goes on"
    assert isinstance(decide(fold(records), Trigger(2, 2), 0, budget), Claim), "also when its worker was lost"


# On the real stack


async def answer(server: RawServer, writer: asyncio.StreamWriter) -> None:
    """Says which request it was; to what begins with "wait" it says no more than a beginning."""
    *_, said = told(server)
    text, end = ("begun", None) if said.startswith("wait") else (f"answer {len(server.requests)}", "stop")
    choice = {"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": end}
    writer.write(STREAM_HEAD + sse({**CHUNK, "choices": [choice]}, *(["[DONE]"] if end else [])))
    await writer.drain()
    if end is None:
        await asyncio.Event().wait()


def told(server: RawServer) -> list[str]:
    """What the newest request says of the conversation."""
    return [message["content"] for message in server.requests[-1]["messages"]]


def outline(snapshot: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [(run["run"], run["replaces"], run["replaced_by"]) for run in snapshot["runs"]]


async def test_the_model_is_told_what_counts_over_two_edges_and_two_workers(fresh_stack: Stack) -> None:
    fresh_stack.add_edge({"TAPELINE_MODEL": MODEL})
    fresh_stack.add_edge({"TAPELINE_MODEL": MODEL, "TAPELINE_MODELS": f"demo, {MODEL},demo"})
    one, other = Client(fresh_stack.url), Client(fresh_stack.edge_url(1))
    async with RawServer(answer) as provider, one, other, asyncio.timeout(PATIENT_S):
        settings = {"TAPELINE_MODEL": MODEL, "OPENAI_BASE_URL": f"{provider.url}/v1", "OPENAI_API_KEY": "test"}
        inference = fresh_stack.start_inference(settings)
        conversation = await one.create()

        async def say(client: Client, content: str, **more: Any) -> str:
            run = (await client.post(conversation, content, **more)).run
            await client.run(conversation, run)
            return run

        first = await say(one, "one")
        second = await say(one, "two")
        assert told(provider) == ["one", "answer 1", "two"]
        third = await say(other, "two", replaces=second)
        assert told(provider) == ["one", "answer 1", "two"]
        fourth = await say(one, "deux", key="k", replaces=second)
        assert told(provider) == ["one", "answer 1", "deux"]
        assert (await other.post(conversation, "deux", key="k", replaces=second)).run == fourth
        for more in ({}, {"replaces": third}):
            refused = await other.send(conversation, "deux", key="k", **more)
            problem(refused, 422, "idempotency_mismatch")
        fifth = await say(other, "three")
        assert told(provider) == ["one", "answer 1", "deux", "answer 4", "three"]
        sixth = await say(one, "uno", replaces=first)
        assert told(provider) == ["uno"]

        waits = (await other.post(conversation, "wait")).run
        async with one.events(conversation, run=waits) as stream:
            await stream.until("token")
        queued = (await one.post(conversation, "never asked", on_busy="queue")).run
        problem(await other.send(conversation, "due", replaces="none"), 404, "unknown_run")
        problem(await other.send(conversation, "due", replaces=7), 422, "invalid")
        assert problem(await other.send(conversation, "due", replaces=waits), 409, "busy")["run"] == waits
        inference.end(signal.SIGKILL)
        seventh = (await other.post(conversation, "due", replaces=waits, on_busy="interrupt")).run
        asked = len(provider.requests)
        fresh_stack.start_inference(settings)
        await one.run(conversation, seventh)
        assert told(provider) == ["uno", "answer 6", "due"]
        assert len(provider.requests) == asked + 1, "what was queued and replaced is asked of nobody"

        shown = await one.snapshot(conversation)
        assert await other.snapshot(conversation) == shown
        assert outline(shown) == [
            (first, "", sixth),
            (second, "", sixth),
            (third, second, sixth),
            (fourth, second, sixth),
            (fifth, "", sixth),
            (sixth, first, ""),
            (waits, "", seventh),
            (queued, "", seventh),
            (seventh, waits, ""),
        ]
        assert [said["content"] for said in shown["messages"]] == ["uno", "answer 6", "due", "answer 8"]
        assert shown["title"] == "one"
        assert [run["reason"] for run in shown["runs"]] == [*["stop"] * 6, "stopped", "stopped", "stop"]
        await only_what_is_allowed_can_be_chosen(one, other)
    await log_of(fresh_stack.nats.url, conversation)


async def only_what_is_allowed_can_be_chosen(any_edge: Client, edge: Client) -> None:
    """`edge` has a list, and `any_edge` has none."""
    default = {"id": MODEL, "default": True, "scripted": False}
    assert await models(any_edge) == [default]
    assert await models(edge) == [{"id": "demo", "default": False, "scripted": True}, default]
    old = await any_edge.create(model="openai:dear")
    for refused in (
        await edge.http.post("/v1/conversations", json={"model": "openai:dear"}),
        await edge.send(await edge.create(model="demo"), "hello", model="openai:dear"),
        await edge.send(old, "hello"),  # begun where there was no list
    ):
        assert f"demo, {MODEL}" in problem(refused, 422, "unknown_model")["detail"]
    assert (await edge.snapshot(old))["runs"] == []
    told = await edge.run(old, (await edge.post(old, "long 2", model="demo")).run)
    assert told[-1].event == "done"


async def models(client: Client) -> list[dict[str, Any]]:
    response = await client.http.get("/v1/models")
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["models"]
    return found


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"TAPELINE_MODELS": "openai:x"}, "does not have demo"),
        ({"TAPELINE_MODELS": "demo,open ai"}, "'open ai'"),
    ],
)
def test_a_list_that_cannot_be_is_refused(settings: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Models.configured(Settings(settings))
