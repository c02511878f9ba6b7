"""`scripts/bench pools`: many calls at once over three pools of different speeds, whose workers are killed with calls
in their hands. Every call has one result, and no effect happens twice; how long they wait and run is reported by pool.

`tests/test_pools.py` runs the same.
"""

import argparse
import asyncio
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nats.aio.client import Client
from nats.aio.msg import Msg
from tapeline import subjects
from tapeline.connection import connect, listen
from tapeline.events import Done, ToolCall, ToolResult, ToolStarted
from tapeline.record import Record, record

from tests.client import Client as User
from tests.client import at_once, log_of
from tests.stack import POLL_S, Process, Stack

POOLS: Final = ("quick", "steady", "heavy")
WORKERS: Final = 2  # of each pool
ENDED_S: Final = 100.0
ASKING: Final = 50  # requests at a time
FAULT_S: Final = (0.05, 0.5)  # between two kills of one pool
QUIET_S: Final = 0.1  # by then the server has all that a frozen worker has said


@dataclass(frozen=True)
class Call:
    """What became of one call. `queue_ms` is from the model's asking to the first claim."""

    pool: str
    outcome: str
    attempts: int
    queue_ms: int
    duration_ms: int

    @property
    def lost(self) -> bool:
        """Whether a worker was lost with it."""
        return self.attempts > 1 or self.outcome == "unknown"


class Pools:
    """The system, two workers of each pool, and whoever kills them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.chance = random.Random(seed)
        self.journal = folder / "journal"
        self.journal.touch()
        self.stack = Stack(folder, {"PACES_JOURNAL": str(self.journal), "TAPELINE_MESSAGES_PER_MINUTE": "10000"})
        self.workers: dict[str, Process] = {}  # by pool and number, which is how their names begin in the log
        self.open: dict[str, str] = {}  # the claims that have no result yet, by call: whose
        self.kills: Counter[str] = Counter()

    def start(self) -> None:
        """Starts everything."""
        self.stack.start_inference()
        self.stack.start_inference()
        self.stack.add_edge()
        for pool in POOLS:
            for number in range(WORKERS):
                self._start(pool, f"{pool}-{number}")

    def _start(self, pool: str, name: str) -> None:
        self.workers[name] = self.stack.start_worker({"TAPELINE_POOL": name}, f"tapeline.tools tests.paces.{pool}")

    async def kill(self, times: int) -> None:
        """Kills so many workers of each pool at random moments, each with a call, and starts them again."""
        nc = await connect(self.stack.nats.url, "pools")
        try:
            await listen(nc, f"live.tape.*.*.{subjects.TOOL}", self._hear)
            async with asyncio.TaskGroup() as group:
                for pool in POOLS:
                    group.create_task(self._kill(nc, pool, times))
        finally:
            await nc.close()

    async def _kill(self, nc: Client, pool: str, times: int) -> None:
        for _ in range(times):
            await asyncio.sleep(self.chance.uniform(*FAULT_S))
            name = await self._caught(nc, pool)
            self.kills[pool] += 1
            self.open = {call: worker for call, worker in self.open.items() if worker != name}
            await asyncio.to_thread(self.workers[name].end, signal.SIGKILL)
            await asyncio.to_thread(self._start, pool, name)

    async def _caught(self, nc: Client, pool: str) -> str:
        """One of the pool's workers, frozen, with a call that it will never finish."""
        while True:
            if names := [name for name in self.open.values() if name.startswith(pool)]:
                name = self.chance.choice(names)
                self.workers[name].send(signal.SIGSTOP)
                await asyncio.sleep(QUIET_S)  # for what it has said just before
                await nc.flush()
                if name in self.open.values():
                    return name
                self.workers[name].send(signal.SIGCONT)
            await asyncio.sleep(POLL_S / 10)

    def _hear(self, message: Msg) -> None:
        match record(message).event():
            case ToolStarted(call=call, worker=worker):
                self.open[call] = worker.rpartition("-")[0]
            case ToolResult(call=call):
                self.open.pop(call, None)

    async def ask(self, count: int) -> list[Call]:
        """So many runs at once, each with a call of one of the pools, to their ends. Every log is whole."""
        names = [POOLS[number % len(POOLS)] for number in range(count)]
        async with User(self.stack.url) as client:
            asked = await at_once(ASKING, (client.ask(name) for name in names))
            async with asyncio.timeout(ENDED_S):
                await at_once(count, (client.run(*one) for one in asked))
        logs = await at_once(ASKING, (log_of(self.stack.nats.url, conversation) for conversation, _ in asked))
        return [_call(log) for log in logs]

    def twice(self) -> list[str]:
        """The calls whose effect happened more than once."""
        did = Counter(self.journal.read_text().split())
        return [call for call, times in did.items() if times > 1]


def _call(log: Sequence[Record]) -> Call:
    """The one call in this log, which has one result."""
    events = [record.event() for record in log]
    assert isinstance(events[-1], Done), events[-1]
    [asked] = [event for event in events if isinstance(event, ToolCall)]
    [result] = [event for event in events if isinstance(event, ToolResult)]
    started = [event for event in events if isinstance(event, ToolStarted)]
    return Call(asked.tool, result.outcome, len(started), started[0].ts - asked.ts, result.duration_ms)


def report(calls: Sequence[Call], kills: Counter[str]) -> str:
    """A table by pool."""
    lines = [
        "| pool | calls | kills | lost their worker | unknown | queue p50 / p99, ms | execution p50 / p99, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for pool in POOLS:
        own = [call for call in calls if call.pool == pool]
        cells = [
            pool,
            len(own),
            kills[pool],
            sum(call.lost for call in own),
            sum(call.outcome == "unknown" for call in own),
            _spread([call.queue_ms for call in own]),
            _spread([call.duration_ms for call in own if call.outcome == "ok"]),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _spread(values: Sequence[int]) -> str:
    ordered = sorted(values)
    return " / ".join(f"{ordered[int(len(ordered) * part)]:,}" for part in (0.5, 0.99))


async def measure(folder: Path, seed: int, count: int, kills: int) -> tuple[list[Call], Pools]:
    """The whole scenario: `kills` workers of each pool are killed while so many calls are made, and more where they
    have not been caught with one by then."""
    pools = Pools(folder, seed)
    try:
        await asyncio.to_thread(pools.start)
        killing = asyncio.create_task(pools.kill(kills))
        calls = await pools.ask(count)
        while not killing.done():
            calls += await pools.ask(ASKING)
        await killing
    finally:
        await asyncio.to_thread(pools.stack.stop)
    return calls, pools


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--kills", type=int, default=3, help="workers killed of each pool")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    given = parser.parse_args()
    print(f"seed {given.seed}")
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        calls, pools = asyncio.run(measure(Path(folder), given.seed, given.calls, given.kills))
        took_s = time.monotonic() - began
        print(report(calls, pools.kills))
        print(f"{len(calls)} calls, one result each, {len(pools.twice())} effects twice, {took_s:.0f} s")


if __name__ == "__main__":
    main()
