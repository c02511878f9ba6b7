"""What a conversation's events add up to: `fold(events) → state`. Pure: no I/O, no clock, no randomness.

Facts alone are enough; deltas, where they are given, fill in the step that is still being written. Events of
superseded attempts, late ones, second results and unknown types change nothing.
"""

from collections.abc import Callable, Iterable
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
    Stored,
    Thinking,
    Title,
    Token,
    ToolCall,
    ToolInput,
    ToolProgress,
    ToolResult,
    ToolStarted,
    Unknown,
)
from .record import Record


class CallState(msgspec.Struct, kw_only=True):
    """One tool call."""

    call: str
    tool: str
    arguments: Any
    deadline: int
    """ms since the epoch; of the decision while it waits, then of the call."""
    needs_approval: bool = False
    timeout_ms: int = 0
    """What it has from its approval on."""
    approved: bool | None = None
    decided_by: str = ""
    reason: str = ""
    """As whoever decided gave it."""
    status: Literal["waiting", "decided", "pending", "running", "done"] = "pending"
    """It waits for a person; who has decided, and inference has not acted on that yet; it waits for a worker; …"""
    issued_ts: int | None = None
    """When workers could take it, ms since the epoch."""
    worker: str = ""
    attempt: int = 0
    delivery: int = 0
    """Of the `tool_call`, with which its worker claimed it."""
    idempotent: bool = False
    """Whether what its worker has begun may be run again."""
    event_id: int = 0
    """Sequence of the worker's claim."""
    started_ts: int | None = None
    progress: dict[str, Any] | None = None
    output: str = ""
    """What it has put out while it runs; then its result takes the place of this."""
    outcome: Outcome | None = None
    is_error: bool = False
    content: Any = None
    stored: Stored | None = None
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
    replaces: str = ""
    """The run before it whose place it takes."""
    replaced_by: str = ""
    """The newest run in whose favour this one no longer counts."""
    model: str = ""
    active_ts: int = 0
    """When its turn came, ms since the epoch: its own message's time, or the end of the run before it."""
    waited_ms: int = 0
    """How long people were waited for, one or several at once, until `waiting_since`."""
    waiting_since: int | None = None
    """Since when a person is waited for, ms since the epoch."""
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
    title: str = ""
    titled_event_id: int = 0
    """The event it has its title from."""
    deleted: bool = False
    """It is as if it did not exist, until it does not."""
    runs: dict[str, RunState] = {}
    last_event_id: int = 0
    """The newest event folded in."""

    @property
    def active(self) -> RunState | None:
        """The run whose turn it is: the first that has not ended. None where the conversation was deleted."""
        return next((run for run in self.runs.values() if not (run.ended or self.deleted)), None)

    def before(self, run: RunState) -> list[RunState]:
        """The runs that count for `run`: those before it, but what each message on the way replaced, and its own.

        What is said after it changes nothing here, so a run that is replaced while it is answered keeps its branch.
        """
        counted: list[RunState] = []
        for one in self.runs.values():
            if one.replaces:
                first = self.runs[one.replaces].message.event_id
                while counted and counted[-1].message.event_id >= first:
                    counted.pop()
            if one.run == run.run:
                break
            counted.append(one)
        return counted


def fold(
    records: Iterable[Record],
    state: State | None = None,
    read: Callable[[Record], AnyEvent | Unknown] = Record.event,
) -> State:
    """The state after these events, `state` being the one before them (which is used up).

    Deltas may come after facts that were stored later than they: what those have ended, they do not add to.
    """
    state = state or State()
    for record in records:
        apply(state, record.seq, read(record))
        state.deleted = state.deleted or record.deletes
    return state


def brief(record: Record, call: str = "") -> AnyEvent | Unknown:
    """The event without what was written and returned, but for what `call` returned: no decision of an edge depends on
    that, and a conversation can have any amount of it.
    """
    event = record.event()
    match event:
        case Answer():
            event.text, event.thinking, event.calls = "", "", []
        case Step():
            event.text, event.thinking = "", ""
        case ToolCall() | Approval():
            event.arguments = None
        case ToolResult() if event.call != call:
            event.content = None
    return event


def apply(state: State, seq: int, event: AnyEvent | Unknown) -> None:
    """One event more."""
    state.last_event_id = max(state.last_event_id, seq)
    match event:
        case Unknown():
            return
        case Conversation() if state.about is None:
            state.about, state.title, state.titled_event_id = event, event.title, seq
        case Title():
            state.title, state.titled_event_id = event.title, seq
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
    replaced = state.runs.get(event.replaces)
    if replaced is not None:
        for run in state.runs.values():
            if run.message.event_id >= replaced.message.event_id:
                run.replaced_by = event.run
    state.runs[event.run] = RunState(
        run=event.run,
        status="queued" if state.active else "active",
        message=MessageState(content=event.content, by=event.by, ts=event.ts, event_id=seq),
        replaces=replaced.run if replaced else "",
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
            call = run.calls.get(event.call)
            if call and call.status == "running" and seq > call.event_id:
                call.progress = {"fraction": event.fraction, "message": event.message}
                call.output += event.text
            return
        case Step():
            _step(run, seq, event)
        case Answer():
            _answer(run, event)
        case ToolCall():
            _call(run, event)
        case ToolStarted():
            call = run.calls.get(event.call)
            if call and call.status in ("pending", "running"):
                call.status, call.worker, call.attempt = "running", event.worker, event.attempt
                call.delivery, call.idempotent = event.delivery, event.idempotent
                call.event_id, call.started_ts = seq, event.ts
                call.progress, call.output = None, ""  # an attempt before it no longer counts
        case ToolResult():
            call = run.calls.get(event.call)
            if call and call.status != "done":
                call.status, call.outcome, call.is_error = "done", event.outcome, event.is_error
                call.content, call.stored = event.content, event.stored
                call.message, call.duration_ms = event.message, event.duration_ms
                call.progress, call.output = None, ""
        case Approval():
            call = run.calls.get(event.call)
            if call and call.status == "waiting":
                call.status, call.approved = "decided", event.approved
                call.decided_by, call.reason = event.by, event.reason
                if event.approved and event.arguments is not None:
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
    _wait(run, event.ts)


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


def _call(run: RunState, event: ToolCall) -> None:
    step = _open_to(run, event.step, event.attempt)
    if step is None:
        return
    call = run.calls.get(event.call)
    if call is None:
        call = CallState(
            call=event.call,
            tool=event.tool,
            arguments=event.arguments,
            deadline=event.deadline,
            needs_approval=event.needs_approval,
            timeout_ms=event.timeout_ms,
            status="waiting",
        )
        step.calls.append(call)
        if event.needs_approval:
            return
    elif not (call.status == "decided" and call.approved):
        return
    call.status, call.arguments, call.deadline, call.issued_ts = "pending", event.arguments, event.deadline, event.ts


def _wait(run: RunState, ts: int) -> None:
    """Adds up the time in which a person is waited for, by the clocks of those who wrote the events."""
    waits = run.step is not None and any(call.status == "waiting" for call in run.step.calls)
    if waits and run.waiting_since is None:
        run.waiting_since = ts
    elif not waits and run.waiting_since is not None:
        run.waited_ms += max(0, ts - run.waiting_since)
        run.waiting_since = None


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
