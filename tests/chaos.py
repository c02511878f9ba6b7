"""The whole system with people using it and processes being killed, and the oracles that judge what came of it:
over each conversation's log, over what its reader saw and decided, over what tools said, returned and did outside.

Everything that is chosen is chosen by one seed. `tests/test_matrix.py` runs a bounded sample, `scripts/soak` hours.
"""

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
from tapeline import events
from tapeline.events import ToolEvent, ToolProgress, ToolResult, ToolStarted
from tapeline.fold import State, fold
from tapeline.record import Record

from tests.client import Client, Received, as_received, judged, problem
from tests.mill import BALE_BYTES, FLOUR
from tests.stack import Process, Stack, until
from tests.toolbox import rows

RUN_S: Final = 90  # a run's deadline in these systems
LATE_S: Final = 45.0  # past it a run that has not ended counts as hanging
POLL_S: Final = 0.1

SAYINGS: Final = ("long 400", "parallel", "steps", "once and again", "approval", "stream", "grind and bale")
STOPS: Final = 0.15  # of all runs
AGAINS: Final = 0.25  # of all messages but a conversation's first: they take the place of one before
EDITED: Final = {"names": ["water", "wine"]}
DECISIONS: Final[tuple[dict[str, Any] | None, ...]] = (
    {"approved": True},
    {"approved": True, "arguments": EDITED},
    {"approved": False, "reason": "no"},
    None,  # stops the run instead
)
DECIDES_S: Final = 3.0  # that a person takes at most
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
        module = "tapeline.tools tests.toolbox tests.mill" if kind == "toolbox" else "services.tools"
        return self.stack.start_worker(module=module)

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
        """One person, one conversation: says something, or says it again, reads to its end wherever an edge answers,
        decides what it is asked, and is judged. May stop what was asked for, with this chance."""
        await self._asked("POST", "/v1/conversations", {"id": name}, done=201, heard=409)
        seen: dict[str, list[Received]] = {}
        decided: dict[str, dict[str, Any] | None] = {}
        for number, saying in enumerate(sayings):
            path, key = f"/v1/conversations/{name}/messages", {"Idempotency-Key": f"{name}-{number}"}
            body = {"content": saying}
            if seen and self.chance.random() < AGAINS:
                body["replaces"] = self.chance.choice([*seen])
            posted = (await self._asked("POST", path, body, done=202, headers=key)).json()
            run: str = posted["run"]
            stop_after = self.chance.randint(1, 60) if self.chance.random() < stops else None
            try:
                async with asyncio.timeout(RUN_S + LATE_S):
                    seen[run] = await self._read(name, run, posted["event_id"] - 1, stop_after, decided)
            except TimeoutError:
                self.report.violations.append(f"{name}: {saying!r} did not end in time")
            finally:
                self.doing.pop(run, None)
        await self._judge(name, seen, decided)

    async def _asked(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        done: int,
        heard: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> httpx.Response:
        """Asks one edge after the other until one has done it, or says by the status `heard` that one did before, whose
        answer was lost."""
        lost = False
        while True:
            async with Client(self._edge()) as client:
                try:
                    response = await client.http.request(method, path, json=body, headers=headers)
                except httpx.TransportError:
                    pass
                else:
                    if response.status_code == done or (lost and response.status_code == heard):
                        return response
                    assert response.status_code == 503, response.text
                lost = True
            await asyncio.sleep(POLL_S)

    async def _read(
        self,
        conversation: str,
        run: str,
        cursor: int,
        stop_after: int | None,
        decided: dict[str, dict[str, Any] | None],
    ) -> list[Received]:
        """The run to its end, resumed on whichever edge answers; stopped after so many events. What it asks is decided,
        unless it was stopped."""
        path = f"/v1/conversations/{conversation}/runs/{run}"
        stopped = False
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
                            if not stopped and stop_after is not None and len(received) >= stop_after:
                                stopped = True
                                await self._asked("POST", f"{path}/stop", {}, done=202)
                            for call in _asking(fresh):
                                if not stopped and call not in decided:
                                    decided[call] = await self._decide(path, call)
                                    stopped = decided[call] is None
                                    heard = time.monotonic()
                except (httpx.TransportError, AssertionError) as error:
                    if isinstance(error, AssertionError) and not str(error).startswith("503"):
                        raise
                    await asyncio.sleep(POLL_S)
            self.report.resumes += 1
        self.report.resumes -= 1
        self.report.stalls_s.append(silence_s)
        return received

    async def _decide(self, path: str, call: str) -> dict[str, Any] | None:
        """What a person said, after a while, about the call; None: that the run be stopped."""
        await asyncio.sleep(self.chance.uniform(0, DECIDES_S))
        decision = self.chance.choice(DECISIONS)
        if decision is None:
            await self._asked("POST", f"{path}/stop", {}, done=202)
            return None
        answer = await self._asked("POST", f"{path}/calls/{call}/approval", decision, done=202, heard=409)
        if answer.status_code == 409:
            said = problem(answer, 409, "already_decided")["detail"]
            assert ("approved" if decision["approved"] else "denied") in said, said
        return decision

    def _edge(self) -> str:
        return self.stack.edge_url(self.chance.choice(self.edges))

    # What came of it

    async def _judge(
        self,
        conversation: str,
        seen: dict[str, list[Received]],
        decided: Mapping[str, dict[str, Any] | None],
    ) -> None:
        found = self.report.violations
        records, broken = await judged(self.stack.nats.url, conversation)
        found += [f"{conversation}: {what}" for what in (*broken, *wrong(records, decided))]
        for run, received in seen.items():
            expected = as_received(records, run)
            end = next((n for n, one in enumerate(expected) if one.event in ("done", "error")), len(expected))
            if received != expected[: end + 1]:
                found.append(f"{conversation}: the reader of {run} saw {len(received)} events, not the log's {end + 1}")
        for record in records:
            match event := record.event():
                case events.Done(reason=reason):
                    self.report.runs[reason] += 1
                case events.Error(code=code):
                    self.report.runs[f"error {code}"] += 1
                case events.Step(supersedes=supersedes) if supersedes is not None:
                    self.report.takeovers += 1
                case ToolResult(tool="bale", outcome="ok"):
                    path = f"/v1/conversations/{conversation}/runs/{event.run}/calls/{event.call}/result"
                    answer = await self._asked("GET", path, done=200)
                    if event.stored is None or answer.json() != rows(BALE_BYTES):
                        found.append(f"{conversation}: the result of call {event.call} is not what its tool returned")
                case _:
                    pass

    async def judge_effects(self) -> None:
        """What a tool that is not idempotent did must not have been done twice, and no process be left behind."""
        lines = [line.split() for line in self.journal.read_text().splitlines()]
        did = Counter(call for word, call, *_ in lines if word == "once")
        self.report.violations += [f"call {call} took effect {times} times" for call, times in did.items() if times > 1]
        pids = [pid for word, pid, *_ in lines if word == "pid"]
        await until("the processes of tools have ended", lambda: not any(map(_is_forked, pids)))


def wrong(records: Iterable[Record], decided: Mapping[str, dict[str, Any] | None]) -> Iterable[str]:
    """What is not as it has to be of the calls a person was asked about, and of what running tools say."""
    state = State()
    asked: dict[str, Any] = {}
    """The arguments that may be run."""
    heard: set[str] = set()
    """Calls of which the decision is there."""
    started: Counter[str] = Counter()
    for record in records:
        event = record.event()
        output = ""
        if isinstance(event, ToolEvent):
            output = state.runs[event.run].calls[event.call].output
        state = fold([record], state)
        match event:
            case events.ToolCall(needs_approval=True):
                asked.setdefault(event.call, event.arguments)
            case events.Approval():
                decision = decided.get(event.call)
                if decision is None or decision != _said(event):
                    yield f"{record.seq}: the person said {decision} about call {event.call}, not {_said(event)}"
                if event.arguments is not None:
                    asked[event.call] = event.arguments
                heard.add(event.call)
            case ToolStarted() if event.call in asked:
                started[event.call] += 1
                if started[event.call] > 1 or not (decided.get(event.call) or {}).get("approved"):
                    yield f"{record.seq}: call {event.call} starts, the person having said {decided.get(event.call)}"
            case ToolProgress() if event.tool in OUTPUTS:
                shown = state.runs[event.run].calls[event.call].output
                if not OUTPUTS[event.tool].startswith(shown):
                    yield f"{record.seq}: call {event.call} shows {shown[-100:]!r}"
            case ToolResult(outcome="ok") if event.call in asked:
                if not (started[event.call] and event.content["drawn"] in asked[event.call]["names"]):
                    yield f"{record.seq}: call {event.call} was run with {asked[event.call]}, and gave {event.content}"
            case ToolResult(outcome="denied") if started[event.call]:
                yield f"{record.seq}: call {event.call} was run and denied"
            case ToolResult(outcome="ok") if output != OUTPUTS.get(event.tool, output):
                yield f"{record.seq}: call {event.call} ended well, and had shown {output[-100:]!r}"
            case _:
                pass
    for call, decision in decided.items():
        if decision is not None and call not in heard:
            yield f"the person said {decision} about call {call}, and nobody heard it"


def _said(approval: events.Approval) -> dict[str, Any]:
    said = {"approved": approval.approved, "arguments": approval.arguments, "reason": approval.reason}
    return {name: value for name, value in said.items() if value or name == "approved"}


def _asking(received: Iterable[Received]) -> list[str]:
    """The calls that these events ask a person about."""
    told = (events.decode(one.data) for one in received if one.event == "tool_call")
    return [event.call for event in told if isinstance(event, events.ToolCall) and event.needs_approval]


def _walk(number: int) -> Iterable[str]:
    """What `collatz` puts out."""
    while number != 1:
        following = number * 3 + 1 if number % 2 else number // 2
        yield f"{number} → {following}\n"
        number = following


OUTPUTS: Final = {"collatz": "".join(_walk(27)), "grind": "".join(FLOUR)}
"""All that these tools say."""


def _is_forked(pid: str) -> bool:
    """Whether it is a process in which a tool runs: numbers are used again."""
    try:
        return b"multiprocessing.forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


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
