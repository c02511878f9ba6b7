"""Two hundred calls at once over three pools of different speeds, workers being killed at random all the while."""

from pathlib import Path

import pytest

from tests.bench.pools import POOLS, measure, report

CALLS = 200
KILLS = 2  # of each pool


@pytest.mark.timeout(240)
@pytest.mark.parametrize("seed", [51])
async def test_every_call_has_one_result_whichever_workers_are_killed(tmp_path: Path, seed: int) -> None:
    calls, pools = await measure(tmp_path, seed, CALLS, KILLS)
    print(f"seed {seed}\n{report(calls, pools.kills)}")
    assert len(calls) == CALLS
    assert dict(pools.kills) == dict.fromkeys(POOLS, KILLS)
    assert {call.outcome for call in calls if call.pool != "steady"} == {"ok"}, "these may be run again"
    assert {call.outcome for call in calls if call.pool == "steady"} <= {"ok", "unknown"}
    assert pools.twice() == []
