"""Tools that misbehave, that are asked for too often, and that are upgraded, in real workers."""

import asyncio
import os
import signal
import time
from typing import Any

from tapeline import limits, subjects
from tapeline.clock import now_ms
from tapeline.events import Stop, ToolProgress, ToolResult, ToolStarted
from tapeline.registry import Registry
from tapeline.tape import Tape

from tests import PATIENT_S
from tests.stack import until
from tests.workers import Asked, Start, said

BAD = "tests.bad_tools"
SECRET = "hunter2"


def nested(levels: int) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for _ in range(levels):
        tree = {"in": tree}
    return tree


CASES: list[tuple[str, Any, str, str]] = [
    ("never", {}, "timeout", "did not end in time"),
    ("never_async", {}, "timeout", "did not end in time"),
    ("never_in_a_process", {}, "timeout", "did not end in time"),
    *[("never_json", {}, "timeout", "has ended, but what it returned did not become JSON in time")] * 3,
    ("weigh", {"load": {"kg": 1}}, "timeout", "did not end in time"),
    ("weigh_in_a_process", {"load": {"kg": 1}}, "timeout", "did not end in time"),
    ("exit_in_a_process", {"code": 3}, "error", "its process ended with exit code 3"),
    ("exit_in_a_process", {"code": 0}, "error", "its process ended with exit code 0"),
    ("crash_in_a_process", {}, "error", "its process was killed by SIGSEGV"),
    ("leak_in_a_process", {}, "error", "the tool leak_in_a_process failed: RuntimeError"),
    ("leak", {}, "error", "the tool leak failed: RuntimeError"),
    *(("give", {"what": what}, "error", "not JSON") for what in ("nan", "bytes", "circle", "object", "surrogate")),
    ("exit_in_a_process", {}, "error", "missing required field `code`"),
    ("exit_in_a_process", {"code": "3"}, "error", "Expected `int`, got `str`"),
    ("take", {"tree": {}, "more": 1}, "error", "unknown field `more`"),
    ("take", {"tree": "x" * 300_000}, "error", "Expected `object`, got `str`"),
    ("take", {"tree": {"x": "y" * 300_000}}, "ok", ""),
    ("take", {"tree": nested(60)}, "ok", ""),
    ("take", nested(60), "error", "unknown field `in`"),
]


async def test_what_a_bad_tool_does_is_one_result_and_the_worker_lives(tape: Tape, workers: Start) -> None:
    worker = await workers(BAD)
    runs = [Asked(tape) for _ in CASES]
    slow = 6.0  # for the tools that never return, one of which notes that its process has started
    calls = [
        (await asked.call(tool, arguments, slow if outcome == "timeout" else 30))[0]
        for asked, (tool, arguments, outcome, _) in zip(runs, CASES, strict=True)
    ]
    for asked, call, (tool, _, outcome, words) in zip(runs, calls, CASES, strict=True):
        result = await asked.result(call, 30)
        assert result.outcome == outcome, (tool, result)
        assert words in result.message, tool
        assert SECRET not in repr([record.data for record in await tape.read(asked.conversation)])
    assert worker.said().count(f"RuntimeError: password {SECRET}") == 2, "the log has it"
    (line,) = [line for line in worker.noted() if line.startswith("pid ")]
    await until("the process is gone", lambda: is_gone(int(line.split()[1])))

    stopped, last = Asked(tape), Asked(tape)
    (beating,) = await stopped.call("pulse", {})
    await until("progress from a process", lambda: stopped.of(ToolProgress, beating))
    await stopped.append(subjects.INPUT, Stop(run="r", ts=now_ms()))
    result = await stopped.result(beating, limits.TOOL_GRACE_S / 2)
    assert (result.outcome, result.content) == ("stopped", "stopped")
    assert f"pulse {beating}: heard from a process" in worker.said()
    (call,) = await last.call("add", {"a": 1, "b": 1})
    assert (await last.result(call)).content == 2
    assert worker.process.poll() is None


async def test_a_tool_that_blocks_the_loop_stops_no_other_kind_and_then_its_worker(tape: Tape, workers: Start) -> None:
    worker = await workers(BAD, env={"TOOL_LOOP_BLOCKED_S": "8"})
    blocks, ticks, beats, waits, adds = (Asked(tape) for _ in range(5))
    (ticking,) = await ticks.call("tick", {"seconds": 5})
    (beating,) = await beats.call("pulse", {})
    await until("both are at it", lambda: both(ticks.of(ToolProgress, ticking), beats.of(ToolProgress, beating)))
    (blocking,) = await blocks.call("block_the_loop", {"seconds": 60}, timeout_s=1.5)
    claim = await blocks.started(blocking)
    (waiting,) = await waits.call("be_quick", {}, timeout_s=1)
    assert (await waits.result(waiting)).outcome == "timeout"
    timed_out = await blocks.result(blocking)
    assert timed_out.outcome == "timeout"
    (adding,) = await adds.call("add", {"a": 1, "b": 1})
    assert (await adds.result(adding)).content == 2, "while it is blocked"
    assert (await ticks.result(ticking)).content == "done"
    said_at = [event.ts for event in await ticks.of(ToolProgress, ticking)]
    assert [ts for ts in said_at if claim.ts < ts < timed_out.ts], "what another says is told meanwhile"
    await until("a warning", lambda: said(worker, "a tool blocks the async tools' event loop"))
    assert f"block_the_loop {blocking}, at " in worker.said()
    assert "bad_tools.py" in worker.said()
    assert "in block_the_loop: time.sleep(seconds)" in worker.said()
    assert await worker.ended(8 + limits.DRAIN_S + 5) == 70
    last = worker.said().splitlines()[-1]
    assert last.startswith("tools: the async tools' event loop has been blocked for 8 s (tool block_the_loop")
    assert (await beats.result(beating)).outcome == "unknown", "it drained"


async def test_a_tool_that_never_ends_has_its_places_and_no_more_and_then_its_worker_makes_way(
    tape: Tape, workers: Start
) -> None:
    worker = await workers(BAD, env={"TOOL_STUCK_S": "4"})
    runs = [Asked(tape) for _ in range(4)]
    calls = [(await asked.call("never_twice", {}, timeout_s=2))[0] for asked in runs[:2]]
    for asked, call in zip(runs, calls, strict=False):
        assert (await asked.result(call)).outcome == "timeout"
    (waiting,) = await runs[2].call("never_twice", {})
    (adding,) = await runs[3].call("add", {"a": 1, "b": 1})
    assert (await runs[3].result(adding)).content == 2
    assert await worker.ended(4 + limits.DRAIN_S + 15) == 70
    assert worker.said().splitlines()[-1].startswith("tools: tool never_twice: calls of it do not end")
    assert not await runs[2].of(ToolStarted, waiting), "there was no place for it"
    await workers(BAD)
    await runs[2].started(waiting)


async def test_a_tool_that_ends_its_worker_does_so_three_times_at_most(tape: Tape, workers: Start) -> None:
    started = await asyncio.gather(*(workers(BAD) for _ in range(limits.TOOL_ATTEMPTS_MAX + 2)))
    asked, risky = Asked(tape), Asked(tape)
    (call,) = await asked.call("end_the_worker", {}, 80)
    (effect,) = await risky.call("end_the_worker_once", {}, 80)
    within_s = limits.TOOL_ATTEMPTS_MAX * limits.ACK_WAIT_S + 10
    result = await asked.result(call, within_s)
    assert (result.outcome, "lost 3 workers" in result.message) == ("unknown", True)
    assert (await risky.result(effect)).outcome == "unknown"
    noted = started[0].noted()
    firsts = {f"end {call} 1", f"once {effect} 1"} & set(noted)
    assert firsts, "either may have gone with the other before it was run, but not both"
    assert sorted(noted) == sorted([*firsts, f"end {call} 2", f"end {call} 3"])


async def test_a_tool_that_is_flooded_keeps_no_other_waiting(tape: Tape, workers: Start) -> None:
    await workers(BAD)
    floods = [Asked(tape) for _ in range(20)]
    hogs = [(asked, call) for asked in floods for call in await asked.call("hog", {"seconds": 15}, calls=10)]
    took_ms = []
    for _ in range(10):
        asked = Asked(tape)
        (call,) = await asked.call("add", {"a": 1, "b": 1})
        began = time.monotonic()
        await asked.result(call)
        took_ms.append(round((time.monotonic() - began) * 1000))
        narrows = Asked(tape)
        for narrow in await narrows.call("narrow", {}, calls=4):
            assert (await narrows.result(narrow)).content <= 2
    done = sum([len(await asked.of(ToolResult, call)) for asked, call in hogs])
    assert done < len(hogs), "the flood was over, so this was no test"
    print(f"beside {len(hogs)} slow calls, {done} of them done, another tool took {sorted(took_ms)} ms")
    assert sorted(took_ms)[len(took_ms) // 2] < 5_000, "less than it takes until a slow one makes room"


# Pools and upgrades


async def test_pools_share_a_tool_and_disagree_about_none(tape: Tape, workers: Start) -> None:
    await workers("tests.greeter", env={"TAPELINE_POOL": "one"})
    await workers("tests.greeter", env={"TAPELINE_POOL": "other"})
    runs = [Asked(tape) for _ in range(30)]
    calls = await asyncio.gather(*(asked.call("greet", {"name": "Ann"}) for asked in runs))
    for asked, (call,) in zip(runs, calls, strict=True):
        assert (await asked.result(call)).content == ["1", "Hi Ann"]
    claims = [await asked.started(call) for asked, (call,) in zip(runs, calls, strict=True)]
    assert {claim.worker.partition("-")[0] for claim in claims} == {"one", "other"}

    for pool, other in (("tests-greeter", "one"), ("one", "other"), ("other", "one")):
        named = {} if pool == "tests-greeter" else {"TAPELINE_POOL": pool}
        refused = await workers("tests.greeter", env=named | {"GREETER": "2"}, ready=False)
        assert await refused.ended() == 78
        lines = [line for line in refused.said().splitlines() if f"so pool {pool} cannot" in line]
        assert len(lines) == 1
        assert lines[0].startswith(f"tools: tool greet: pool {other} serves it with another schema")
    asked = Asked(tape)
    (call,) = await asked.call("greet", {"name": "Bo"})
    assert (await asked.result(call)).content == ["1", "Hi Bo"]
    assert list(await Registry(tape).offered()) == ["greet"], "nothing is left of the one that was refused"


async def test_a_rolling_upgrade_runs_no_call_by_the_wrong_version(tape: Tape, workers: Start) -> None:
    old = [await workers("tests.greeter", env={"TAPELINE_POOL": "greeters"}) for _ in range(2)]
    registry, asked_of = Registry(tape), list[tuple[Asked, str, bool]]()
    over = asyncio.Event()

    async def ask() -> None:
        while not over.is_set():
            properties = (await registry.offered())["greet"].parameters["properties"]
            polite = "polite" in properties
            asked = Asked(tape)
            (call,) = await asked.call("greet", {"name": "Ann", "polite": True} if polite else {"name": "Ann"})
            asked_of.append((asked, call, polite))
            await asyncio.sleep(0.02)

    asking = asyncio.create_task(ask())
    new = [await workers("tests.greeter", env={"TAPELINE_POOL": "greeters", "GREETER": "2"}) for _ in range(2)]
    assert new[0].said().count("serves it with another schema; standing by") == 2
    assert new[0].ready == "tools ready: wave; standing by: greet\n"
    other = Asked(tape)
    (call,) = await other.call("wave", {})
    assert (await other.result(call)).content == "waves", "it serves its other tools meanwhile"
    assert await old[0].end() == 0
    before = len(asked_of)
    await until("calls go on with one", lambda: more(asked_of, before + 20))
    ended_ms = now_ms()
    await old[1].end()
    await until("the new schema", lambda: is_polite(registry))
    before = len(asked_of)
    await until("calls go on", lambda: more(asked_of, before + 20))
    over.set()
    await asking

    versions: list[str] = []
    first_ms = 0
    for asked, call, polite in asked_of:
        result = await asked.result(call)
        assert result.outcome == "ok", result
        (claim,) = await asked.of(ToolStarted, call)
        version, words = result.content
        versions.append(version)
        assert words == ("Good morning, Ann" if polite else "Hi Ann")
        if version == "2":
            assert claim.ts >= ended_ms, "while an old worker served it, no new one did"
            first_ms = min(first_ms or claim.ts, claim.ts)
    assert {"1", "2"} == set(versions)
    print(f"{len(versions)} calls, {versions.count('2')} by the new version, {first_ms - ended_ms} ms after the old")
    assert first_ms - ended_ms < limits.REGISTRY_REFRESH_S * 1_000, "it was told, and did not find out"


async def test_the_new_version_takes_over_from_a_killed_worker_once_its_offer_has_expired(
    tape: Tape, workers: Start
) -> None:
    old = await workers("tests.greeter")
    await workers("tests.greeter", env={"GREETER": "2"})
    await old.end(signal.SIGKILL)
    asked = Asked(tape)
    (call,) = await asked.call("greet", {"name": "Ann"}, timeout_s=90)
    assert (await asked.result(call, limits.REGISTRY_TTL_S + PATIENT_S)).content == ["2", "Hi Ann"]


async def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


async def both(one: Any, other: Any) -> bool:
    return all(await asyncio.gather(one, other))


async def more(calls: list[Any], than: int) -> bool:
    return len(calls) > than


async def is_polite(registry: Registry) -> bool:
    offered = await registry.offered()
    return "greet" in offered and "polite" in offered["greet"].parameters["properties"]
