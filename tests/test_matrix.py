"""The kill matrix: each kind of process, killed in each phase of a run, by seeds; everything is judged afterwards.

Two dozen people talk at once and began at different moments, so that one kill meets runs in every phase. A bounded
sample; `scripts/soak` goes on for hours.
"""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tapeline import events, subjects
from tapeline.events import Event
from tapeline.record import Record

from tests.chaos import EDITED, KINDS, OUTPUTS, SAYINGS, world, wrong

PEOPLE = 14


@pytest.mark.parametrize("seed", [11])
async def test_any_process_killed_in_any_phase_loses_nothing_doubles_nothing_and_every_run_ends(
    tmp_path: Path, seed: int
) -> None:
    async with world(tmp_path, seed) as one:

        async def person(number: int) -> None:
            await asyncio.sleep(one.chance.uniform(0, 6))
            await one.use(f"p{number}", one.chance.sample(SAYINGS, 2))

        async def kills() -> None:
            for kind in one.chance.sample(KINDS, len(KINDS)):
                await asyncio.sleep(one.chance.uniform(0.3, 1.5))
                await one.fault(kind, "kill")

        async with asyncio.TaskGroup() as group:
            group.create_task(kills())
            for number in range(PEOPLE):
                group.create_task(person(number))
        await one.judge_effects()
    print(one.report)
    print(f"phases at a kill: {dict(one.report.phases)}")
    assert one.report.violations == [], one.report
    assert sum(one.report.runs.values()) == 2 * PEOPLE, one.report


# The oracle over what people decided and running tools say, for logs that promise what was not kept

CALL: dict[str, Any] = {"run": "r", "ts": 1, "call": "c"}
STEP: dict[str, Any] = {"run": "r", "ts": 1, "step": 1, "attempt": 1}
YES: dict[str, Any] = {"approved": True}
EDIT: dict[str, Any] = {"approved": True, "arguments": EDITED}
NO: dict[str, Any] = {"approved": False, "reason": "no"}
WALK = OUTPUTS["collatz"]

What = tuple[str, Event]


def said(decision: dict[str, Any]) -> What:
    return subjects.INPUT, events.Approval(**CALL, **decision)


def started(tool: str) -> What:
    return subjects.TOOL, events.ToolStarted(**CALL, tool=tool, worker="w")


def shows(text: str) -> What:
    return subjects.TOOL_DELTA, events.ToolProgress(**CALL, tool="collatz", text=text)


def ended(tool: str, content: Any = None) -> What:
    return subjects.TOOL, events.ToolResult(**CALL, tool=tool, outcome="ok", content=content)


LOTS, WALKS = started("draw_lots"), started("collatz")


@pytest.mark.parametrize(
    ("tool", "decision", "following", "found"),
    [
        ("draw_lots", EDIT, [said(EDIT), LOTS, ended("draw_lots", {"drawn": "wine"})], None),
        ("draw_lots", EDIT, [said(EDIT), LOTS, ended("draw_lots", {"drawn": "tea"})], "was run with"),
        ("draw_lots", EDIT, [said(YES)], "the person said"),
        ("draw_lots", YES, [], "nobody heard it"),
        ("draw_lots", YES, [said(YES), LOTS, LOTS], "starts, the person"),
        ("draw_lots", NO, [said(NO), LOTS], "starts, the person"),
        ("draw_lots", None, [LOTS], "starts, the person"),
        ("draw_lots", None, [said(YES)], "the person said None"),
        ("collatz", None, [WALKS, shows(WALK[:9]), WALKS, shows(WALK[:9]), shows(WALK[9:]), ended("collatz")], None),
        ("collatz", None, [WALKS, shows(WALK[:9]), shows(WALK)], "shows"),
        ("collatz", None, [WALKS, shows(WALK[:9]), WALKS, shows(WALK[9:])], "shows"),
        ("collatz", None, [WALKS, shows(WALK[:9]), ended("collatz")], "ended well, and had shown"),
    ],
)
def test_what_was_not_decided_or_not_said_is_found(
    tool: str, decision: dict[str, Any] | None, following: list[What], found: str | None
) -> None:
    asks = tool == "draw_lots"
    call = events.ToolCall(**STEP, call="c", tool=tool, arguments={"names": ["tea"]}, deadline=9, needs_approval=asks)
    log: list[What] = [
        (subjects.INPUT, events.Conversation(run="-", ts=1, owner="o")),
        (subjects.INPUT, events.Message(run="r", ts=1, content="?")),
        (subjects.MODEL, events.Step(**STEP, worker="w", trigger=2)),
        (subjects.MODEL, events.Answer(**STEP, finish="tool_calls")),
        (subjects.call(tool), call),
        *following,
    ]
    records = [
        Record(number, number - 1, subjects.chain(0, "c", kind), events.encode(event), {})
        for number, (kind, event) in enumerate(log, start=1)
    ]
    lines = list(wrong(records, {"c": decision} if asks else {}))
    assert found in lines[0] if found else lines == []
