"""Replay of what is stored: at a pace, compact, and honest about what has expired."""

import asyncio
import json
import time
import tracemalloc
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from tapeline import audit, events, limits, subjects
from tapeline.append import Chain
from tapeline.connection import api
from tapeline.fold import State, fold
from tapeline.record import Entry
from tapeline.replay import outline, snapshot, whole_after
from tapeline.tape import Tape

from tests.client import NDJSON, SSE, Client, as_received, log_of, problem, stored, types
from tests.stack import Stack

EXPIRED_S = 30.0


@pytest.fixture
def forgetful(tmp_path: Path) -> Iterator[Stack]:
    """A system that keeps deltas for some seconds."""
    stack = Stack(tmp_path, {"TAPELINE_DELTA_TTL_S": "6"})
    try:
        yield stack.start()
    finally:
        stack.stop()


async def expired(stack: Stack, conversation: str) -> None:
    """Waits until the conversation has no delta left."""
    async with asyncio.timeout(EXPIRED_S):
        while any(not record.is_fact for record in await stored(stack.nats.url, conversation)):
            await asyncio.sleep(0.1)


async def test_a_conversation_whose_deltas_have_expired_is_readable_and_says_so(forgetful: Stack) -> None:
    async with Client(forgetful.url) as client:
        conversation, run = await client.ask("parallel")
        whole = await client.run(conversation, run)
        before = await client.snapshot(conversation)
        await expired(forgetful, conversation)
        facts = await stored(forgetful.nats.url, conversation)
        assert audit.violations(facts, complete=False) == []
        # What it was is still to be read, and to be gone on with.
        assert await client.snapshot(conversation) == before
        async with client.events(conversation, view="compact", run=run) as stream:
            assert await stream.rest() == as_received(facts, run)
        assert len(await client.lines(conversation, view="compact")) == len(facts)
        # The tokens are not, and nobody is told a story without them.
        gone = problem(await client.get_events(conversation, str(whole[0].id)), 410, "cursor_expired")
        assert gone["snapshot"] == f"/v1/conversations/{conversation}"
        assert gone["earliest"] > whole[0].id
        problem(await client.get_events(conversation), 410, "cursor_expired")
        problem(await client.get_events(conversation, run=run), 410, "cursor_expired")
        problem(await client.get_events(conversation, headers=NDJSON), 410, "cursor_expired")
        # After `earliest`, as after the snapshot's last event, nothing is missing.
        rest = await client.lines(conversation, after=gone["earliest"])
        assert [json.loads(line)["id"] for line in rest] == [one.seq for one in facts if one.seq > gone["earliest"]]
        assert json.loads(rest[0])["prev"] == gone["earliest"]
        assert (await client.get_events(conversation, str(whole[-1].id), run=run)).status_code == 204
        # A new run in it is whole.
        posted = await client.post(conversation, "hello")
        fresh = await client.run(conversation, posted.run)
        assert fresh[-1].event == "done"
        assert fresh == as_received(await stored(forgetful.nats.url, conversation), posted.run)


async def test_a_cursor_in_the_middle_of_what_has_expired_may_go_on_if_it_saw_all_of_it(forgetful: Stack) -> None:
    async with Client(forgetful.url) as client:
        conversation, run = await client.ask("hello")
        seen = await client.run(conversation, run)
        await expired(forgetful, conversation)
        last_token = max(one.id for one in seen if one.event in ("token", "thinking"))
        assert (await client.run(conversation, run, last_token)) == [one for one in seen if one.id > last_token]
        problem(await client.get_events(conversation, str(last_token - 1)), 410, "cursor_expired")


async def test_deltas_that_expire_while_they_are_replayed_are_not_passed_over(forgetful: Stack) -> None:
    async with Client(forgetful.url) as client:
        conversation = await client.create()
        tape = await Tape.open(forgetful.nats.url, "test")
        try:
            last = await tape.last(conversation)
            await asyncio.sleep(0.2)  # a silence, to be replayed for longer than deltas are kept
            token = Entry(subjects.MODEL_DELTA, events.encode(events.Token(run="x", ts=1, step=1, attempt=1, text="x")))
            for _ in range(2):
                last = (await tape.append_batch(conversation, [token] * limits.HISTORY_BATCH, last))[-1]
        finally:
            await tape.close()
        assert (await client.http.patch(f"/v1/conversations/{conversation}", json={"title": "x"})).status_code == 200
        async with client.events(conversation, pace=limits.PACE_MIN) as stream:
            with pytest.raises(httpx.RemoteProtocolError):  # no end of the response, so nobody takes it for the whole
                await stream.rest()
        seen = stream.received
        assert types(seen[-1:]) == ["token"]
        assert "title" not in types(seen)
        problem(await client.get_events(conversation, str(seen[-1].id)), 410, "cursor_expired")


async def test_what_is_too_young_to_have_expired_is_not_read_to_see_whether_it_has(
    tape: Tape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "HISTORY_BATCH", 50)
    token = Entry(subjects.MODEL_DELTA, events.encode(events.Token(run="x", ts=1, step=1, attempt=1, text="x")))
    last = (await tape.append_batch("c", [token] * limits.BATCH_EVENTS_MAX, 0))[-1]
    before = tape.nc.stats["in_msgs"]
    assert await whole_after(tape, "c", 0) == 0
    assert tape.nc.stats["in_msgs"] - before <= 51, "a page, and its end"
    await api(tape.nc, f"STREAM.PURGE.{subjects.stream(tape.shard('c'))}", {"seq": 11, "filter": tape.subject("c")})
    assert await whole_after(tape, "c", 0) == 10
    assert await whole_after(tape, "c", last) == last


@pytest.mark.parametrize("pace", ["0", "-1", "x", "nan", "inf", "1e3", "1001", "", "٣", "1.", "0.001"])
async def test_a_pace_that_is_none_is_refused(pace: str, client: Client) -> None:
    problem(await client.get_events(await client.create(), pace=pace), 400, "bad_pace")


async def test_a_replay_takes_the_time_it_took_divided_by_its_pace(stack: Stack, client: Client) -> None:
    conversation, _ = await client.answered("long 60")
    log = await log_of(stack.nats.url, conversation)
    took_s = (log[-1].stored_at - log[0].stored_at).total_seconds()
    for accept, pace in (("text/event-stream", 1), ("text/event-stream", 4), ("application/x-ndjson", 2)):
        started = time.monotonic()
        async with client.http.stream(
            "GET", f"/v1/conversations/{conversation}/events", params={"pace": pace}, headers={"Accept": accept}
        ) as response:
            arrived = [time.monotonic() - started async for _ in response.aiter_raw()]
        assert arrived[-1] >= took_s / pace * 0.99, "a replay is never faster than asked"
        assert len(arrived) > 10, "and does not come at once in the end"
    async with client.events(conversation, pace=1000) as stream:
        assert await stream.rest() == as_received(log)


async def test_a_replay_of_which_all_has_been_seen_is_over(client: Client) -> None:
    conversation, _ = await client.answered("hello")
    last = (await client.snapshot(conversation))["last_event_id"]
    assert (await client.get_events(conversation, str(last), pace=1)).status_code == 204


async def test_a_replay_of_a_run_waits_for_that_run_alone_and_ends_with_it(stack: Stack, client: Client) -> None:
    conversation = await client.create()
    runs = []
    for question in ("long 300", "long 3", "long 300"):
        runs.append((await client.post(conversation, question)).run)
        await client.run(conversation, runs[-1])
    log = await log_of(stack.nats.url, conversation)
    first, mine, last = ([one for one in log if one.event().run == run] for run in runs)
    pace = 0.1
    others_s = min((run[-1].stored_at - run[0].stored_at).total_seconds() for run in (first, last)) / pace
    started = time.monotonic()
    async with client.events(conversation, run=runs[1], pace=pace) as stream:
        assert await stream.rest() == as_received(mine)
    took_s = time.monotonic() - started
    print(f"{took_s:.1f} s; each of the others takes {others_s:.1f} s")
    assert took_s < others_s
    for accept, status in ((SSE, 204), (NDJSON, 200)):
        response = await client.get_events(conversation, str(mine[-1].seq), accept, run=runs[1], pace=pace)
        assert (response.status_code, response.content) == (status, b""), "an EventSource would come back for ever"


RESULTS: Final = 40
RESULT_CHARS: Final = 500_000


async def large(tape: Tape, conversation: str) -> int:
    """A run of many large results, and a step after them that is being written; what they have in bytes."""
    chain = Chain(tape, conversation, 0)
    run: dict[str, Any] = {"run": "r", "ts": 1}
    await chain.append(subjects.INPUT, events.Conversation(run=events.NO_RUN, ts=1, owner="ann"))
    await chain.append(subjects.INPUT, events.Message(**run, content="hi"))
    step: dict[str, Any] = {**run, "step": 1, "attempt": 1}
    await chain.append(subjects.MODEL, events.Step(**step, worker="w", trigger=2))
    await chain.append(subjects.MODEL, events.Answer(**step, finish="tool_calls", text="x" * RESULT_CHARS))
    for number in range(RESULTS):
        call: dict[str, Any] = {"call": f"c{number}", "tool": "t"}
        await chain.append(subjects.call("t"), events.ToolCall(**step, **call, arguments={}, deadline=2))
        result = events.ToolResult(**run, **call, outcome="ok", content="y" * RESULT_CHARS)
        await chain.append(subjects.TOOL, result)
    return (RESULTS + 1) * RESULT_CHARS


async def traced(coroutine: Coroutine[Any, Any, State]) -> tuple[State, int]:
    """What it returns, and the most bytes that it took."""
    tracemalloc.start()
    try:
        return await coroutine, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


async def test_a_decision_about_a_huge_conversation_takes_little_memory(tape: Tape) -> None:
    size = await large(tape, "c")
    state, most = await traced(outline(tape, "c", "c7"))
    print(f"{size / 1e6:.0f} MB: {most / 1e6:.1f} MB at most")
    assert most < size / 4
    calls = state.runs["r"].calls
    assert [call.status for call in calls.values()] == ["done"] * RESULTS
    assert {name for name, call in calls.items() if call.content is not None} == {"c7"}
    shown, most = await traced(snapshot(tape, "c"))
    print(f"a snapshot: {most / 1e6:.1f} MB at most")
    assert most < size * 1.5, "all of it is to be shown, but need not be there twice"
    assert shown.runs["r"].calls["c0"].content == "y" * RESULT_CHARS


async def test_a_snapshot_is_what_all_events_add_up_to_wherever_the_log_ends(tape: Tape) -> None:
    """Deltas are read after the facts, and only where they can count."""
    chain = Chain(tape, "c", 0)
    run: dict[str, Any] = {"run": "r", "ts": 1}
    one, again = ({**run, "step": 1, "attempt": attempt} for attempt in (1, 2))
    two = {**run, "step": 2, "attempt": 1}
    named: list[dict[str, Any]] = [{"call": call, "tool": "t"} for call in ("a", "b")]
    calls = [{**run, **call} for call in named]
    written: list[tuple[str, events.Event]] = [
        (subjects.INPUT, events.Conversation(run=events.NO_RUN, ts=1, owner="ann")),
        (subjects.INPUT, events.Message(**run, content="hi")),
        (subjects.MODEL, events.Step(**one, worker="w", trigger=2)),
        (subjects.MODEL_DELTA, events.Thinking(**one, text="hm")),
        (subjects.MODEL_DELTA, events.Token(**one, text="a")),
        (subjects.MODEL, events.Step(**again, worker="v", trigger=2, text="kept")),
        (subjects.MODEL_DELTA, events.Token(**one, text="too late")),
        (subjects.MODEL_DELTA, events.Token(**again, text="b")),
        (subjects.INPUT, events.Message(run="next", ts=1, content="and then?", on_busy="queue")),
        (subjects.MODEL_DELTA, events.ToolInput(**again, call="a", tool="t", text="{}")),
        (subjects.MODEL, events.Answer(**again, finish="tool_calls", text="keptb")),
        *((subjects.call("t"), events.ToolCall(**again, **call, arguments={}, deadline=2)) for call in named),
        (subjects.TOOL, events.ToolStarted(**calls[0], worker="w", attempt=1, delivery=1)),
        (subjects.TOOL_DELTA, events.ToolProgress(**calls[0], text="a1")),
        (subjects.TOOL, events.ToolStarted(**calls[1], worker="w", attempt=1, delivery=1)),
        (subjects.TOOL_DELTA, events.ToolProgress(**calls[1], text="b1")),
        (subjects.TOOL_DELTA, events.ToolProgress(**calls[0], fraction=0.5, text="a2")),
        (subjects.TOOL, events.ToolStarted(**calls[1], worker="v", attempt=2, delivery=2)),
        (subjects.TOOL_DELTA, events.ToolProgress(**calls[1], text="b2")),
        (subjects.TOOL, events.ToolResult(**calls[0], outcome="ok", content=1)),
        (subjects.TOOL_DELTA, events.ToolProgress(**calls[0], text="too late")),
        (subjects.TOOL_DELTA, events.ToolProgress(**calls[1], text="b3")),
        (subjects.TOOL, events.ToolResult(**calls[1], outcome="ok", content=2)),
        (subjects.MODEL, events.Step(**two, worker="w", trigger=2)),
        (subjects.MODEL_DELTA, events.Token(**two, text="so")),
    ]  # fmt: skip
    for kind, event in written:
        last = await chain.append(kind, event)
        everything = fold(await tape.read("c"))
        shown = await snapshot(tape, "c")
        assert shown.last_event_id <= last, "where no delta counts, it may be that of the last fact"
        shown.last_event_id = everything.last_event_id
        assert shown == everything
