"""`fold` and `decide` under every order of things: workers that race, die, are presumed dead and wake up again,
triggers that come twice, people who decide on calls, twice at once or never. A log in memory with the server's fence; a
clock that only alarms move; no sleep; Hypothesis chooses.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tapeline import limits, subjects
from tapeline.audit import violations
from tapeline.events import (
    Approval,
    Conversation,
    Event,
    Message,
    Step,
    Stop,
    Token,
    ToolCall,
    ToolResult,
    ToolStarted,
    encode,
)
from tapeline.fold import CallState, State, fold
from tapeline.record import Record
from tapeline.registry import ToolSpec

from services.edge.conversations import check_waits
from services.edge.problem import Problem
from services.inference.conclude import Spoken, answered, ended, issued, partial, settled, spoken
from services.inference.decide import Budget, Claim, End, Issue, Leave, Rest, Settle, Trigger, Wait, decide
from services.inference.part import Finish
from services.inference.prompt import Call

TOOLS = {
    "add": ToolSpec(name="add", description="", parameters={}, timeout_s=60.0),
    "pay": ToolSpec(name="pay", description="", parameters={}, timeout_s=60.0, needs_approval=True),
}
SCRIPT: list[tuple[str, list[str]]] = [("Let me see. ", ["add", "pay", "pay"]), ("One more. ", ["pay"]), ("Done.", [])]
"""What the model says in each step, and the tools it calls then."""


BUDGET = Budget()


Decision = tuple[bool, dict[str, Any] | None]
"""Approved or not, and the arguments as edited."""
What = Trigger | tuple[str, str] | str
"""A trigger, a tool and a call of it, or somebody else."""


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


def inference(
    log: Log, trigger: Trigger, worker: str, now: Callable[[], int], set_alarm: Callable[[int], None]
) -> Iterator[None]:
    """The engine's loop, giving way at every point where another process could come between."""
    while True:
        state = log.facts()
        yield
        try:
            match decide(state, trigger, now(), BUDGET):
                case Rest() | Leave():
                    return
                case Wait(until=until):
                    set_alarm(until)
                    return
                case Settle() as settle:
                    log.append(settled(settle, now()), state.last_event_id)
                case Issue() as issue:
                    log.append(issued(issue, now(), BUDGET), state.last_event_id)
                case End() as end:
                    step = end.run.step
                    said = None
                    if step is not None and step.finish is None:
                        since = (record.event() for record in log.since(end.run.message.event_id))
                        said = partial(since, end.run.run, step)
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
        calls=[Call(f"p{index}", name, {"n": index}) for index, name in enumerate(calls)],
        usage={"output_tokens": 5},
    )
    writer.append(answered(claim, finish, said, TOOLS, now, BUDGET))


def person(log: Log, run: str, call: str, name: str, decision: Decision, now: Callable[[], int]) -> Iterator[None]:
    """Somebody who decides on a call over an edge of their own, unless somebody has."""
    while True:
        state = log.facts()
        yield
        try:
            check_waits(state.runs[run], call, now())
            approved, arguments = decision
            approval = Approval(run=run, ts=now(), call=call, approved=approved, arguments=arguments, by=name)
            log.append([(subjects.INPUT, approval)], state.last_event_id)
        except Lost:
            continue
        except Problem as problem:
            if problem.code not in ("already_decided", "not_waiting"):
                raise
        return


def tool(log: Log, name: str, call: str, run: str, worker: str) -> Iterator[None]:
    """A tool worker on an idempotent tool: claims, works, says what came of it; once."""
    while True:
        state = log.facts()
        yield
        found = state.runs[run].calls[call]
        if found.status == "done":
            return
        stopped = ToolResult(run=run, ts=0, call=call, tool=name, outcome="stopped", is_error=True)
        started = ToolStarted(run=run, ts=0, call=call, tool=name, worker=worker, attempt=found.attempt + 1)
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
    result = ToolResult(run=run, ts=0, call=call, tool=name, outcome="ok", content=found.arguments)
    try:
        writer.append([(subjects.TOOL, result)])
    except Lost:
        return


@dataclass
class World:
    """Everything that is under way, and what is still to be delivered."""

    chance: random.Random
    log: Log = field(default_factory=Log)
    under_way: list[tuple[What, Iterator[None]]] = field(default_factory=list)
    delivered: int = 0
    deliveries: dict[int, int] = field(default_factory=dict)
    waiting: list[What] = field(default_factory=list)
    faults: int = 0
    names: int = 0
    time: int = 0
    alarm: int | None = None

    def now(self) -> int:
        return self.time

    def deliver_new(self) -> None:
        """What has been appended since wakes its consumers."""
        for record in self.log.since(self.delivered):
            if wakes(record):
                self.waiting.append(Trigger(record.seq, 1))
            elif isinstance(event := record.event(), ToolCall):
                if record.kind == subjects.call(event.tool):
                    self.waiting.append((event.tool, event.call))
                else:
                    self.ask(event)
        self.delivered = self.log.last

    def start(self, what: What) -> None:
        self.names += 1
        name = f"w{self.names}"
        if isinstance(what, Trigger):
            self.under_way.append((what, inference(self.log, what, name, self.now, self.set_alarm)))
        elif isinstance(what, tuple):
            tool_name, call = what
            self.under_way.append((what, tool(self.log, tool_name, call, call.split("-")[0], name)))

    def ask(self, call: ToolCall) -> None:
        """Up to two people hear of it, each by an edge of their own."""
        decisions: list[Decision] = [(True, None), (True, {"n": "edited"}), (False, None)]
        for name in ["ann", "bob"][: self.chance.choice([0, 1, 2, 2])]:
            decision = self.chance.choice(decisions)
            self.under_way.append(("person", person(self.log, call.run, call.call, name, decision, self.now)))

    def set_alarm(self, at: int) -> None:
        self.alarm = at

    def ring(self) -> bool:
        """Nothing else happens any more: lets the alarm ring, if one is set."""
        at, self.alarm = self.alarm, None
        if at is None:
            return False
        self.time = max(self.time, at)
        self.names += 1
        self.waiting.append(Trigger(-self.names, 1))
        return True

    def again(self, what: What) -> None:
        if what == "person":
            return  # goes away, or clicks twice, which is what two of them do
        self.faults += 1
        self.waiting.append(Trigger(what.seq, what.delivery + 1) if isinstance(what, Trigger) else what)

    def run(self, faults_max: int) -> None:
        """Until nothing is under way and nothing waits."""
        self.deliver_new()
        for _ in range(20_000):
            if not self.waiting and not self.under_way and not self.ring():
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
    decisions = [event for record in world.log.records if isinstance(event := record.event(), Approval)]
    for run in state.runs.values():
        assert run.status == "done"
        assert [step.text.strip() for step in run.steps] == [text.strip() for text, _ in SCRIPT]
        assert [[call.tool for call in step.calls] for step in run.steps] == [calls for _, calls in SCRIPT]
        for call in run.calls.values():
            decided = [event for event in decisions if event.call == call.call]
            assert len(decided) <= 1
            if call.tool == "add" or (decided and decided[0].approved):
                edited = decided[0].arguments if decided else None
                assert (call.outcome, call.content) == ("ok", edited or {"n": int(call.call[-1])})
            else:
                assert call.outcome == ("denied" if decided else "timeout")
                assert call.started_ts is None


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
    now = 1
    while isinstance(action := decide(log.facts(), trigger, now, BUDGET), Wait):
        assert now < action.until <= now + limits.TOOL_ABSENT_S * 1000
        now = action.until
    assert isinstance(action, Settle)
    assert (now, action.outcome) == ((60 + limits.TOOL_GRACE_S) * 1000, "timeout")


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


@pytest.mark.parametrize("reason", ["error", "stopped"])
def test_a_run_that_ends_before_its_last_attempt_writes_a_word_keeps_what_was_shown(
    reason: Literal["error", "stopped"],
) -> None:
    log = Log()
    log.append([(subjects.INPUT, Conversation(run="-", ts=0, owner="o"))], 0)
    log.append([(subjects.INPUT, Message(run="r", ts=0, content="?"))], 1)
    words = {1: ["A first ", "answer, "], 2: ["and another"], 3: []}
    for attempt, texts in words.items():
        step = Step(run="r", ts=0, step=1, attempt=attempt, worker=f"w{attempt}", trigger=2, delivery=attempt)
        log.append([(subjects.MODEL, step)], log.last)
        for text in texts:
            log.append([(subjects.MODEL_DELTA, Token(run="r", ts=5, step=1, attempt=attempt, text=text))], log.last)
    run = log.facts().runs["r"]
    assert run.step is not None
    said = partial((record.event() for record in log.records), "r", run.step)
    log.append(ended(End(run, reason, "attempts_exhausted", "no more"), said, 9), log.last)
    answer = log.facts().runs["r"].steps[0]
    assert (answer.attempt, answer.text, answer.finish) == (3, "and another", reason)
    assert violations(log.records) == []
    forged = log.records[-2].data.replace(b"and another", b"never said")
    log.records[-2] = log.records[-2]._replace(data=forged)
    assert any("its text" in one for one in violations(log.records))


# Approval


def asked(**budget: float) -> tuple[Log, Budget]:
    """A run that waits for a person: two calls that ask, of three, at 1,000 ms."""
    log, given = Log(), Budget(**budget)  # type: ignore[arg-type]
    log.append([(subjects.INPUT, Conversation(run="-", ts=0, owner="o"))], 0)
    log.append([(subjects.INPUT, Message(run="r", ts=0, content="?"))], 1)
    claim = decide(log.facts(), Trigger(2, 1), 0, given)
    assert isinstance(claim, Claim)
    log.append([(subjects.MODEL, Step(run="r", ts=0, step=1, attempt=1, worker="w", trigger=2))], log.last)
    calls = [Call("p", name, {"n": 1}) for name in ("add", "pay", "pay")]
    finish = Finish(reason="tool_calls", calls=calls, usage={})
    said = Spoken(sha256=hashlib.sha256().hexdigest())
    log.append(answered(claim, finish, said, TOOLS, 1_000, given), log.last)
    return log, given


def approval(call: str, ts: int, *, approved: bool = True, arguments: dict[str, Any] | None = None) -> Event:
    return Approval(run="r", ts=ts, call=call, approved=approved, arguments=arguments, reason="why", by="ann")


def test_only_an_approval_and_what_follows_it_moves_a_call_that_waits() -> None:
    log, _ = asked()
    call, other = "r-1-1", "r-1-2"
    again = ToolCall(run="r", ts=9, step=1, attempt=1, call=call, tool="pay", arguments={"n": "forged"}, deadline=9)
    started = ToolStarted(run="r", ts=9, call=call, tool="pay", worker="w")

    def shown(name: str = call) -> tuple[object, ...]:
        state = log.facts().runs["r"].calls[name]
        return state.status, state.approved, state.decided_by, state.arguments

    def put(kind: str, event: Event) -> tuple[object, ...]:
        log.append([(kind, event)], log.last)
        return shown()

    waits = ("waiting", None, "", {"n": 1})
    assert [record.kind for record in log.records[-3:]] == [subjects.call("add"), subjects.MODEL, subjects.MODEL]
    assert put(subjects.call("pay"), again) == put(subjects.TOOL, started) == shown() == waits
    decided = ("decided", True, "ann", {"n": 2})
    assert put(subjects.INPUT, approval(call, 9, arguments={"n": 2})) == decided
    assert put(subjects.INPUT, approval(call, 9, approved=False)) == decided
    assert put(subjects.TOOL, started) == decided
    issue = decide(log.facts(), Trigger(9, 1), 5_000, BUDGET)
    assert isinstance(issue, Issue)
    ((kind, event),) = issued(issue, 5_000, BUDGET)
    assert isinstance(event, ToolCall)
    assert (kind, event.call, event.arguments, event.deadline) == (subjects.call("pay"), call, {"n": 2}, 65_000)
    assert put(kind, event) == ("pending", True, "ann", {"n": 2})
    assert put(kind, again) == ("pending", True, "ann", {"n": 2})
    assert put(subjects.TOOL, started)[0] == "running"
    assert put(kind, again)[0] == "running"
    log.append([(subjects.INPUT, approval(other, 9, approved=False, arguments={"n": 3}))], log.last)
    log.append(
        [(kind, ToolCall(run="r", ts=9, step=1, attempt=1, call=other, tool="pay", arguments={}, deadline=9))],
        log.last,
    )
    assert shown(other) == ("decided", False, "ann", {"n": 1})
    settle = decide(log.facts(), Trigger(9, 1), 5_000, BUDGET)
    assert isinstance(settle, Settle)
    assert (settle.call.call, settle.outcome, settle.message) == (other, "denied", "the user denied this call: why")


def test_the_clock_of_a_run_stands_still_while_a_person_is_waited_for() -> None:
    log, budget = asked(run_s=10, approval_s=100)
    log.append([(subjects.TOOL, ToolResult(run="r", ts=1_100, call="r-1-0", tool="add", outcome="ok"))], log.last)
    assert decide(log.facts(), Trigger(9, 1), 100_999, budget) == Wait(log.facts().runs["r"], until=101_000)
    late = decide(log.facts(), Trigger(9, 1), 10**9, budget)
    assert isinstance(late, Settle), "however late inference comes, the run goes on"
    assert late.outcome == "timeout"
    log.append([(subjects.INPUT, approval("r-1-1", 31_000, approved=False))], log.last)
    assert budget.deadline(log.facts().runs["r"]) == 10_000 + 100_000, "one still waits"
    log.append([(subjects.INPUT, approval("r-1-2", 51_000))], log.last)
    run = log.facts().runs["r"]
    assert (run.waited_ms, run.waiting_since, budget.deadline(run)) == (50_000, None, 60_000)
    action = decide(log.facts(), Trigger(9, 1), 51_000, budget)
    assert isinstance(action, Settle)
    log.append(settled(action, 51_000), log.last)
    issue = decide(log.facts(), Trigger(9, 1), 51_000, budget)
    assert isinstance(issue, Issue)
    log.append(issued(issue, 51_000, budget), log.last)
    assert log.facts().runs["r"].calls["r-1-2"].deadline == 60_000, "the run's own comes first"
    end = decide(log.facts(), Trigger(9, 1), 60_000, budget)
    assert isinstance(end, End)
    assert end.code == "run_deadline"


STARTS = "call r-1-1 starts without its approval"
ISSUED = "call r-1-1 is issued with arguments that nobody approved"


@pytest.mark.parametrize(
    ("decision", "issue_with", "found"),
    [
        ({"approved": False}, None, [STARTS]),
        ({"approved": True}, None, [STARTS]),
        ({"approved": True}, {"n": 2}, [ISSUED]),
        ({"approved": True, "arguments": {"n": 2}}, {"n": 1}, [ISSUED]),
        ({"approved": True, "arguments": {"n": 2}}, {"n": 2}, []),
    ],
)
def test_the_audit_finds_a_call_that_is_run_otherwise_than_a_person_decided(
    decision: dict[str, Any], issue_with: dict[str, Any] | None, found: list[str]
) -> None:
    log, _ = asked()
    call: dict[str, Any] = {"run": "r", "ts": 9, "call": "r-1-1", "tool": "pay"}
    log.append([(subjects.INPUT, approval("r-1-1", 9, **decision))], log.last)
    if issue_with:
        event = ToolCall(**call, step=1, attempt=1, arguments=issue_with, deadline=9, needs_approval=True)
        log.append([(subjects.call("pay"), event)], log.last)
    log.append([(subjects.TOOL, ToolStarted(**call, worker="w"))], log.last)
    log.append(ended(End(log.facts().runs["r"], "stopped"), None, 10), log.last)
    assert [line.partition(": ")[2] for line in violations(log.records)] == found


@pytest.mark.parametrize("reason", ["stopped", "error"])
def test_the_end_of_a_run_settles_the_calls_that_no_worker_has(reason: Any) -> None:
    log, _ = asked()
    log.append([(subjects.TOOL, ToolStarted(run="r", ts=1_100, call="r-1-0", tool="add", worker="w"))], log.last)
    log.append([(subjects.INPUT, approval("r-1-1", 1_200))], log.last)
    log.append(ended(End(log.facts().runs["r"], reason), None, 1_300), log.last)
    run = log.facts().runs["r"]
    assert [call.outcome for call in run.calls.values()] == [None, "stopped", "stopped"]
    assert violations(log.records) == []
    if run.status == "done":
        assert run.facts == getattr(log.records[-1].event(), "facts", None)


LONG: int = 3_600_000
ABSENT: int = int(limits.TOOL_ABSENT_S * 1000)


@pytest.mark.parametrize(
    ("call", "now", "absent", "then"),
    [
        ({"status": "waiting", "deadline": 7}, 6, {"t"}, 7),
        ({"status": "waiting", "deadline": 7}, 7, (), "timeout"),
        ({"status": "decided", "approved": False, "deadline": 7}, 9, (), "denied"),
        ({"status": "pending", "issued_ts": 5}, 6, {"t"}, 6 + ABSENT),
        ({"status": "pending", "issued_ts": 5}, 4 + ABSENT, {"t"}, 4 + 2 * ABSENT),
        ({"status": "pending", "issued_ts": 5}, 5 + ABSENT, {"t"}, "error"),
        ({"status": "pending", "issued_ts": 5}, 5 + ABSENT, {"other"}, 5 + 2 * ABSENT),
        ({"status": "running", "issued_ts": 5}, 5 + ABSENT, {"t"}, LONG + 5_000),
        ({"status": "pending", "issued_ts": 5, "deadline": 9}, 10, (), 5_009),
    ],
)
def test_what_becomes_of_a_call_that_has_no_result(
    call: dict[str, Any], now: int, absent: Any, then: int | str
) -> None:
    log, _ = asked()
    state = log.facts()
    state.runs["r"].waiting_since = None
    step = state.runs["r"].steps[0]
    about: dict[str, Any] = {"call": "c", "tool": "t", "arguments": {}, "deadline": LONG}
    step.calls = [CallState(**about | call)]
    action = decide(state, Trigger(9, 1), now, Budget(run_s=LONG), absent)
    assert (action.until if isinstance(action, Wait) else getattr(action, "outcome", None)) == then
