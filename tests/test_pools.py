"""Two hundred calls at once over three pools of different speeds, workers being killed in the middle of them."""

from pathlib import Path

import pytest

from tests.bench.pools import POOLS, measure, report

CALLS = 200
KILLS = 2  # of each pool


@pytest.mark.parametrize("seed", [51])
async def test_every_call_has_one_result_whichever_workers_are_killed(tmp_path: Path, seed: int) -> None:
    calls, pools = await measure(tmp_path, seed, CALLS, KILLS)
    print(f"seed {seed}\n{report(calls, pools.kills)}")
    for pool in POOLS:
        assert any(call.lost for call in calls if call.pool == pool), f"no kill has met a call of {pool}"
    assert {call.outcome for call in calls if call.pool != "steady"} == {"ok"}, "these may be run again"
    assert {call.outcome for call in calls if call.pool == "steady"} <= {"ok", "unknown"}
    assert pools.twice() == []
