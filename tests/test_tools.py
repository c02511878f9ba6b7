"""The tool worker as a real process on a real server: one result per call, whatever happens to the worker."""

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from tapeline import limits, provision, subjects
from tapeline.clock import now_ms
from tapeline.connection import Refused, api, connect
from tapeline.events import (
    Done,
    Stop,
    ToolCall,
    ToolProgress,
    ToolResult,
    ToolStarted,
)
from tapeline.fold import CallState, RunState, State, StepState, fold
from tapeline.registry import Registry, ToolSpec
from tapeline.replay import snapshot
from tapeline.settings import ConfigError
from tapeline.tape import Deployment, Tape
from tapeline.tools import Tool, consumer
from tapeline.tools.decision import Nothing, Run, Settle, decide
from tapeline.tools.definition import AnyTool
from tapeline.tools.worker import Worker as ToolWorker

from services.embedded import EmbeddedNats
from tests.stack import until
from tests.workers import Asked, Start, Worker, noted, said

# Calls


async def test_a_call_is_served(tape: Tape, workers: Start) -> None:
    await workers()
    asked = Asked(tape)
    (call,) = await asked.call("add", {"a": 2, "b": 3})
    result = await asked.result(call)
    assert (result.outcome, result.is_error, result.content, result.tool) == ("ok", False, 5, "add")
    (started,) = await asked.of(ToolStarted, call)
    assert (started.attempt, started.delivery) == (1, 1)
    state = fold(await tape.read(asked.conversation)).runs["r"].calls[call]
    assert (state.status, state.outcome, state.content) == ("done", "ok", 5)


async def test_many_calls_at_once_each_have_one_result(tape: Tape, workers: Start) -> None:
    one, _ = await workers(), await workers()
    runs = [Asked(tape) for _ in range(10)]
    calls = await asyncio.gather(*(asked.call("add", {"a": 1, "b": 1}, calls=5) for asked in runs))
    for asked, ids in zip(runs, calls, strict=True):
        for call in ids:
            assert (await asked.result(call)).content == 2
    assert len(one.noted()) == 50, "each has run once, on whichever of the two"
    claims = [await asked.started(call) for asked, ids in zip(runs, calls, strict=True) for call in ids]
    assert len({claim.worker for claim in claims}) == 2


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"a": "2", "b": 3}, "Expected `int`, got `str` - at `$.a`"),
        ({"a": 2}, "missing required field `b`"),
        ({"a": 2, "b": 3, "c": 4}, "unknown field `c`"),
        ('{"a": 2, "b"', "not a JSON object"),
        ([2, 3], "not a JSON object"),
    ],
)
async def test_bad_arguments_are_a_result_that_names_the_problem(
    tape: Tape, workers: Start, arguments: Any, problem: str
) -> None:
    worker = await workers()
    asked = Asked(tape)
    (call,) = await asked.call("add", arguments)
    result = await asked.result(call)
    assert (result.outcome, result.is_error) == ("error", True)
    assert problem in result.message
    assert worker.noted() == [], "the function was not run"


async def test_a_failing_tool_is_a_result_and_its_secrets_stay_in_the_log(tape: Tape, workers: Start) -> None:
    worker = await workers()
    asked, told = Asked(tape), Asked(tape)
    (call,) = await asked.call("broken", {})
    (other,) = await told.call("refuse", {"message": "not on a Sunday"})
    result, refusal = await asked.result(call), await told.result(other)
    assert (result.outcome, result.message) == ("error", "the tool broken failed: ValueError")
    assert (refusal.outcome, refusal.message) == ("error", "not on a Sunday")
    assert "password hunter2" in worker.said(), "the log has the traceback"


async def test_progress_is_told_while_the_tool_runs(tape: Tape, workers: Start) -> None:
    await workers()
    asked = Asked(tape)
    (call,) = await asked.call("count", {"to": 20, "pause_s": 0.1})
    result = await asked.result(call)
    assert (result.outcome, result.content) == ("ok", 20)
    told = await asked.of(ToolProgress, call)
    fractions = [event.fraction for event in told]
    assert fractions == sorted(fractions)
    assert 2 <= len(told) <= result.duration_ms / 1000 / limits.PROGRESS_INTERVAL_S + 2, (
        "the newest, now and then, and at the end"
    )
    assert told[0].message == "1 of 20"


async def test_output_streams_in_order_and_is_whole_before_the_result(tape: Tape, workers: Start) -> None:
    await workers()
    slow, fast = Asked(tape), Asked(tape)
    (call,) = await slow.call("recite-aloud", {"lines": 30, "pause_s": 0.1})
    (other,) = await fast.call("recite-aloud", {"lines": 12_000, "pause_s": 0})
    for asked, one, lines in ((slow, call, 30), (fast, other, 12_000)):
        result = await asked.result(one)
        assert (result.outcome, result.content) == ("ok", "".join(f"line {number}\n" for number in range(lines)))
        assert (await asked.events())[-1] == result, "nothing comes after it"
        told = await asked.of(ToolProgress, one)
        assert "".join(event.text for event in told) == result.content
        assert max(len(event.text) for event in told) <= limits.DELTA_CHARS_MAX
        state = fold(await tape.read(asked.conversation)).runs["r"].calls[one]
        assert (state.output, state.progress) == ("", None), "the result takes its place"
    told = await slow.of(ToolProgress, call)
    assert told[0].text == "line 0\n", "the first at once"
    took_s = (told[-1].ts - told[0].ts) / 1_000
    assert 4 <= len(told) <= took_s / limits.PROGRESS_INTERVAL_S + 3, "joined, but not held back"


@pytest.mark.parametrize("tool", ["once", "stuck"])
async def test_a_call_ends_at_its_deadline(tape: Tape, workers: Start, tool: str) -> None:
    worker = await workers()
    asked = Asked(tape)
    deadline = now_ms() + 3_000
    (call,) = await asked.call(tool, {"seconds": 60}, timeout_s=3)
    result = await asked.result(call)
    assert (result.outcome, result.is_error) == ("timeout", True)
    assert len(worker.noted()) == 1
    assert result.ts >= deadline


async def test_a_call_that_was_late_before_it_began_is_not_run(tape: Tape, workers: Start) -> None:
    asked = Asked(tape)
    (call,) = await asked.call("add", {"a": 1, "b": 1}, timeout_s=0.001)
    worker = await workers()
    assert (await asked.result(call)).outcome == "timeout"
    assert worker.noted() == []


async def test_a_call_made_while_there_was_no_worker_is_served(tape: Tape, workers: Start) -> None:
    asked = Asked(tape)
    (call,) = await asked.call("add", {"a": 1, "b": 1})
    await workers()
    assert (await asked.result(call)).outcome == "ok"


async def test_a_running_tool_sees_a_stop(tape: Tape, workers: Start) -> None:
    await workers()
    asked = Asked(tape)
    (call,) = await asked.call("block", {"seconds": 30})
    await asked.started(call)
    await asked.append(subjects.INPUT, Stop(run="r", ts=now_ms()))
    result = await asked.result(call, limits.TOOL_GRACE_S / 2)
    assert (result.outcome, result.content) == ("stopped", True)


async def test_a_tool_that_ignores_a_stop_is_cancelled(tape: Tape, workers: Start) -> None:
    await workers()
    asked = Asked(tape)
    (call,) = await asked.call("once", {"seconds": 60})
    await asked.started(call)
    await asked.append(subjects.INPUT, Stop(run="r", ts=now_ms()))
    result = await asked.result(call, limits.TOOL_GRACE_S + limits.TOOL_CANCEL_S + 2)
    assert (result.outcome, result.content) == ("stopped", None)


async def test_a_call_of_a_run_that_has_ended_is_not_run(tape: Tape, workers: Start) -> None:
    asked = Asked(tape)
    (call,) = await asked.call("add", {"a": 1, "b": 1})
    await asked.append(subjects.MODEL, Done(run="r", ts=now_ms(), step=1, attempt=1, reason="stopped"))
    worker = await workers()
    assert (await asked.result(call)).outcome == "stopped"
    assert worker.noted() == []


# Workers that are lost


async def test_a_killed_worker_leaves_one_result_per_call(tape: Tape, workers: Start) -> None:
    one = await workers()
    asked, risky, streaming = Asked(tape), Asked(tape), Asked(tape)
    (call,) = await asked.call("again", {"seconds": 60})
    (effect,) = await risky.call("once", {"seconds": 60})
    (text,) = await streaming.call("recite-aloud", {"lines": 10, "pause_s": 0.3})
    await until("both run", lambda: noted(one, 2))
    await until("output", lambda: streaming.of(ToolProgress, text))
    await one.end(signal.SIGKILL)
    read = (await snapshot(tape, streaming.conversation)).runs["r"].calls[text]
    assert (read.status, read.output[:7]) == ("running", "line 0\n")
    other = await workers()
    result = await asked.result(call, limits.ACK_WAIT_S + 5)
    unknown = await risky.result(effect, limits.ACK_WAIT_S + 5)
    assert (result.outcome, result.content) == ("ok", "done")
    assert unknown.outcome == "unknown"
    assert sorted(other.noted()) == [f"again {call} 1", f"again {call} 2", f"once {effect} 1"]
    attempts = [started.attempt for started in await asked.of(ToolStarted, call)]
    assert attempts == [1, 2]
    whole = (await streaming.result(text, limits.ACK_WAIT_S + 5)).content
    assert "".join(event.text for event in await streaming.of(ToolProgress, text)) == read.output + whole
    records = await tape.read(streaming.conversation)
    shown = [fold(records[:number]).runs["r"].calls[text].output for number in range(5, len(records))]
    assert all(whole.startswith(output) for output in shown), "what a lost attempt put out does not double it"
    assert shown[-1] == whole


async def test_what_a_version_began_that_must_not_run_twice_no_other_runs_again(tape: Tape, workers: Start) -> None:
    one = await workers()
    asked = Asked(tape)
    (call,) = await asked.call("revised", {"seconds": 60})
    await until("it runs", lambda: noted(one, 1))
    await one.end(signal.SIGKILL)
    other = await workers(env={"TOOLBOX_REVISED": "1"})
    offered = {offer.tool.idempotent for offer in await Registry(tape).offers() if offer.tool.name == "revised"}
    assert offered == {False, True}, "the killed worker's offer is still there"
    assert (await asked.result(call, 2 * limits.ACK_WAIT_S)).outcome == "unknown"
    assert other.noted() == [f"revised {call} 1"]


async def test_a_paused_worker_adds_nothing_when_it_comes_back(tape: Tape, workers: Start) -> None:
    zombie = await workers()
    asked = Asked(tape)
    (call,) = await asked.call("once", {"seconds": 1})
    await until("it runs", lambda: noted(zombie, 1))
    zombie.process.send_signal(signal.SIGSTOP)
    await workers()
    assert (await asked.result(call, limits.ACK_WAIT_S + 5)).outcome == "unknown"
    zombie.process.send_signal(signal.SIGCONT)
    sentinel = Asked(tape)
    await until("it has looked", lambda: said(zombie, "overtaken"))
    (other,) = await sentinel.call("add", {"a": 1, "b": 1})
    await sentinel.result(other)
    assert (await asked.result(call)).outcome == "unknown"


async def test_a_busy_worker_keeps_no_call_that_an_idle_one_could_run(tape: Tape, workers: Start) -> None:
    busy = await workers()
    asked = [Asked(tape) for _ in range(12)]  # in all shards, from each of which the worker fetches
    (first,) = await asked[0].call("alone", {"seconds": 60})
    await until("it is busy", lambda: noted(busy, 1))
    others = [(one, (await one.call("alone", {"seconds": 0}))[0]) for one in asked[1:]]
    await workers()
    for one, call in others:
        assert (await one.result(call)).outcome == "ok"
    assert await asked[0].of(ToolResult, first) == []


async def test_a_worker_that_is_ended_hands_its_calls_over(tape: Tape, workers: Start) -> None:
    one = await workers()
    registry = Registry(tape)
    assert "add" in await registry.offered()
    asked, risky, short, stubborn = Asked(tape), Asked(tape), Asked(tape), Asked(tape)
    (call,) = await asked.call("again", {"seconds": 60})
    (effect,) = await risky.call("once", {"seconds": 60})
    (brief,) = await short.call("once", {"seconds": 2})
    (forever,) = await stubborn.call("stubborn", {"seconds": 60})
    await until("all run", lambda: noted(one, 4))
    ending = asyncio.create_task(one.end())
    await until("withdrawn", lambda: nothing_offered(registry), limits.DRAIN_S)
    await workers()
    assert await ending == 0
    assert (await short.result(brief)).outcome == "ok", "it had time to end"
    assert [event.outcome for event in await risky.of(ToolResult, effect)] == ["unknown"], "before it ended"
    assert [event.outcome for event in await stubborn.of(ToolResult, forever)] == ["unknown"]
    result = await asked.result(call, limits.ACK_WAIT_S / 2)
    assert (result.outcome, result.content) == ("ok", "done")
    assert [started.attempt for started in await asked.of(ToolStarted, call)] == [1, 2]


async def test_consumers_that_are_deleted_come_back_and_repeat_nothing(tape: Tape, workers: Start) -> None:
    worker = await workers()
    before, running = Asked(tape), Asked(tape)
    (call,) = await before.call("add", {"a": 1, "b": 1})
    await before.result(call)
    (long,) = await running.call("once", {"seconds": limits.REGISTRY_REFRESH_S + 3})
    await running.started(long)
    for shard in range(tape.deployment.shards):
        for tool in ("add", "once"):
            await api(tape.nc, f"CONSUMER.DELETE.{subjects.stream(shard)}.{subjects.tool_consumer(tool)}")
    after = Asked(tape)
    (other,) = await after.call("add", {"a": 1, "b": 1})
    assert (await after.result(other)).outcome == "ok"
    assert (await running.result(long)).outcome == "ok", "delivered again, it was known to be at work"
    assert f"{2 * tape.deployment.shards} consumers were gone" in worker.said()
    assert (await before.result(call)).outcome == "ok"
    assert len(worker.noted()) == 3


async def test_a_result_waits_for_a_server_that_is_away(tmp_path: Path, workers: Start) -> None:
    server = EmbeddedNats(tmp_path / "other")
    server.start()
    try:
        nc = await connect(server.url, "provision")
        await provision.apply(nc, Deployment())
        await nc.close()
        tape = await Tape.open(server.url, "test")
        worker = await workers(url=server.url)
        asked, later = Asked(tape), Asked(tape)
        (call,) = await asked.call("both_ends", {"seconds": 2})
        await until("it runs", lambda: noted(worker, 1))
        server.kill()
        await until("it has ended", lambda: noted(worker, 2))
        server.start()
        assert (await asked.result(call)).outcome == "ok"
        assert worker.noted() == [f"begun {call} 1", f"ended {call} 1"]
        (other,) = await later.call("add", {"a": 1, "b": 1})
        assert (await later.result(other)).outcome == "ok", "calls flow again"
        await tape.close()
        server.kill()
        await until("it has noticed", lambda: lost(worker, 2))
        assert await worker.end() == 0, f"it ends in order without a server too: {worker.said()}"
    finally:
        server.stop()


async def test_what_is_no_call_becomes_a_dead_letter(tape: Tape, workers: Start) -> None:
    await workers()
    subject = tape.subject("poisoned", subjects.call("add"))
    seq = await tape.put(subject, b"{not json")
    (dead,) = await until("dead letter", lambda: tape.stored(subjects.DEAD, subjects.dead("tools")))
    assert dead.data == b"{not json"
    assert (dead.headers["Tapeline-Subject"], dead.headers["Tapeline-Sequence"]) == (subject, str(seq))
    asked = Asked(tape)
    (call,) = await asked.call("add", {"a": 1, "b": 1})
    assert (await asked.result(call)).outcome == "ok"


async def test_tools_come_and_go_while_the_worker_runs(nats_url: str, tape: Tape) -> None:
    def named(name: str) -> AnyTool:
        async def wait(seconds: float) -> str:
            await asyncio.sleep(seconds)
            return name

        return Tool(wait, name=name, max_concurrency=1)

    one, two = named("one"), named("two")
    worker, reader = ToolWorker(tape, [one], "", nats_url), Registry(tape)
    await worker.start()
    try:
        early, asked, waits = Asked(tape), Asked(tape), Asked(tape)
        (later,) = await early.call("two", {"seconds": 0})
        (running,) = await asked.call("one", {"seconds": 2})
        await asked.started(running)
        (waiting,) = await waits.call("one", {"seconds": 0})
        for _ in range(2):
            await worker.set_tools([two])
        assert (await early.result(later)).content == "two", "its call was waiting"
        await until("withdrawn", lambda: offers_only(reader, "two"))
        assert (await asked.result(running)).content == "one", "what ran has ended as usual"
        assert not await waits.of(ToolStarted, waiting), "and nothing more was taken"
        await worker.set_tools([one, two])
        assert (await waits.result(waiting)).content == "one"
        await until("back", lambda: offers_only(reader, "one", "two"))
        with pytest.raises(ConfigError, match="same name, one"):
            await worker.set_tools([one, named("one")])
    finally:
        await worker.stop()
    await until("nothing is left", lambda: nothing_offered(reader))


# Starting


@pytest.mark.parametrize(
    ("url", "module", "problem"),
    [
        ("", "tests.toolbox", "TAPELINE_NATS_URL is not set"),
        ("nats://127.0.0.1:9", "tests.toolbox", "cannot reach NATS"),
        ("nats://127.0.0.1:9", "tests.no_such_module", "no module tests.no_such_module"),
        ("nats://127.0.0.1:9", "tests.stack", "has no tools"),
        ("nats://127.0.0.1:9", "./tests/toolbox.py", "say it as an import does"),
    ],
)
async def test_a_wrong_setting_is_one_clear_line(workers: Start, url: str, module: str, problem: str) -> None:
    worker = await workers(module, ready=False, url=url)
    assert await worker.ended() == 78
    (line,) = worker.said().splitlines()
    assert problem in line


async def test_a_consumer_with_other_settings_is_refused(tape: Tape, workers: Start) -> None:
    assert await consumer.ensure(tape, "add", 0)
    stream, name = subjects.stream(0), subjects.tool_consumer("add")
    found = await api(tape.nc, f"CONSUMER.INFO.{stream}.{name}")
    changed = {"stream_name": stream, "config": found["config"] | {"ack_wait": 1_000_000_000}}
    await api(tape.nc, f"CONSUMER.CREATE.{stream}.{name}.{found['config']['filter_subject']}", changed)
    worker = await workers(ready=False)
    assert await worker.ended() == 78
    (line,) = worker.said().splitlines()
    assert "consumer tool_add of TAPE_0 has ack_wait" in line
    with pytest.raises(Refused, match="ack_wait"):
        await consumer.ensure(tape, "add", 0)


async def test_workers_may_make_a_consumer_at_once(tape: Tape) -> None:
    made = await asyncio.gather(*(consumer.ensure(tape, "add", 0) for _ in range(8)))
    assert sum(made) == 1


# The registry


async def test_the_offer_counts_that_was_taken_up_first(tape: Tape, monkeypatch: pytest.MonkeyPatch) -> None:
    def spec(kind: str) -> ToolSpec:
        return ToolSpec(
            name="add", description=kind, parameters={"type": "object", "properties": {"a": {"type": kind}}}
        )

    async def counting() -> tuple[str, int]:
        offer = (await reader.counting("add"))["add"]
        return offer.tool.description, offer.since

    old, new, newer, reader = (Registry(tape, name) for name in ("z-old", "b-new", "a-newer", "reader"))
    assert await old.announce([spec("integer")])
    place = await counting()
    assert await new.announce([spec("string")], ["add"])
    assert not await old.announce([spec("integer")]), "it keeps its place"
    assert await counting() == place
    assert await newer.announce([spec("integer")])
    await old.withdraw()
    assert (await counting())[0] == "integer", "whoever takes calls comes before whoever stands by"
    await newer.withdraw()
    assert (await counting())[0] == "string"
    assert await new.announce([spec("string")]), "to take calls is another offer"
    assert await old.announce([spec("integer")])
    assert (await counting())[0] == "string"
    monkeypatch.setattr(limits, "REGISTRY_TTL_S", 0)
    assert await new.announce([spec("string")]), "it has expired, so others may have come first"
    assert (await counting())[0] == "integer"


async def test_what_nobody_refreshes_is_no_longer_offered(tape: Tape) -> None:
    stream = f"KV_{subjects.REGISTRY}"
    found = (await api(tape.nc, f"STREAM.INFO.{stream}"))["config"]
    assert found["max_age"] == limits.REGISTRY_TTL_S * 1e9
    second = 1_000_000_000
    await api(tape.nc, f"STREAM.UPDATE.{stream}", found | {"max_age": second, "duplicate_window": second})
    registry = Registry(tape, "w")
    await registry.announce([ToolSpec(name="add", description="", parameters={"type": "object"})])
    assert "add" in await registry.offered()
    await until("expired", lambda: nothing_offered(registry), 5)


async def test_an_entry_that_cannot_be_read_hides_no_other(tape: Tape) -> None:
    await tape.put(f"$KV.{subjects.REGISTRY}.add.x", b"nonsense")
    registry = Registry(tape, "w")
    await registry.announce([ToolSpec(name="add", description="", parameters={"type": "object"})])
    assert list(await registry.offered()) == ["add"]


async def lost(worker: Worker, times: int) -> bool:
    return worker.said().count("connection lost") >= times


async def nothing_offered(registry: Registry) -> bool:
    return not await registry.offered()


async def offers_only(registry: Registry, *tools: str) -> bool:
    return tuple(await registry.offered()) == tools


def test_offers_agree_where_calls_of_one_may_go_to_the_other() -> None:
    one = ToolSpec(name="pay", description="", parameters={"type": "object"}, pool="one")
    assert one.agrees(structs.replace(one, description="Pays.", timeout_s=5, idempotent=True, pool="other"))
    assert not one.agrees(structs.replace(one, parameters={}))
    assert not one.agrees(structs.replace(one, needs_approval=True)), "else half of its calls would ask nobody"


# The decision


def state(call: dict[str, Any] | None, **run: Any) -> State:
    known: dict[str, Any] = {"call": "c", "tool": "add", "arguments": {}, "deadline": 1_000}
    calls = [CallState(**(known | call))] if call is not None else []
    step = StepState(step=1, attempt=1, event_id=3, finish="tool_calls", calls=calls)
    message = {"content": "go", "by": "", "ts": 0, "event_id": 2}
    return State(runs={"r": RunState(run="r", status="active", message=message, steps=[step], **run)})  # type: ignore[arg-type]


RUNNING = {"status": "running", "worker": "w", "attempt": 1, "delivery": 1, "idempotent": True}


@pytest.mark.parametrize(
    ("call", "run", "delivery", "idempotent", "expected"),
    [
        ({}, {}, 1, False, 1),
        ({}, {}, 5, False, 1),
        ({"status": "done", "outcome": "ok"}, {}, 2, True, Nothing(over=True)),
        (None, {}, 1, True, Nothing(over=True)),
        (RUNNING, {}, 1, True, Nothing(over=False)),
        (RUNNING | {"delivery": 3}, {}, 2, False, Nothing(over=False)),
        (RUNNING, {}, 2, True, 2),
        (RUNNING, {}, 2, False, "unknown"),
        (RUNNING | {"idempotent": False}, {}, 2, True, "unknown"),
        (RUNNING, {"stopped": True}, 2, False, "unknown"),
        (RUNNING, {"stopped": True}, 2, True, "stopped"),
        (RUNNING | {"attempt": limits.TOOL_ATTEMPTS_MAX, "delivery": 7}, {}, 8, True, "unknown"),
        ({}, {"stopped": True}, 1, False, "stopped"),
        ({}, {"ended_event_id": 9}, 1, False, "stopped"),
        ({"deadline": 500}, {}, 1, True, "timeout"),
        ({"needs_approval": True}, {}, 1, True, Nothing(over=True)),
        ({"needs_approval": True, "approved": False}, {}, 1, True, Nothing(over=True)),
        ({"needs_approval": True, "approved": True}, {}, 1, True, 1),
    ],
)
def test_what_a_worker_does_with_a_delivery(
    call: dict[str, Any] | None, run: dict[str, Any], delivery: int, idempotent: bool, expected: Any
) -> None:
    event = ToolCall(run="r", ts=0, step=1, attempt=1, call="c", tool="add", arguments={}, deadline=1_000)
    action = decide(state(call, **run), event, delivery, 500, idempotent=idempotent)
    match action:
        case Run(attempt=attempt):
            assert attempt == expected
        case Settle(outcome=outcome):
            assert outcome == expected
        case _:
            assert action == expected


def test_a_call_that_asked_nobody_is_not_run_by_a_version_that_must_ask() -> None:
    event = ToolCall(run="r", ts=0, step=1, attempt=1, call="c", tool="add", arguments={}, deadline=1_000)
    action = decide(state({}), event, 1, 500, idempotent=True, needs_approval=True)
    assert isinstance(action, Settle)
    assert action.outcome == "error"
    approved = state({"needs_approval": True, "approved": True})
    assert decide(approved, event, 1, 500, idempotent=True, needs_approval=True) == Run(
        approved.runs["r"].calls["c"], attempt=1
    )
