"""Many readers of one edge: one that stalls, thousands that come and leave, all that lose their edge at once; and a
long conversation that is exported. Smaller than in `scripts/bench readers`, which reports figures for the same.
"""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.bench import readers
from tests.bench.readers import System


@pytest.fixture
async def system(tmp_path: Path) -> AsyncIterator[System]:
    async with readers.system(tmp_path) as system:
        yield system


async def test_one_who_stops_reading_costs_the_others_nothing_and_catches_up(system: System) -> None:
    # 12 MB, none of which may be kept for the one who does not take it.
    print(await readers.stalled(system, others=30, stall_s=12, rate=130, chars=8_000, growth_mib_max=8))


async def test_readers_who_come_and_leave_leave_nothing_behind(system: System) -> None:
    print(await readers.churned(system, count=1_000, wave=100))


@pytest.mark.parametrize("of_run", [False, True])
async def test_readers_who_lose_their_edge_at_once_are_whole_on_another(system: System, *, of_run: bool) -> None:
    print(await readers.storm(system, count=300, rate=20, of_run=of_run))


async def test_a_long_conversation_is_exported_whole(system: System) -> None:
    print(await readers.replayed(system, count=20_000, words=400))  # far more than may be held of it
