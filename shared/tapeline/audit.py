"""The oracle: what must hold of any conversation's log, whatever was killed while it was written.

`violations(records)` is pure, and says in words what does not hold. Tests, the soak and auditors ask it.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .events import (
    Answer,
    AnyEvent,
    Approval,
    Conversation,
    Deleted,
    Done,
    Error,
    Event,
    Message,
    ModelEvent,
    Step,
    Stop,
    Thinking,
    Title,
    Token,
    ToolCall,
    ToolInput,
    ToolResult,
    ToolStarted,
    Undecodable,
    Unknown,
    belongs,
    decode,
    tag,
)
from .record import Record


@dataclass
class _Run:
    claimed: tuple[int, int] | None = None
    answered: set[int] = field(default_factory=set)
    calls: set[str] = field(default_factory=set)
    waiting: dict[str, Any] = field(default_factory=dict)
    """Calls that wait for a person, and the arguments the model wrote."""
    approved: dict[str, Any] = field(default_factory=dict)
    """Calls that workers may have now, and do not have yet, and the arguments to run."""
    held: set[str] = field(default_factory=set)
    """Calls that no worker may begin: these, and those that were denied."""
    started: set[str] = field(default_factory=set)
    results: set[str] = field(default_factory=set)
    stopped: bool = False
    ended: int | None = None
    cut_short: bool = False
    text: str = ""
    thinking: str = ""
    shown: tuple[str, str] = ("", "")
    """Text and thinking of the newest attempt before this one at the step that has any."""
    deltas: int = 0
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)


def violations(records: Iterable[Record], *, complete: bool = True) -> list[str]:
    """What does not hold in a conversation's whole log, read from its first event, a line each.

    `complete`: every run is expected to have ended, unless the conversation was deleted, and its deltas to be kept
    still.
    """
    found: list[str] = []
    runs: dict[str, _Run] = {}
    last = deleted = 0
    for record in records:
        seq = record.seq
        if seq <= last:
            found.append(f"{seq} comes after {last}")
        if record.prev is None:
            found.append(f"{seq} names no predecessor")
        elif record.prev != last and complete:
            found.append(f"{seq} was appended after {record.prev}, but {last} is before it")
        event: AnyEvent | Unknown | None = None
        try:
            event = decode(record.data)
        except Undecodable as error:
            found.append(f"{seq} is no event: {error}")
        if event is not None and not isinstance(event, Unknown) and not belongs(tag(event), record.kind):
            found.append(f"{seq} is a {tag(event)}, which nobody may write to {record.kind}")
            event = None
        if last == 0 and not isinstance(event, Conversation):
            found.append(f"{seq} is first, and no conversation")
        if deleted:
            found.append(f"{seq} comes after the conversation was deleted at {deleted}")
        last = seq
        if record.deletes:
            deleted = deleted or seq
        if event is None or isinstance(event, Unknown | Conversation | Title | Deleted):
            continue
        found += [f"{seq} {type(event).__name__}: {what}" for what in _in_run(runs, seq, event, complete=complete)]
    if complete and not deleted:
        for name, run in runs.items():
            if run.ended is None:
                found.append(f"run {name} has no terminal event")
            found += [
                f"run {name}: call {call} has no result"
                for call in sorted(run.calls - run.results)
                if not (run.cut_short and call in run.started)  # its worker is still to say what came of it
            ]
    return found


def _in_run(runs: dict[str, _Run], seq: int, event: Event, *, complete: bool) -> Iterable[str]:
    if isinstance(event, Message):
        if event.run in runs:
            yield "a second message of its run"
        if event.replaces and event.replaces not in runs:
            yield f"replaces the run {event.replaces}, which has no message"
        runs[event.run] = _Run()
        return
    run = runs.get(event.run)
    if run is None:
        yield f"its run {event.run} has no message"
        return
    if run.ended is not None and not isinstance(event, ToolResult | Stop):
        yield f"after the run's end at {run.ended}"
    if isinstance(event, ModelEvent) and not isinstance(event, Step | Done | Error):
        if run.claimed != (event.step, event.attempt):
            yield f"step {event.step} attempt {event.attempt} is written to, but {run.claimed} is claimed"
        elif run.stopped and not isinstance(event, Answer):
            yield "after the run was stopped"
    match event:
        case Stop():
            run.stopped = True
        case Step():
            newest = (event.step, event.attempt)
            if run.claimed is not None and newest <= run.claimed:
                yield f"claims {newest} after {run.claimed}"
            if run.claimed and event.step != run.claimed[0]:
                run.text = run.thinking = ""
                run.shown = ("", "")
            elif complete and not (run.text.startswith(event.text) and run.thinking.startswith(event.thinking)):
                yield "continues from what was not said"
            run.claimed = newest
            if run.text or run.thinking:
                run.shown = (run.text, run.thinking)
            run.text, run.thinking = event.text, event.thinking
            run.deltas, run.digest = 0, hashlib.sha256()
        case Token() | Thinking() | ToolInput():
            run.deltas += 1
            run.digest.update(event.text.encode())
            if isinstance(event, Token):
                run.text += event.text
            elif isinstance(event, Thinking):
                run.thinking += event.text
        case Answer():
            if event.step in run.answered:
                yield f"a second answer of step {event.step}"
            run.answered.add(event.step)
            if complete:
                yield from _content(run, event)
        case ToolCall():
            if event.call not in run.calls:
                run.calls.add(event.call)
                if event.needs_approval:
                    run.waiting[event.call] = event.arguments
                    run.held.add(event.call)
            elif event.call not in run.approved:
                yield f"a second issue of call {event.call}"
            else:
                run.held.discard(event.call)
                if run.approved.pop(event.call) != event.arguments:
                    yield f"call {event.call} is issued with arguments that nobody approved"
        case Approval():
            if event.call not in run.waiting:
                yield f"call {event.call} does not wait for approval"
            elif event.approved:
                asked = run.waiting[event.call]
                run.approved[event.call] = asked if event.arguments is None else event.arguments
            run.waiting.pop(event.call, None)
        case ToolStarted() | ToolResult() if event.call not in run.calls:
            yield f"call {event.call} was never issued"
        case ToolStarted() if event.call in run.results:
            yield f"call {event.call} starts after its result"
        case ToolStarted() if event.call in run.held:
            yield f"call {event.call} starts without its approval"
        case ToolStarted():
            run.started.add(event.call)
        case ToolResult():
            if event.call in run.results:
                yield f"a second result of call {event.call}"
            run.results.add(event.call)
            run.waiting.pop(event.call, None)
        case Done() | Error():
            run.ended = seq
            run.cut_short = isinstance(event, Error) or event.reason == "stopped"


def _content(run: _Run, answer: Answer) -> Iterable[str]:
    if answer.deltas != run.deltas:
        yield f"counts {answer.deltas} deltas; there are {run.deltas}"
    text, thinking = run.text, run.thinking
    if answer.finish in ("error", "stopped") and not (text or thinking):
        text, thinking = run.shown  # what people were shown is kept, though its attempt was lost
    if answer.text != text:
        yield "its text is not what its tokens add up to"
    if answer.thinking != thinking:
        yield "its thinking is not what its deltas add up to"
    if answer.sha256 != run.digest.hexdigest():
        yield "its digest is not that of its deltas"
