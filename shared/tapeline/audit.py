"""The oracle: what must hold of any conversation's log, whatever was killed while it was written.

`violations(records)` is pure, and says in words what does not hold. Tests, the soak and auditors ask it.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from .events import (
    Answer,
    Conversation,
    Done,
    Error,
    Event,
    Message,
    ModelEvent,
    Step,
    Stop,
    Thinking,
    Token,
    ToolCall,
    ToolInput,
    ToolResult,
    ToolStarted,
    Undecodable,
    Unknown,
    decode,
)
from .tape import Record


@dataclass
class _Run:
    claimed: tuple[int, int] | None = None
    answered: set[int] = field(default_factory=set)
    calls: set[str] = field(default_factory=set)
    results: set[str] = field(default_factory=set)
    stopped: bool = False
    ended: int | None = None
    cut_short: bool = False
    text: str = ""
    thinking: str = ""
    deltas: int = 0
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)


def violations(records: Iterable[Record], *, complete: bool = True) -> list[str]:
    """What does not hold in a conversation's whole log, read from its first event, a line each.

    `complete`: every run is expected to have ended, and its deltas to be kept still.
    """
    found: list[str] = []
    runs: dict[str, _Run] = {}
    last = 0
    for record in records:
        seq = record.seq
        if seq <= last:
            found.append(f"{seq} comes after {last}")
        if record.prev is None:
            found.append(f"{seq} names no predecessor")
        elif record.prev != last and complete:
            found.append(f"{seq} was appended after {record.prev}, but {last} is before it")
        try:
            event = decode(record.data)
        except Undecodable as error:
            found.append(f"{seq} is no event: {error}")
            event = None
        if last == 0 and not isinstance(event, Conversation):
            found.append(f"{seq} is first, and no conversation")
        last = seq
        if event is None or isinstance(event, Unknown | Conversation):
            continue
        found += [f"{seq} {type(event).__name__}: {what}" for what in _in_run(runs, seq, event, complete=complete)]
    if complete:
        for name, run in runs.items():
            if run.ended is None:
                found.append(f"run {name} has no terminal event")
            found += [
                f"run {name}: call {call} has no result"
                for call in sorted(run.calls - run.results)
                if not run.cut_short
            ]
    return found


def _in_run(runs: dict[str, _Run], seq: int, event: Event, *, complete: bool) -> Iterable[str]:
    if isinstance(event, Message):
        if event.run in runs:
            yield "a second message of its run"
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
            elif complete and not (run.text.startswith(event.text) and run.thinking.startswith(event.thinking)):
                yield "continues from what was not said"
            run.claimed = newest
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
            if event.call in run.calls:
                yield f"a second issue of call {event.call}"
            run.calls.add(event.call)
        case ToolStarted() | ToolResult() if event.call not in run.calls:
            yield f"call {event.call} was never issued"
        case ToolStarted() if event.call in run.results:
            yield f"call {event.call} starts after its result"
        case ToolResult():
            if event.call in run.results:
                yield f"a second result of call {event.call}"
            run.results.add(event.call)
        case Done() | Error():
            run.ended = seq
            run.cut_short = isinstance(event, Error) or event.reason == "stopped"


def _content(run: _Run, answer: Answer) -> Iterable[str]:
    if answer.deltas != run.deltas:
        yield f"counts {answer.deltas} deltas; there are {run.deltas}"
    if answer.text != run.text:
        yield "its text is not what its tokens add up to"
    if answer.thinking != run.thinking:
        yield "its thinking is not what its deltas add up to"
    if answer.sha256 != run.digest.hexdigest():
        yield "its digest is not that of its deltas"
