"""What inference does next in a conversation: `decide(state, trigger, now) → action`. Pure: no I/O, no clock.

A trigger is an event that woke a worker. Whatever woke it, the answer depends on the log alone, so any worker
may be asked, twice or at once: the fence lets one act.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Literal

from tapeline import limits, subjects
from tapeline.events import Outcome
from tapeline.fold import CallState, RunState, State, StepState
from tapeline.record import Record

_ABSENT_MS: Final = int(limits.TOOL_ABSENT_S * 1000)


@dataclass(frozen=True)
class Trigger:
    """The event that woke the worker, by its sequence, and which delivery of it this is."""

    seq: int
    delivery: int


@dataclass(frozen=True)
class Rest:
    """Nothing to do: someone else does it, or it is done."""


@dataclass(frozen=True)
class Leave:
    """This trigger was given to another worker since: neither act on it nor acknowledge it."""


@dataclass(frozen=True)
class Claim:
    """Take step `step` of `run` as attempt `attempt`; `over` is the attempt it takes over from."""

    run: RunState
    step: int
    attempt: int
    over: StepState | None = None


@dataclass(frozen=True)
class Settle:
    """Write the result of a call whose worker did not."""

    run: RunState
    call: CallState
    outcome: Outcome
    message: str


@dataclass(frozen=True)
class Issue:
    """Give a call that was approved to its workers."""

    run: RunState
    call: CallState


@dataclass(frozen=True)
class Wait:
    """Tools are at work or people are asked: set the run's alarm for `until` (ms since the epoch), hold no worker."""

    run: RunState
    until: int


@dataclass(frozen=True)
class End:
    """Write the terminal event; where a step is open, its partial text first."""

    run: RunState
    reason: Literal["stop", "length", "content_filter", "stopped", "max_steps", "error"]
    code: str = ""
    message: str = ""
    retryable: bool = False


@dataclass(frozen=True)
class Budget:
    """What a run may cost."""

    run_s: float = limits.RUN_DEADLINE_S
    """From its turn to its end, without the time in which a person is waited for."""
    steps: int = limits.STEPS_MAX
    attempts: int = limits.STEP_ATTEMPTS_MAX
    """Per step."""
    approval_s: float = limits.APPROVAL_S
    """How long a call waits for a person."""

    def deadline(self, run: RunState) -> int:
        """When the run must have ended, ms since the epoch, should those who are asked take all the time they have."""
        waited_ms = run.waited_ms
        if run.waiting_since is not None:
            asked_until = max(call.deadline for call in run.calls.values() if call.status == "waiting")
            waited_ms += asked_until - run.waiting_since
        return run.active_ts + int(self.run_s * 1000) + waited_ms


@dataclass(frozen=True)
class Purge:
    """The conversation was deleted: take its events up to sequence `through` off the tape."""

    through: int


@dataclass(frozen=True)
class Sweep:
    """The conversation was deleted and purged: take what a worker has stored of it since."""


Action = Rest | Leave | Claim | Settle | Issue | Wait | End | Purge | Sweep


def decide(state: State, trigger: Trigger, now: int, budget: Budget, absent: Collection[str] = ()) -> Action:
    """The next action in this conversation. `now` is in ms since the epoch, `absent` are the tools that no worker has
    offered for a while.
    """
    if state.deleted:
        return Purge(state.last_event_id)
    if state.about is None and not state.runs:
        return Sweep()
    for run in state.runs.values():  # also one whose turn has not come
        given_up = run.stopped or (run.replaced_by and not run.steps)  # nobody waits for an answer that was replaced
        if given_up and not run.ended:
            return End(run, "stopped")
    active = state.active
    if active is None:
        return Rest()
    run, step = active, active.step
    if run.waiting_since is None and now >= budget.deadline(run):  # a wait counts when it has ended, however late
        message = f"the run did not end within its {budget.run_s:.0f} s"
        return End(run, "error", "run_deadline", message, retryable=True)
    if step is None:
        return Claim(run, 1, 1)
    if step.finish is None:
        return _open(run, step, trigger, budget)
    return _answered(run, step, now, budget, absent)


def _open(run: RunState, step: StepState, trigger: Trigger, budget: Budget) -> Action:
    """A worker claimed the step and has not answered: its trigger is kept alive for as long as it lives."""
    if step.trigger != trigger.seq:
        return Rest()
    if trigger.delivery <= step.delivery:
        return Leave()
    if step.attempt >= budget.attempts:
        message = f"{step.attempt} workers were lost in this step"
        return End(run, "error", "attempts_exhausted", message, retryable=True)
    return Claim(run, step.step, step.attempt + 1, over=step)


def _answered(run: RunState, step: StepState, now: int, budget: Budget, absent: Collection[str]) -> Action:
    """The step's content is there, and its calls are under way or have ended."""
    left = [call for call in step.calls if call.status != "done"]
    for call in left:
        if call.status == "decided" and call.approved:
            return Issue(run, call)
        if end := _end_of(call, now, absent):
            return Settle(run, call, *end)
    if left:
        return Wait(run, min([budget.deadline(run), *(_look_at(call, now) for call in left)]))
    return Claim(run, step.step + 1, 1)


def _end_of(call: CallState, now: int, absent: Collection[str]) -> tuple[Outcome, str] | None:
    """How the call ends, where that is for inference to say."""
    match call.status:
        case "waiting" if now >= call.deadline:
            return "timeout", "nobody decided in time whether the call may be made, so it was not"
        case "decided" if not call.approved:
            return "denied", f"the user denied this call: {call.reason}" if call.reason else "the user denied this call"
        case "pending" if now >= patience(call):
            return "timeout", f"no worker for the tool {call.tool} took the call in time"
        case "pending" if call.tool in absent and now >= (call.issued_ts or 0) + _ABSENT_MS:
            return "error", f"no worker offers the tool {call.tool} any more, so it was not run"
        case "running" if now >= patience(call):
            return "timeout", f"the tool {call.tool} did not end in time; whether it had its effect is not known"
    return None


def matters(record: Record) -> bool:
    """Whether an event may change what there is to do, or what is to be written. What tools show while they run does
    neither, and with several at work there is always some.
    """
    return record.kind != subjects.TOOL_DELTA


def _look_at(call: CallState, now: int) -> int:
    """When to look at the call again, though nothing wakes us, ms since the epoch."""
    match call.status:
        case "waiting":
            return call.deadline
        case "pending":
            return min(patience(call), now + _ABSENT_MS)
    return patience(call)


def patience(call: CallState) -> int:
    """When inference settles the call itself, ms since the epoch: its worker had until `deadline` to do so."""
    return call.deadline + int(limits.TOOL_GRACE_S * 1000)
