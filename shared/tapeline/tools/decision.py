"""What a worker does with a delivery of a `tool_call`: `decide(state, call, …) → action`. Pure: no I/O, no clock.

The answer depends on the log alone, so a call may be delivered twice, or to two workers: the fence lets one act.
"""

from typing import NamedTuple

from tapeline import limits
from tapeline.events import Outcome, ToolCall
from tapeline.fold import CallState, State


class Run(NamedTuple):
    """Claim the call and run its tool."""

    call: CallState
    attempt: int


class Settle(NamedTuple):
    """Write the call's result without running its tool."""

    outcome: Outcome
    message: str


class Nothing(NamedTuple):
    """Write nothing. `over`: nobody else has anything to do either, so the delivery can be acknowledged."""

    over: bool


Action = Run | Settle | Nothing


def decide(
    state: State, event: ToolCall, delivery: int, now: int, *, idempotent: bool, needs_approval: bool = False
) -> Action:
    """What to do, `now` being in ms since the epoch; the rest is what the tool's author has said of it.

    A call that was claimed with this delivery or a later one is in better hands. One that was claimed with an
    earlier delivery has lost its worker: the server delivers again only what nobody keeps alive. What that one began
    may have been another version, so both must be idempotent before it is run again.
    """
    if state.deleted:
        return Nothing(over=True)
    run = state.runs.get(event.run)
    call = run.calls.get(event.call) if run else None
    if run is None or call is None or call.status == "done":
        return Nothing(over=True)
    if call.status == "running":
        if call.delivery >= delivery:
            return Nothing(over=False)
        if not (call.idempotent and idempotent):
            return Settle("unknown", "its worker was lost while it ran; whether it had its effect is not known")
        if call.attempt >= limits.TOOL_ATTEMPTS_MAX:
            return Settle("unknown", f"it lost {call.attempt} workers while it ran, and is not tried again")
    if run.stopped or run.ended:
        return Settle("stopped", "the run was stopped before the tool was run")
    if now >= call.deadline:
        return Settle("timeout", "no worker was free to run the tool in time")
    if call.needs_approval and not call.approved:
        return Nothing(over=True)  # the approval will wake somebody
    if needs_approval and not call.needs_approval:  # it was made for an earlier version, which did not ask
        return Settle("error", "a person must approve calls of this tool now, and was not asked; call it again")
    return Run(call, call.attempt + 1)
