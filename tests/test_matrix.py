"""The kill matrix: each kind of process, killed in each phase of a run, by seeds; everything is judged afterwards.

Two dozen people talk at once and began at different moments, so that one kill meets runs in every phase. A bounded
sample; `scripts/soak` goes on for hours.
"""

import asyncio
from pathlib import Path

import pytest

from tests.chaos import KINDS, SAYINGS, world

PEOPLE = 14


@pytest.mark.timeout(240)
@pytest.mark.parametrize("seed", [11, 12])
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
        one.judge_effects()
    print(one.report)
    print(f"phases at a kill: {dict(one.report.phases)}")
    assert one.report.violations == [], one.report
    assert sum(one.report.runs.values()) == 2 * PEOPLE, one.report
