"""The whole system with people using it and processes being killed, and the oracles that judge what came of it:
one over each conversation's log, one over what its reader saw, one over what tools did outside.

Everything that is chosen is chosen by one seed. `tests/test_matrix.py` runs a bounded sample, `scripts/soak` hours.
"""

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import httpx
from tapeline import events
from tapeline.audit import violations

from tests.client import Client, Received, as_received, stored
from tests.stack import Process, Stack

RUN_S: Final = 90  # a run's deadline in these systems
LATE_S: Final = 45.0  # past it a run that has not ended counts as hanging
POLL_S: Final = 0.1

SAYINGS: Final = ("long 120", "parallel", "steps", "fail", "once and again", "hello", "long 400")
STOPS: Final = 0.15  # of all runs
KINDS: Final = ("inference", "tools", "toolbox", "edge", "nats")


@dataclass
class Report:
    """What happened."""

    seed: int
    faults: Counter[str] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)
    """What runs were doing when a process was killed."""
    runs: Counter[str] = field(default_factory=Counter)
    """How runs ended."""
    resumes: int = 0
    takeovers: int = 0
    stalls_s: list[float] = field(default_factory=list)
    """The longest silence in each run."""
    violations: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        stalls = sorted(self.stalls_s) or [0.0]
        at = [stalls[int(len(stalls) * part)] for part in (0.5, 0.9, 0.99)]
        return (
            f"seed {self.seed}: faults {sum(self.faults.values())} {dict(self.faults)}, "
            f"runs {sum(self.runs.values())} {dict(self.runs)}, resumes {self.resumes}, takeovers {self.takeovers}, "
            f"longest silence of a run p50 {at[0]:.1f} p90 {at[1]:.1f} p99 {at[2]:.1f} max {stalls[-1]:.1f} s, "
            f"violations {len(self.violations)}"
        )


class World:
    """The system under test: two of everything, or one that is there, whose `edges` people use."""

    def __init__(self, folder: Path, seed: int, stack: Stack | None = None, edges: Sequence[int] = (0, 1)) -> None:
        self.chance = random.Random(seed)
        self.report = Report(seed)
        self.journal = folder / "journal"
        self.journal.touch()
        self.edges = edges
        self.stack = stack or Stack(
            folder,
            {
                "TAPELINE_RUN_DEADLINE_S": str(RUN_S),
                "TAPELINE_DEMO_DELAY_MS": "10",
                "TOOLBOX_JOURNAL": str(self.journal),
            },
        )
        self.processes: dict[str, list[Process | None]] = {}
        self.doing: dict[str, str] = {}
        """What each run that is under way did last."""
        self._fault = asyncio.Lock()

    def start(self) -> None:
        """Starts everything."""
        self.stack.add_edge()
        self.stack.add_edge()
        for kind in ("inference", "tools", "toolbox"):
            self.processes[kind] = [self._start(kind) for _ in range(2)]

    def _start(self, kind: str) -> Process:
        if kind == "inference":
            return self.stack.start_inference()
        return self.stack.start_worker(module="tapeline.tools tests.toolbox" if kind == "toolbox" else "services.tools")

    # What is done to it

    async def fault(self, kind: str, how: str) -> None:
        """Kills (or ends, or stops for a while) one process of a kind, and starts it again."""
        number = self.chance.randrange(2)
        pause_s = self.chance.uniform(0, 1.5)
        frozen_s = self.chance.uniform(1, 14)
        async with self._fault:
            self.report.faults[f"{kind} {how}"] += 1
            self.report.phases.update(self.doing.values())
            if kind == "nats":
                await asyncio.to_thread(self.stack.nats.kill)
                await asyncio.sleep(pause_s / 3)
                await asyncio.to_thread(self.stack.nats.start)
            elif kind == "edge":
                await asyncio.to_thread(self.stack.kill_edge, number, _signal(how))
                await asyncio.sleep(pause_s)
                await asyncio.to_thread(self.stack.start_edge, number)
            elif how == "freeze":
                process = self.processes[kind][number]
                assert process is not None
                process.send(signal.SIGSTOP)
                await asyncio.sleep(frozen_s)
                process.send(signal.SIGCONT)
            else:
                process = self.processes[kind][number]
                assert process is not None
                await asyncio.to_thread(process.end, _signal(how))
                await asyncio.sleep(pause_s)
                self.processes[kind][number] = await asyncio.to_thread(self._start, kind)

    async def disturb(self, until: Callable[[], bool]) -> None:
        """One fault after the other."""
        while not until():
            await asyncio.sleep(self.chance.uniform(0.5, 4))
            kind = self.chance.choice(KINDS)
            hows = ["kill", "kill", "term"] + ["freeze"] * (kind not in ("edge", "nats"))
            await self.fault(kind, "kill" if kind == "nats" else self.chance.choice(hows))

    # Who uses it

    async def use(self, name: str, sayings: list[str], stops: float = STOPS) -> None:
        """One person, one conversation: says something, reads to its end wherever an edge answers, and is judged. May
        stop what was asked for, with this chance."""
        await self._asked("POST", "/v1/conversations", {"id": name}, done=(201, 409))
        seen: dict[str, list[Received]] = {}
        for number, saying in enumerate(sayings):
            path, key = f"/v1/conversations/{name}/messages", {"Idempotency-Key": f"{name}-{number}"}
            posted = (await self._asked("POST", path, {"content": saying}, done=(202,), headers=key)).json()
            run: str = posted["run"]
            stop_after = self.chance.randint(1, 60) if self.chance.random() < stops else None
            try:
                async with asyncio.timeout(RUN_S + LATE_S):
                    seen[run] = await self._read(name, run, posted["event_id"] - 1, stop_after)
            except TimeoutError:
                self.report.violations.append(f"{name}: {saying!r} did not end in time")
            finally:
                self.doing.pop(run, None)
        await self._judge(name, seen)

    async def _asked(
        self, method: str, path: str, body: object, *, done: tuple[int, ...], headers: dict[str, str] | None = None
    ) -> httpx.Response:
        """Asks one edge after the other until one has done it."""
        while True:
            async with Client(self._edge()) as client:
                try:
                    response = await client.http.request(method, path, json=body, headers=headers)
                except httpx.TransportError:
                    pass
                else:
                    if response.status_code in done:
                        return response
                    assert response.status_code == 503, response.text
            await asyncio.sleep(POLL_S)

    async def _read(self, conversation: str, run: str, cursor: int, stop_after: int | None) -> list[Received]:
        """The run to its end, resumed on whichever edge answers; stopped after so many events."""
        received: list[Received] = []
        silence_s, heard = 0.0, time.monotonic()
        while not received or received[-1].event not in ("done", "error"):
            after = received[-1].id if received else cursor
            async with Client(self._edge()) as client:
                try:
                    async with client.events(conversation, after, run=run) as stream:
                        while await stream.more():
                            fresh, stream.received = stream.received, []
                            if fresh:
                                silence_s, heard = max(silence_s, time.monotonic() - heard), time.monotonic()
                                received += fresh
                                self.doing[run] = fresh[-1].event
                            if stop_after is not None and len(received) >= stop_after:
                                stop_after = None
                                path = f"/v1/conversations/{conversation}/runs/{run}/stop"
                                await self._asked("POST", path, {}, done=(202,))
                except (httpx.TransportError, AssertionError) as error:
                    if isinstance(error, AssertionError) and not str(error).startswith("503"):
                        raise
                    await asyncio.sleep(POLL_S)
            self.report.resumes += 1
        self.report.resumes -= 1
        self.report.stalls_s.append(silence_s)
        return received

    def _edge(self) -> str:
        return self.stack.edge_url(self.chance.choice(self.edges))

    # What came of it

    async def _judge(self, conversation: str, seen: dict[str, list[Received]]) -> None:
        found = self.report.violations
        records = await stored(self.stack.nats.url, conversation)
        found += [f"{conversation}: {what}" for what in violations(records)]
        for run, received in seen.items():
            expected = as_received(records, run)
            end = next((n for n, one in enumerate(expected) if one.event in ("done", "error")), len(expected))
            if received != expected[: end + 1]:
                found.append(f"{conversation}: the reader of {run} saw {len(received)} events, not the log's {end + 1}")
        for record in records:
            match record.event():
                case events.Done(reason=reason):
                    self.report.runs[reason] += 1
                case events.Error(code=code):
                    self.report.runs[f"error {code}"] += 1
                case events.Step(supersedes=supersedes) if supersedes is not None:
                    self.report.takeovers += 1
                case _:
                    pass

    def judge_effects(self) -> None:
        """What a tool that is not idempotent did must not have been done twice."""
        did = Counter(line.split()[1] for line in self.journal.read_text().splitlines() if line.startswith("once "))
        self.report.violations += [f"call {call} took effect {times} times" for call, times in did.items() if times > 1]


def _signal(how: str) -> int:
    return signal.SIGTERM if how == "term" else signal.SIGKILL


@asynccontextmanager
async def world(folder: Path, seed: int) -> AsyncIterator[World]:
    """A system that runs, and ends whatever happens."""
    one = World(folder, seed)
    try:
        await asyncio.to_thread(one.start)
        yield one
    finally:
        await asyncio.to_thread(one.stack.stop)
