"""The events a step or a run comes to. Pure: from what was spoken and decided to what is committed, all or none."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from msgspec import structs
from tapeline import limits, subjects
from tapeline.events import (
    Answer,
    AnswerCall,
    AnyEvent,
    Done,
    Error,
    Event,
    Step,
    Terminal,
    Thinking,
    Token,
    ToolCall,
    ToolInput,
    ToolResult,
    Unknown,
)
from tapeline.fold import RunState, StepState, add_usage
from tapeline.registry import ToolSpec

from .decide import Budget, Claim, End, Issue, Settle
from .part import Finish

Entries = list[tuple[str, Event]]


@dataclass(frozen=True)
class Spoken:
    """What counts of an attempt: its own deltas, after what it kept of the one it continues."""

    text: str = ""
    thinking: str = ""
    deltas: int = 0
    sha256: str = ""
    first_token_ts: int | None = None


def spoken(events: Iterable[AnyEvent | Unknown], run: str, step: StepState) -> Spoken:
    """What the open step's attempt has spoken, from the log. `step` is folded from facts alone."""
    text, thinking, digest, count = [step.text], [step.thinking], hashlib.sha256(), 0
    first_token_ts = None
    for event in events:
        if not isinstance(event, Token | Thinking | ToolInput):
            continue
        if (event.run, event.step, event.attempt) != (run, step.step, step.attempt):
            continue
        count += 1
        digest.update(event.text.encode())
        if isinstance(event, Token):
            text.append(event.text)
            first_token_ts = first_token_ts or event.ts
        elif isinstance(event, Thinking):
            thinking.append(event.text)
    return Spoken("".join(text), "".join(thinking), count, digest.hexdigest(), first_token_ts)


def partial(events: Iterable[AnyEvent | Unknown], run: str, step: StepState) -> Spoken:
    """What is kept of an open step whose run ends, from the run's events: what its attempt has spoken, or where that is
    nothing, what people were last shown: of the newest attempt before it that had spoken.
    """
    known = list(events)
    said = spoken(known, run, step)
    for claim in reversed(known):
        if said.text or said.thinking:
            break
        if isinstance(claim, Step) and (claim.run, claim.step) == (run, step.step) and claim.attempt < step.attempt:
            before = structs.replace(step, attempt=claim.attempt, text=claim.text, thinking=claim.thinking)
            said = replace(spoken(known, run, before), deltas=said.deltas, sha256=said.sha256)
    return said


def call_id(run: str, step: int, index: int) -> str:
    """A call's id is ours, not the provider's: unique in the deployment, the same on every reading."""
    return f"{run}-{step}-{index}"


def answered(
    claim: Claim, finish: Finish, said: Spoken, offered: Mapping[str, ToolSpec], now: int, budget: Budget
) -> Entries:
    """A finished stream: the answer with its calls, or with the end of the run. `now` is in ms since the epoch."""
    run = claim.run
    calls = [
        AnswerCall(call=call_id(run.run, claim.step, index), tool=call.tool, arguments=call.arguments)
        for index, call in enumerate(finish.calls[: limits.CALLS_PER_STEP_MAX])
    ]
    answer = _answer(run, claim.step, claim.attempt, finish.reason, said, calls, finish.usage, now)
    entries: Entries = [(subjects.MODEL, answer)]
    if calls and claim.step < budget.steps:
        for call in calls:
            entries += _called(claim, call, offered, now, budget)
        return entries
    end = End(run, "max_steps" if calls else "stop")
    facts = run.facts + 3  # the claim, the answer, and this
    return [*entries, (subjects.MODEL, _terminal(end, finish.reason, answer, facts, now))]


def ended(end: End, said: Spoken | None, now: int) -> Entries:
    """The end of a run: where a step is open, what it has said so far becomes a fact, so that it is kept when
    its deltas are not; the results of calls that no worker has, or ever will; then the terminal event. `now` is in ms
    since the epoch."""
    run, step = end.run, end.run.step
    entries: Entries = []
    answer = None
    if step is not None and said is not None:
        finish = "error" if end.reason == "error" else "stopped"
        answer = _answer(run, step.step, step.attempt, finish, said, [], {}, now)
        entries.append((subjects.MODEL, answer))
    for call in run.calls.values():
        if call.status not in ("running", "done"):
            entries += settled(Settle(run, call, "stopped", "the run ended before the tool was run"), now)
    facts = run.facts + len(entries) + 1
    return [*entries, (subjects.MODEL, _terminal(end, end.reason, answer, facts, now))]


def settled(settle: Settle, now: int) -> Entries:
    """A call's result, where its worker wrote none. `now` is in ms since the epoch."""
    result = ToolResult(
        run=settle.run.run,
        ts=now,
        call=settle.call.call,
        tool=settle.call.tool,
        outcome=settle.outcome,
        is_error=True,
        message=settle.message,
        duration_ms=now - settle.call.started_ts if settle.call.started_ts else 0,
    )
    return [(subjects.MODEL, result)]


def issued(issue: Issue, now: int, budget: Budget) -> Entries:
    """A call that was approved, for its workers. `now` is in ms since the epoch."""
    run, call = issue.run, issue.call
    step = run.steps[-1]
    event = ToolCall(
        run=run.run,
        ts=now,
        step=step.step,
        attempt=step.attempt,
        call=call.call,
        tool=call.tool,
        arguments=call.arguments,
        deadline=min(now + call.timeout_ms, budget.deadline(run)),
        needs_approval=True,
        timeout_ms=call.timeout_ms,
    )
    return [(subjects.call(call.tool), event)]


def _answer(
    run: RunState,
    step: int,
    attempt: int,
    finish: str,
    said: Spoken,
    calls: list[AnswerCall],
    usage: dict[str, int],
    now: int,
) -> Answer:
    first = said.first_token_ts
    return Answer(
        run=run.run,
        ts=now,
        step=step,
        attempt=attempt,
        finish=finish,
        text=said.text,
        thinking=said.thinking,
        calls=calls,
        usage=usage,
        deltas=said.deltas,
        sha256=said.sha256,
        first_token_ms=None if first is None else max(0, first - run.active_ts),
    )


def _terminal(end: End, reason: str, answer: Answer | None, facts: int, now: int) -> Terminal:
    run, step = end.run, end.run.step
    first_token_ms = run.first_token_ms
    if first_token_ms is None and answer is not None:
        first_token_ms = answer.first_token_ms
    usage = add_usage(run.usage, answer.usage if answer else {})
    number = answer.step if answer else step.step if step else 0
    attempt = answer.attempt if answer else step.attempt if step else 0
    if end.reason == "error":
        return Error(
            run=run.run,
            ts=now,
            step=number,
            attempt=attempt,
            code=end.code,
            message=end.message,
            retryable=end.retryable,
            usage=usage,
            first_token_ms=first_token_ms,
            duration_ms=now - run.active_ts,
        )
    return Done(
        run=run.run,
        ts=now,
        step=number,
        attempt=attempt,
        reason=end.reason if end.reason == "max_steps" else reason,
        usage=usage,
        first_token_ms=first_token_ms,
        duration_ms=now - run.active_ts,
        facts=facts,
    )


def _called(claim: Claim, asked: AnswerCall, offered: Mapping[str, ToolSpec], now: int, budget: Budget) -> Entries:
    """A `tool_call` for its workers, or for a person, which no worker sees; for a tool that nobody offers, its result
    as well.
    """
    run, spec = claim.run, offered.get(asked.tool)
    asks = spec is not None and spec.needs_approval
    timeout_ms = int(min(spec.timeout_s, limits.TOOL_TIMEOUT_S_MAX) * 1000) if spec else 0
    call = ToolCall(
        run=run.run,
        ts=now,
        step=claim.step,
        attempt=claim.attempt,
        call=asked.call,
        tool=asked.tool,
        arguments=asked.arguments,
        deadline=now + int(budget.approval_s * 1000) if asks else min(now + timeout_ms, budget.deadline(run)),
        needs_approval=asks,
        timeout_ms=timeout_ms if asks else 0,
    )
    if spec is not None:
        return [(subjects.MODEL if asks else subjects.call(asked.tool), call)]
    names = ", ".join(sorted(offered)) or "none"
    result = ToolResult(
        run=run.run,
        ts=now,
        call=asked.call,
        tool=asked.tool,
        outcome="error",
        is_error=True,
        message=f"there is no tool {asked.tool[:100]!r}; the tools are: {names}",
    )
    return [(subjects.MODEL, call), (subjects.MODEL, result)]
