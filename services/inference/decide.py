"""What inference does next in a conversation: `decide(state, trigger, now) → action`. Pure: no I/O, no clock.

A trigger is an event that woke a worker. Whatever woke it, the answer depends on the log alone, so any worker
may be asked, twice or at once: the fence lets one act.
"""

from dataclasses import dataclass
from typing import Literal

from tapeline import limits
from tapeline.events import Outcome
from tapeline.fold import CallState, RunState, State, StepState


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
class Wait:
    """Tools are at work: set the run's alarm for `until` (ms since the epoch) and hold no worker."""

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
    """From its turn to its end."""
    steps: int = limits.STEPS_MAX
    attempts: int = limits.STEP_ATTEMPTS_MAX
    """Per step."""

    def deadline(self, run: RunState) -> int:
        """When the run must have ended, ms since the epoch."""
        return run.active_ts + int(self.run_s * 1000)


Action = Rest | Leave | Claim | Settle | Wait | End


def decide(state: State, trigger: Trigger, now: int, budget: Budget) -> Action:
    """The next action in this conversation. `now` is in ms since the epoch."""
    for run in state.runs.values():  # also one whose turn has not come
        if run.stopped and not run.ended:
            return End(run, "stopped")
    active = state.active
    if active is None:
        return Rest()
    run, step = active, active.step
    if now >= budget.deadline(run):
        message = f"the run did not end within its {budget.run_s:.0f} s"
        return End(run, "error", "run_deadline", message, retryable=True)
    if step is None:
        return Claim(run, 1, 1)
    if step.finish is None:
        return _open(run, step, trigger, budget)
    return _answered(run, step, now, budget)


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


def _answered(run: RunState, step: StepState, now: int, budget: Budget) -> Action:
    """The step's content is there, and its calls are under way or have ended."""
    waiting = [call for call in step.calls if call.status != "done"]
    for call in waiting:
        if now >= patience(call):
            return Settle(run, call, "timeout", _overdue(call))
    if waiting:
        return Wait(run, min([budget.deadline(run), *map(patience, waiting)]))
    return Claim(run, step.step + 1, 1)


def patience(call: CallState) -> int:
    """When inference settles the call itself, ms since the epoch: its worker had until `deadline` to do so."""
    return call.deadline + int(limits.TOOL_GRACE_S * 1000)


def _overdue(call: CallState) -> str:
    if call.status == "pending":
        return f"no worker for the tool {call.tool} took the call in time"
    return f"the tool {call.tool} did not end in time; whether it had its effect is not known"
