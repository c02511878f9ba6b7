"""`fold` and `decide` under every order of things: workers that race, die, are presumed dead and wake up again,
triggers that come twice. A log in memory with the server's fence; no clock, no sleep; Hypothesis chooses.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tapeline import limits, subjects
from tapeline.audit import violations
from tapeline.events import Conversation, Event, Message, Step, Stop, Token, ToolResult, ToolStarted, encode
from tapeline.fold import State, fold
from tapeline.registry import ToolSpec
from tapeline.tape import Record

from services.inference.conclude import Spoken, answered, ended, settled, spoken
from services.inference.decide import Budget, Claim, End, Leave, Rest, Settle, Trigger, Wait, decide
from services.inference.prompt import Call
from services.inference.provider import Finish

TOOLS = {"add": ToolSpec(name="add", description="", parameters={}, timeout_s=60.0)}
SCRIPT: list[tuple[str, int]] = [("Let me see. ", 3), ("Now one more. ", 1), ("It is done.", 0)]
"""What the model says in each step, and how many calls it makes then."""


BUDGET = Budget()


class Lost(Exception):
    """The append's fence did not hold, or what came between ends its writer."""


@dataclass
class Log:
    """One conversation as the server keeps it."""

    records: list[Record] = field(default_factory=list)

    @property
    def last(self) -> int:
        return self.records[-1].seq if self.records else 0

    def append(self, entries: list[tuple[str, Event]], after: int) -> None:
        if after != self.last:
            raise Lost
        for kind, event in entries:
            subject = subjects.chain(0, "c", kind)
            self.records.append(Record(self.last + 1, self.last, subject, encode(event), {}))

    def since(self, after: int) -> list[Record]:
        return self.records[after:]

    def facts(self) -> State:
        state = fold(record for record in self.records if record.is_fact)
        state.last_event_id = self.last
        return state


def wakes(record: Record) -> bool:
    return record.kind in (subjects.INPUT, subjects.TOOL)


@dataclass
class Writer:
    """A worker's fenced place in the log, as `append.Chain` keeps it."""

    log: Log
    last: int
    ends: Callable[[Record], bool]

    def append(self, entries: list[tuple[str, Event]]) -> None:
        for record in self.log.since(self.last):
            if self.ends(record):
                raise Lost
            self.last = record.seq
        self.log.append(entries, self.last)
        self.last = self.log.last


def inference(log: Log, trigger: Trigger, worker: str, now: Callable[[], int]) -> Iterator[None]:
    """The engine's loop, giving way at every point where another process could come between."""
    while True:
        state = log.facts()
        yield
        try:
            match decide(state, trigger, now(), BUDGET):
                case Rest() | Leave() | Wait():
                    return
                case Settle() as settle:
                    log.append(settled(settle, now()), state.last_event_id)
                case End() as end:
                    step = end.run.step
                    said = None
                    if step is not None and step.finish is None:
                        since = (record.event() for record in log.since(step.event_id))
                        said = spoken(since, end.run.run, step)
                    yield
                    log.append(ended(end, said, now()), state.last_event_id)
                case Claim() as claim:
                    yield from attempt(log, state, claim, trigger, worker, now())
        except Lost:
            yield


def attempt(log: Log, state: State, claim: Claim, trigger: Trigger, worker: str, now: int) -> Iterator[None]:
    run, step, number = claim.run.run, claim.step, claim.attempt
    claimed = Step(
        run=run,
        ts=now,
        step=step,
        attempt=number,
        worker=worker,
        trigger=trigger.seq,
        delivery=trigger.delivery,
    )
    log.append([(subjects.MODEL, claimed)], state.last_event_id)

    def ends(record: Record) -> bool:
        event = record.event()
        if isinstance(event, Step):
            return event.worker != worker
        return isinstance(event, Stop) or getattr(event, "type", None) in ("done", "error")

    writer = Writer(log, log.last, ends)
    text, calls = SCRIPT[step - 1]
    for word in text.split():
        yield
        token = Token(run=run, ts=now, step=step, attempt=number, text=word + " ")
        writer.append([(subjects.MODEL_DELTA, token)])
    yield
    opened = log.facts().runs[run].step
    assert opened is not None
    said = spoken((record.event() for record in log.records), run, opened)
    finish = Finish(
        reason="tool_calls" if calls else "stop",
        calls=[Call(f"p{index}", "add", {"n": index}) for index in range(calls)],
        usage={"output_tokens": 5},
    )
    writer.append(answered(claim, finish, said, TOOLS, now, BUDGET))


def tool(log: Log, call: str, run: str, worker: str) -> Iterator[None]:
    """A tool worker on an idempotent tool: claims, works, says what came of it; once."""
    while True:
        state = log.facts()
        yield
        found = state.runs[run].calls[call]
        if found.status == "done":
            return
        stopped = ToolResult(run=run, ts=0, call=call, tool="add", outcome="stopped", is_error=True)
        started = ToolStarted(run=run, ts=0, call=call, tool="add", worker=worker, attempt=found.attempt + 1)
        try:
            if state.runs[run].ended or state.runs[run].stopped:
                log.append([(subjects.TOOL, stopped)], state.last_event_id)
                return
            log.append([(subjects.TOOL, started)], state.last_event_id)
        except Lost:
            continue
        break

    def ends(record: Record) -> bool:
        event = record.event()
        return isinstance(event, ToolResult | ToolStarted) and event.call == call

    writer = Writer(log, log.last, ends)
    yield
    result = ToolResult(run=run, ts=0, call=call, tool="add", outcome="ok", content=42)
    try:
        writer.append([(subjects.TOOL, result)])
    except Lost:
        return


@dataclass
class World:
    """Everything that is under way, and what is still to be delivered."""

    chance: random.Random
    log: Log = field(default_factory=Log)
    under_way: list[tuple[Trigger | str, Iterator[None]]] = field(default_factory=list)
    delivered: int = 0
    deliveries: dict[int, int] = field(default_factory=dict)
    waiting: list[Trigger | str] = field(default_factory=list)
    faults: int = 0
    names: int = 0
    time: int = 0

    def now(self) -> int:
        return self.time

    def deliver_new(self) -> None:
        """What has been appended since wakes its consumers."""
        for record in self.log.since(self.delivered):
            if wakes(record):
                self.waiting.append(Trigger(record.seq, 1))
            elif record.kind == subjects.call("add"):
                self.waiting.append(getattr(record.event(), "call", ""))
        self.delivered = self.log.last

    def start(self, what: Trigger | str) -> None:
        self.names += 1
        name = f"w{self.names}"
        if isinstance(what, Trigger):
            self.under_way.append((what, inference(self.log, what, name, self.now)))
        else:
            run = what.rpartition("-")[0].rpartition("-")[0]
            self.under_way.append((what, tool(self.log, what, run, name)))

    def again(self, what: Trigger | str) -> None:
        self.faults += 1
        self.waiting.append(Trigger(what.seq, what.delivery + 1) if isinstance(what, Trigger) else what)

    def run(self, faults_max: int) -> None:
        """Until nothing is under way and nothing waits."""
        self.deliver_new()
        for _ in range(20_000):
            if not self.waiting and not self.under_way:
                return
            acts = ["step"] * bool(self.under_way) + ["start"] * bool(self.waiting)
            if self.under_way and self.faults < faults_max:
                acts += ["die", "presumed dead"]
            act = self.chance.choice(acts)
            if act == "start":
                self.start(self.waiting.pop(self.chance.randrange(len(self.waiting))))
                continue
            index = self.chance.randrange(len(self.under_way))
            what, work = self.under_way[index]
            if act == "die":
                self.under_way.pop(index)
                self.again(what)
            elif act == "presumed dead":
                self.again(what)
            elif next(work, self) is self:
                self.under_way.pop(index)
            self.deliver_new()
        raise AssertionError("it does not come to an end")


def begin(world: World, messages: int) -> None:
    entries: list[tuple[str, Event]] = [(subjects.INPUT, Conversation(run="-", ts=0, owner="o"))]
    entries += [(subjects.INPUT, Message(run=f"r{n}", ts=0, content="?", on_busy="queue")) for n in range(messages)]
    world.log.append(entries, 0)


SEEDS = st.integers(0, 2**32)
FAULTS_MAX = limits.STEP_ATTEMPTS_MAX - 1  # so that no step runs out of attempts


@given(seed=SEEDS, messages=st.integers(1, 2))
@settings(max_examples=200, deadline=None)
def test_whatever_races_dies_or_comes_twice_every_run_ends_once_and_as_it_would_alone(seed: int, messages: int) -> None:
    world = World(random.Random(seed))
    begin(world, messages)
    world.run(FAULTS_MAX)
    assert violations(world.log.records) == []
    state = fold(world.log.records)
    for run in state.runs.values():
        assert run.status == "done"
        assert [step.text.strip() for step in run.steps] == [text.strip() for text, _ in SCRIPT]
        assert [len(step.calls) for step in run.steps] == [calls for _, calls in SCRIPT]
        assert all(call.outcome == "ok" for call in run.calls.values())


@given(seed=SEEDS, moment=st.integers(0, 60))
@settings(max_examples=200, deadline=None)
def test_a_stop_at_any_moment_ends_the_run_once_and_nothing_of_the_model_follows(seed: int, moment: int) -> None:
    world = World(random.Random(seed))
    begin(world, 1)

    def stop() -> Iterator[None]:
        for _ in range(moment):
            yield
        while not (state := world.log.facts()).runs["r0"].ended:
            yield
            try:
                world.log.append([(subjects.INPUT, Stop(run="r0", ts=0, by="u"))], state.last_event_id)
            except Lost:
                continue
            return

    world.under_way.append(("stop", stop()))
    world.faults = FAULTS_MAX  # no deaths here: only the race
    world.run(0)
    assert violations(world.log.records) == []
    run = fold(world.log.records).runs["r0"]
    assert run.status == "done"
    assert run.reason == ("stopped" if run.stopped else "stop")


@given(seed=SEEDS)
@settings(max_examples=50, deadline=None)
def test_facts_alone_give_the_same_state_as_all_events_once_runs_have_ended(seed: int) -> None:
    world = World(random.Random(seed))
    begin(world, 2)
    world.run(1)
    facts = fold(record for record in world.log.records if record.is_fact)
    assert facts.runs == fold(world.log.records).runs


def test_a_run_past_its_deadline_ends_with_an_error_whatever_it_waits_for() -> None:
    log = Log()
    log.append([(subjects.INPUT, Conversation(run="-", ts=0, owner="o"))], 0)
    log.append([(subjects.INPUT, Message(run="r", ts=0, content="?"))], 1)
    late = int(limits.RUN_DEADLINE_S * 1000)
    assert isinstance(decide(log.facts(), Trigger(2, 1), late - 1, BUDGET), Claim)
    end = decide(log.facts(), Trigger(2, 1), late, BUDGET)
    assert isinstance(end, End)
    assert (end.reason, end.code) == ("error", "run_deadline")


def test_a_stopped_run_whose_turn_has_not_come_ends_at_once() -> None:
    log = Log()
    log.append([(subjects.INPUT, Conversation(run="-", ts=0, owner="o"))], 0)
    log.append([(subjects.INPUT, Message(run=name, ts=0, content="?")) for name in ("first", "queued")], 1)
    log.append([(subjects.MODEL, Step(run="first", ts=0, step=1, attempt=1, worker="w", trigger=2))], log.last)
    log.append([(subjects.INPUT, Stop(run="queued", ts=0))], log.last)
    end = decide(log.facts(), Trigger(5, 1), 0, BUDGET)
    assert isinstance(end, End)
    assert (end.run.run, end.reason) == ("queued", "stopped")
    log.append(ended(end, None, 0), log.last)
    assert [run.status for run in log.facts().runs.values()] == ["active", "done"]


def test_a_call_without_a_result_is_settled_after_its_deadline_and_not_before() -> None:
    log, trigger = Log(), Trigger(2, 1)
    log.append([(subjects.INPUT, Conversation(run="-", ts=0, owner="o"))], 0)
    log.append([(subjects.INPUT, Message(run="r", ts=0, content="?"))], 1)
    claim = decide(log.facts(), trigger, 0, BUDGET)
    assert isinstance(claim, Claim)
    step = Step(run="r", ts=0, step=1, attempt=1, worker="w", trigger=2)
    log.append([(subjects.MODEL, step)], log.last)
    finish = Finish(reason="tool_calls", calls=[Call("p", "add", {})], usage={})
    log.append(answered(claim, finish, Spoken(), TOOLS, 0, BUDGET), log.last)
    wait = decide(log.facts(), Trigger(9, 1), 1, BUDGET)
    assert isinstance(wait, Wait)
    assert isinstance(decide(log.facts(), trigger, wait.until - 1, BUDGET), Wait)
    settle = decide(log.facts(), trigger, wait.until, BUDGET)
    assert isinstance(settle, Settle)
    assert settle.outcome == "timeout"


@pytest.mark.parametrize("delivery", [1, 2, 3])
def test_only_a_later_delivery_of_the_claiming_trigger_takes_over(delivery: int) -> None:
    log = Log()
    log.append([(subjects.INPUT, Conversation(run="-", ts=0, owner="o"))], 0)
    log.append([(subjects.INPUT, Message(run="r", ts=0, content="?"))], 1)
    step = Step(run="r", ts=0, step=1, attempt=1, worker="w", trigger=2, delivery=2)
    log.append([(subjects.MODEL, step)], log.last)
    assert isinstance(decide(log.facts(), Trigger(99, 5), 0, BUDGET), Rest)
    action = decide(log.facts(), Trigger(2, delivery), 0, BUDGET)
    assert isinstance(action, Claim if delivery == 3 else Leave)


def test_a_step_that_loses_one_worker_after_the_other_ends_its_run_with_an_error() -> None:
    log = Log()
    log.append([(subjects.INPUT, Conversation(run="-", ts=0, owner="o"))], 0)
    log.append([(subjects.INPUT, Message(run="r", ts=0, content="?"))], 1)
    for attempt in range(1, BUDGET.attempts + 1):
        claim = decide(log.facts(), Trigger(2, attempt), 0, BUDGET)
        assert isinstance(claim, Claim)
        assert (claim.step, claim.attempt) == (1, attempt)
        step = Step(run="r", ts=0, step=1, attempt=attempt, worker=f"w{attempt}", trigger=2, delivery=attempt)
        log.append([(subjects.MODEL, step)], log.last)
    end = decide(log.facts(), Trigger(2, BUDGET.attempts + 1), 0, BUDGET)
    assert isinstance(end, End)
    assert (end.reason, end.code) == ("error", "attempts_exhausted")
