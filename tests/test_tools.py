"""The tool worker as a real process on a real server: one result per call, whatever happens to the worker."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from tapeline import limits, provision, subjects
from tapeline.append import Chain
from tapeline.connection import Refused, api, connect
from tapeline.events import (
    Answer,
    AnswerCall,
    Conversation,
    Done,
    Event,
    Message,
    Step,
    Stop,
    ToolCall,
    ToolEvent,
    ToolProgress,
    ToolResult,
    ToolStarted,
)
from tapeline.fold import CallState, RunState, State, StepState, fold
from tapeline.registry import Registry, ToolSpec
from tapeline.tape import Deployment, Tape
from tapeline.tools import consumer
from tapeline.tools.decision import Nothing, Run, Settle, decide

from services.embedded import EmbeddedNats
from tests.stack import ROOT

WAIT_S = 15.0


def now_ms() -> int:
    return time.time_ns() // 1_000_000


async def until(what: str, look: Callable[[], Awaitable[Any]], timeout_s: float = WAIT_S) -> Any:
    """Looks again and again until there is something to see."""
    give_up = time.monotonic() + timeout_s
    while not (seen := await look()):
        assert time.monotonic() < give_up, f"{what}: not within {timeout_s} s"
        await asyncio.sleep(0.02)
    return seen


class Asked:
    """One run that calls tools, as inference would write it."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.conversation = uuid4().hex
        self.chain = Chain(tape, self.conversation, 0, ends=lambda _: False)

    async def call(self, tool: str, arguments: Any, timeout_s: float = 60.0, *, calls: int = 1) -> list[str]:
        """Begins the run and calls the tool, or several of it at once; their ids."""
        ids = [uuid4().hex for _ in range(calls)]
        now = now_ms()
        asked = [AnswerCall(call=call, tool=tool, arguments=arguments) for call in ids]
        deadline = now + int(timeout_s * 1000)
        of_step: dict[str, Any] = {"run": "r", "ts": now, "step": 1, "attempt": 1}
        await self.chain.commit(
            [
                (subjects.INPUT, Conversation(run="-", ts=now, owner="local")),
                (subjects.INPUT, Message(run="r", ts=now, content="go")),
                (subjects.MODEL, Step(**of_step, worker="test", trigger=2)),
                (subjects.MODEL, Answer(**of_step, finish="tool_calls", calls=asked)),
                *(
                    (
                        subjects.call(tool),
                        ToolCall(**of_step, call=call, tool=tool, arguments=arguments, deadline=deadline),
                    )
                    for call in ids
                ),
            ]
        )
        return ids

    async def append(self, kind: str, event: Event) -> None:
        await self.chain.append(kind, event)

    async def events(self) -> list[Any]:
        return [record.event() for record in await self.tape.read(self.conversation)]

    async def of(self, kind: type[ToolEvent], call: str) -> list[Any]:
        return [event for event in await self.events() if isinstance(event, kind) and event.call == call]

    async def started(self, call: str, timeout_s: float = WAIT_S) -> ToolStarted:
        found = await until("tool_started", lambda: self.of(ToolStarted, call), timeout_s)
        started: ToolStarted = found[0]
        return started

    async def result(self, call: str, timeout_s: float = WAIT_S) -> ToolResult:
        found = await until("tool_result", lambda: self.of(ToolResult, call), timeout_s)
        assert len(found) == 1, found
        result: ToolResult = found[0]
        return result


class Worker:
    """`python -m tapeline.tools` as a process."""

    def __init__(self, folder: Path, nats_url: str) -> None:
        self.folder = folder
        self.nats_url = nats_url
        self.process: asyncio.subprocess.Process | None = None

    @property
    def journal(self) -> Path:
        return self.folder / "journal"

    def noted(self) -> list[str]:
        return self.journal.read_text().splitlines() if self.journal.exists() else []

    async def start(self, *modules: str, ready: bool = True) -> "Worker":
        env = {key: value for key, value in os.environ.items() if not key.startswith(("TAPELINE_", "OTEL_"))}
        if self.nats_url:
            env["TAPELINE_NATS_URL"] = self.nats_url
        with (self.folder / f"worker-{uuid4().hex}.log").open("wb") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "tapeline.tools", *(modules or ("tests.toolbox",))),
                cwd=ROOT,
                env=env | {"TOOLBOX_JOURNAL": str(self.journal)},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )
        assert self.process.stdout is not None
        if ready:
            async with asyncio.timeout(WAIT_S):
                line = (await self.process.stdout.readline()).decode()
            assert line.startswith("tools ready: "), line + self.said()
        return self

    def said(self) -> str:
        return "".join(log.read_text() for log in self.folder.glob("worker-*.log"))

    async def end(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        if self.process.returncode is None:
            self.process.send_signal(number)
        async with asyncio.timeout(WAIT_S):
            return await self.process.wait()


@pytest.fixture
async def workers(tmp_path: Path, nats_url: str) -> AsyncIterator[Callable[..., Awaitable[Worker]]]:
    """Starts workers, and kills those that are left."""
    started: list[Worker] = []

    async def start(*modules: str, ready: bool = True, url: str = nats_url) -> Worker:
        started.append(Worker(tmp_path, url))
        return await started[-1].start(*modules, ready=ready)

    yield start
    for worker in started:
        await worker.end(signal.SIGKILL)


Start = Callable[..., Awaitable[Worker]]


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
    one, other = await workers(), await workers()
    runs = [Asked(tape) for _ in range(10)]
    calls = await asyncio.gather(*(asked.call("add", {"a": 1, "b": 1}, calls=5) for asked in runs))
    for asked, ids in zip(runs, calls, strict=True):
        for call in ids:
            assert (await asked.result(call)).content == 2
    assert len(one.noted()) == 50, "each has run once"
    assert one.journal == other.journal


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
    (call,) = await asked.call("count", {"to": 50, "pause_s": 0.02})
    result = await asked.result(call)
    assert (result.outcome, result.content) == ("ok", 50)
    told = await asked.of(ToolProgress, call)
    fractions = [event.fraction for event in told]
    assert fractions == sorted(fractions)
    assert 2 <= len(told) <= result.duration_ms / 1000 / limits.PROGRESS_INTERVAL_S + 1, "the newest, now and then"
    assert told[0].message == "1 of 50"


@pytest.mark.parametrize(("tool", "seconds"), [("once", 30), ("stuck", 5)])
async def test_a_call_ends_at_its_deadline(tape: Tape, workers: Start, tool: str, seconds: float) -> None:
    await workers()
    asked = Asked(tape)
    (call,) = await asked.call(tool, {"seconds": seconds}, timeout_s=1)
    result = await asked.result(call)
    assert (result.outcome, result.is_error) == ("timeout", True)
    assert 500 < result.duration_ms < 4_000


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
    asked, risky = Asked(tape), Asked(tape)
    (call,) = await asked.call("again", {"seconds": 60})
    (effect,) = await risky.call("once", {"seconds": 60})
    await until("both run", lambda: noted(one, 2))
    await one.end(signal.SIGKILL)
    other = await workers()
    result = await asked.result(call, limits.ACK_WAIT_S + 5)
    unknown = await risky.result(effect, limits.ACK_WAIT_S + 5)
    assert (result.outcome, result.content) == ("ok", "done")
    assert unknown.outcome == "unknown"
    assert sorted(other.noted()) == [f"again {call} 1", f"again {call} 2", f"once {effect} 1"]
    attempts = [started.attempt for started in await asked.of(ToolStarted, call)]
    assert attempts == [1, 2]


async def test_a_paused_worker_adds_nothing_when_it_comes_back(tape: Tape, workers: Start) -> None:
    zombie = await workers()
    assert zombie.process is not None
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
    await until("withdrawn", lambda: nothing_offered(registry), 3)
    await workers()
    assert await ending == 0
    assert (await short.result(brief)).outcome == "ok", "it had time to end"
    assert (await risky.result(effect, 1)).outcome == "unknown"
    assert (await stubborn.result(forever, 1)).outcome == "unknown"
    result = await asked.result(call, 2)
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
        (call,) = await asked.call("once", {"seconds": 2})
        await until("it runs", lambda: noted(worker, 1))
        server.kill()
        await asyncio.sleep(3)  # the tool ends meanwhile
        server.start()
        assert (await asked.result(call)).outcome == "ok"
        assert len(worker.noted()) == 1
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


# Starting


@pytest.mark.parametrize(
    ("url", "module", "problem"),
    [
        ("", "tests.toolbox", "TAPELINE_NATS_URL is not set"),
        ("nats://127.0.0.1:9", "tests.toolbox", "cannot reach NATS"),
        ("nats://127.0.0.1:9", "tests.no_such_module", "no module tests.no_such_module"),
        ("nats://127.0.0.1:9", "tests.stack", "has no tools"),
    ],
)
async def test_a_wrong_setting_is_one_clear_line(workers: Start, url: str, module: str, problem: str) -> None:
    worker = await workers(module, ready=False, url=url)
    assert worker.process is not None
    async with asyncio.timeout(WAIT_S):
        assert await worker.process.wait() == 78
    (line,) = worker.said().splitlines()
    assert problem in line


async def test_a_consumer_with_other_settings_is_refused(tape: Tape, workers: Start) -> None:
    assert await consumer.ensure(tape, "add", 0)
    stream, name = subjects.stream(0), subjects.tool_consumer("add")
    found = await api(tape.nc, f"CONSUMER.INFO.{stream}.{name}")
    changed = {"stream_name": stream, "config": found["config"] | {"ack_wait": 1_000_000_000}}
    await api(tape.nc, f"CONSUMER.CREATE.{stream}.{name}.{found['config']['filter_subject']}", changed)
    worker = await workers(ready=False)
    assert worker.process is not None
    async with asyncio.timeout(WAIT_S):
        assert await worker.process.wait() == 78
    (line,) = worker.said().splitlines()
    assert "consumer tool_add of TAPE_0 has ack_wait" in line
    with pytest.raises(Refused, match="ack_wait"):
        await consumer.ensure(tape, "add", 0)


async def test_workers_may_make_a_consumer_at_once(tape: Tape) -> None:
    made = await asyncio.gather(*(consumer.ensure(tape, "add", 0) for _ in range(8)))
    assert sum(made) == 1


# The registry


async def test_the_oldest_offer_of_a_tool_counts(tape: Tape, caplog: pytest.LogCaptureFixture) -> None:
    def spec(kind: str) -> ToolSpec:
        parameters = {"type": "object", "properties": {"a": {"type": kind}}}
        return ToolSpec(name="add", description=kind, parameters=parameters)

    old = Registry(tape, "z-old")
    await asyncio.sleep(0.002)
    new, reader = Registry(tape, "a-new"), Registry(tape)
    await new.announce([spec("string")])
    await old.announce([spec("integer")])
    assert (await reader.offered())["add"].description == "integer"
    assert "a-new" in caplog.text, "a conflict is told"
    await old.withdraw()
    await until("the new one counts", lambda: offers(reader, "string"), limits.REGISTRY_CACHE_S + 1)


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


async def noted(worker: Worker, lines: int) -> bool:
    return len(worker.noted()) >= lines


async def said(worker: Worker, words: str) -> bool:
    return words in worker.said()


async def lost(worker: Worker, times: int) -> bool:
    return worker.said().count("connection lost") >= times


async def nothing_offered(registry: Registry) -> bool:
    return not await registry.offered()


async def offers(registry: Registry, description: str) -> bool:
    return (await registry.offered())["add"].description == description


# The decision


def state(call: dict[str, Any] | None, **run: Any) -> State:
    known: dict[str, Any] = {"call": "c", "tool": "add", "arguments": {}, "deadline": 1_000}
    calls = [CallState(**(known | call))] if call is not None else []
    step = StepState(step=1, attempt=1, event_id=3, finish="tool_calls", calls=calls)
    message = {"content": "go", "by": "", "ts": 0, "event_id": 2}
    return State(runs={"r": RunState(run="r", status="active", message=message, steps=[step], **run)})  # type: ignore[arg-type]


RUNNING = {"status": "running", "worker": "w", "attempt": 1, "delivery": 1}


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
