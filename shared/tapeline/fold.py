"""What a conversation's events add up to: `fold(events) → state`. Pure: no I/O, no clock, no randomness.

Facts alone are enough; deltas, where they are given, fill in the step that is still being written. Events of
superseded attempts, late ones, second results and unknown types change nothing.
"""

from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from .events import (
    Answer,
    AnswerCall,
    AnyEvent,
    Approval,
    Conversation,
    Done,
    Error,
    Event,
    Message,
    Outcome,
    Step,
    Stop,
    Thinking,
    Token,
    ToolCall,
    ToolInput,
    ToolProgress,
    ToolResult,
    ToolStarted,
    Unknown,
)
from .tape import Record


class CallState(msgspec.Struct, kw_only=True):
    """One tool call."""

    call: str
    tool: str
    arguments: Any
    deadline: int
    needs_approval: bool = False
    approved: bool | None = None
    status: Literal["pending", "running", "done"] = "pending"
    worker: str = ""
    attempt: int = 0
    delivery: int = 0
    """Of the `tool_call`, with which its worker claimed it."""
    started_ts: int | None = None
    progress: dict[str, Any] | None = None
    outcome: Outcome | None = None
    is_error: bool = False
    content: Any = None
    message: str = ""
    duration_ms: int = 0


class InputState(msgspec.Struct, kw_only=True):
    """A call's arguments while the model is still writing them."""

    call: str
    tool: str
    text: str


class StepState(msgspec.Struct, kw_only=True):
    """One step, by its newest attempt."""

    step: int
    attempt: int
    event_id: int
    """Sequence of the claim."""
    worker: str = ""
    trigger: int = 0
    delivery: int = 1
    text: str = ""
    thinking: str = ""
    inputs: list[InputState] = []
    finish: str | None = None
    """None while the step is open."""
    asked: list[AnswerCall] = []
    """Calls as the model asked for them; `calls` has those that were issued."""
    calls: list[CallState] = []
    usage: dict[str, int] = {}
    first_token_ms: int | None = None


class MessageState(msgspec.Struct, kw_only=True):
    """What the user said."""

    content: str
    by: str
    ts: int
    event_id: int


class ErrorState(msgspec.Struct, kw_only=True):
    """Why a run failed."""

    code: str
    message: str
    retryable: bool


class RunState(msgspec.Struct, kw_only=True):
    """One run: a message and all that answers it."""

    run: str
    status: Literal["queued", "active", "done", "error"]
    message: MessageState
    model: str = ""
    active_ts: int = 0
    """When its turn came, ms since the epoch: its own message's time, or the end of the run before it."""
    steps: list[StepState] = []
    stopped: bool = False
    reason: str = ""
    error: ErrorState | None = None
    usage: dict[str, int] = {}
    first_token_ms: int | None = None
    duration_ms: int = 0
    facts: int = 0
    ended_event_id: int | None = None

    @property
    def ended(self) -> bool:
        return self.ended_event_id is not None

    @property
    def step(self) -> StepState | None:
        """The step the run is in."""
        return self.steps[-1] if self.steps else None

    @property
    def calls(self) -> dict[str, CallState]:
        return {call.call: call for step in self.steps for call in step.calls}


class State(msgspec.Struct, kw_only=True):
    """A conversation."""

    about: Conversation | None = None
    """Its first event; None where the conversation does not exist."""
    runs: dict[str, RunState] = {}
    last_event_id: int = 0
    """The newest event folded in."""

    @property
    def active(self) -> RunState | None:
        """The run whose turn it is: the first that has not ended."""
        return next((run for run in self.runs.values() if not run.ended), None)


def fold(records: Iterable[Record], state: State | None = None) -> State:
    """The state after these events, `state` being the one before them (which is used up)."""
    state = state or State()
    for record in records:
        apply(state, record.seq, record.event())
    return state


def apply(state: State, seq: int, event: AnyEvent | Unknown) -> None:
    """One event more."""
    state.last_event_id = max(state.last_event_id, seq)
    match event:
        case Unknown():
            return
        case Conversation():
            state.about = state.about or event
        case Message():
            _message(state, seq, event)
        case _:
            run = state.runs.get(event.run)
            if run is not None and (not run.ended or isinstance(event, ToolResult)):
                _in_run(state, run, seq, event)


def _message(state: State, seq: int, event: Message) -> None:
    if event.run in state.runs:
        return
    about = state.about
    state.runs[event.run] = RunState(
        run=event.run,
        status="queued" if state.active else "active",
        message=MessageState(content=event.content, by=event.by, ts=event.ts, event_id=seq),
        model=event.model or (about.model if about else ""),
        active_ts=event.ts,
        facts=1,
    )


def _in_run(state: State, run: RunState, seq: int, event: Event) -> None:
    match event:
        case Token() | Thinking() | ToolInput():
            _delta(run, event)
            return
        case ToolProgress():
            if call := run.calls.get(event.call):
                call.progress = {"fraction": event.fraction, "message": event.message}
            return
        case Step():
            _step(run, seq, event)
        case Answer():
            _answer(run, event)
        case ToolCall():
            if (step := _open_to(run, event.step, event.attempt)) and event.call not in run.calls:
                step.calls.append(
                    CallState(
                        call=event.call,
                        tool=event.tool,
                        arguments=event.arguments,
                        deadline=event.deadline,
                        needs_approval=event.needs_approval,
                    )
                )
        case ToolStarted():
            call = run.calls.get(event.call)
            if call and call.status != "done":
                call.status, call.worker, call.attempt = "running", event.worker, event.attempt
                call.delivery, call.started_ts = event.delivery, event.ts
        case ToolResult():
            call = run.calls.get(event.call)
            if call and call.status != "done":
                call.status, call.outcome, call.is_error = "done", event.outcome, event.is_error
                call.content, call.message, call.duration_ms = event.content, event.message, event.duration_ms
                call.progress = None
        case Approval():
            call = run.calls.get(event.call)
            if call and call.approved is None:
                call.approved = event.approved
                if event.arguments is not None:
                    call.arguments = event.arguments
        case Stop():
            run.stopped = True
        case Done():
            run.status, run.reason = "done", event.reason
            _end(state, run, seq, event)
        case Error():
            run.status = "error"
            run.error = ErrorState(code=event.code, message=event.message, retryable=event.retryable)
            _end(state, run, seq, event)
        case _:
            return
    run.facts += 1


def _open_to(run: RunState, step: int, attempt: int) -> StepState | None:
    """The run's newest step, if `step` and `attempt` are its own: nothing may be added to any other."""
    newest = run.step
    return newest if newest and (newest.step, newest.attempt) == (step, attempt) else None


def _step(run: RunState, seq: int, event: Step) -> None:
    newest = run.step
    if newest is not None and newest.step == event.step:
        if event.attempt <= newest.attempt or newest.finish is not None:
            return
        run.steps.pop()
    elif event.step != len(run.steps) + 1:
        return
    run.model = event.model or run.model
    run.steps.append(
        StepState(
            step=event.step,
            attempt=event.attempt,
            event_id=seq,
            worker=event.worker,
            trigger=event.trigger,
            delivery=event.delivery,
            text=event.text,
            thinking=event.thinking,
        )
    )


def _delta(run: RunState, event: Token | Thinking | ToolInput) -> None:
    step = _open_to(run, event.step, event.attempt)
    if step is None or step.finish is not None:
        return
    match event:
        case Token():
            step.text += event.text
        case Thinking():
            step.thinking += event.text
        case ToolInput():
            known = next((i for i in step.inputs if i.call == event.call), None)
            if known is None:
                step.inputs.append(InputState(call=event.call, tool=event.tool, text=event.text))
            else:
                known.text += event.text


def _answer(run: RunState, event: Answer) -> None:
    step = _open_to(run, event.step, event.attempt)
    if step is None or step.finish is not None:
        return
    step.text, step.thinking, step.finish = event.text, event.thinking, event.finish
    step.asked, step.usage, step.inputs = event.calls, event.usage, []
    step.first_token_ms = event.first_token_ms
    run.usage = add_usage(run.usage, event.usage)
    if run.first_token_ms is None:
        run.first_token_ms = event.first_token_ms


def _end(state: State, run: RunState, seq: int, event: Done | Error) -> None:
    run.ended_event_id = seq
    run.usage, run.first_token_ms, run.duration_ms = event.usage, event.first_token_ms, event.duration_ms
    if (following := state.active) and following.status == "queued":
        following.status, following.active_ts = "active", event.ts


def add_usage(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    """Tokens of both, by name."""
    return {key: one.get(key, 0) + other.get(key, 0) for key in one | other}
