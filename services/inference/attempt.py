"""One attempt at one step: claim it, stream the provider onto the tape, commit the answer.

The claim, every delta and the commit are fenced, so an attempt that another worker took over, or a run that was
stopped, can get no further; and the attempt follows its conversation, so that it learns so at once and closes
the provider's connection even while the provider says nothing.
"""

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
from opentelemetry import metrics, trace
from tapeline import counter, events, limits, subjects, telemetry
from tapeline.append import Chain, Overtaken
from tapeline.connection import Refused, Unavailable
from tapeline.fold import State, StepState
from tapeline.follow import follow
from tapeline.record import Record
from tapeline.registry import ToolSpec
from tapeline.tape import Gone, Tape

from .conclude import Spoken, answered, call_id, spoken
from .decide import Budget, Claim, Trigger, matters
from .deltas import Deltas, Full
from .history import prompt_of
from .model import Models
from .part import CallInput, Finish, ProviderError, Text, Thinking
from .prompt import Prompt

log = logging.getLogger(__name__)
_tracer = trace.get_tracer("tapeline")
_meter = metrics.get_meter("tapeline")
_retries: Final = _meter.create_counter("tapeline.provider.retries", "1", "Provider requests made again")
_takeovers: Final = _meter.create_counter("tapeline.takeovers", "1", "Steps taken over from another worker")


class Failed(Exception):
    """The attempt cannot become an answer. `again`: a fresh attempt may."""

    def __init__(self, error: ProviderError, *, again: bool) -> None:
        super().__init__(error.message)
        self.error = error
        self.again = again


@dataclass
class Attempt:
    """What an attempt needs to know, and what it has used."""

    tape: Tape
    models: Models
    conversation: str
    state: State
    claim: Claim
    trigger: Trigger
    worker: str
    model: str
    offered: Mapping[str, ToolSpec]
    budget: Budget
    clock: Callable[[], int]
    """ms since the epoch."""
    tokens: int = field(default=0, init=False)
    """Read and written by the model, whatever became of its answer."""

    async def make(self) -> None:
        """Makes the attempt. Raises `Overtaken`, `Failed`, and what an append raises."""
        run, claim = self.claim.run, self.claim
        with _tracer.start_as_current_span(
            f"chat {self.model}",
            kind=trace.SpanKind.CLIENT,
            attributes={
                "gen_ai.operation.name": "chat",
                "gen_ai.request.model": self.model.rpartition(":")[2],
                "gen_ai.conversation.id": self.conversation,
                "tapeline.run": run.run,
                "tapeline.step": claim.step,
                "tapeline.attempt": claim.attempt,
            },
            record_exception=False,  # a provider's error may quote what was said
            set_status_on_exception=False,
        ) as span:
            try:
                await self._make(span)
            except Failed as failed:
                span.set_attribute("error.type", failed.error.code)
                span.set_status(trace.StatusCode.ERROR)
                raise
            finally:  # also of one that was stopped or taken over: its provider wants to be paid
                await self._count()

    async def _make(self, span: trace.Span) -> None:
        claim = self.claim
        step = await self._claimed()
        # if something came between that matters: decide again
        claiming = Chain(self.tape, self.conversation, self.state.last_event_id, matters)
        seq = await claiming.append(subjects.MODEL, step, telemetry.carrier())
        chain = Chain(self.tape, self.conversation, seq, self._ends)
        deltas = Deltas(chain, step, self.clock)
        finish: Finish = await _first(self._produce(deltas, step.text), deltas.pump(), self._watch(seq))
        span.set_attribute("gen_ai.response.finish_reasons", [finish.reason])
        for name in ("input_tokens", "output_tokens"):
            span.set_attribute(f"gen_ai.usage.{name}", finish.usage.get(name, 0))
        entries = answered(claim, finish, deltas.said(), self.offered, self.clock(), self.budget)
        await chain.commit(entries, telemetry.carrier())

    async def _count(self) -> None:
        """Counts the tokens against the limit of the conversation's owner, when all who wait for the step have it. No
        run fails because that fails.
        """
        if self.state.about is None or not self.tokens:
            return
        try:
            await counter.add(self.tape, self.state.about.owner, counter.TOKENS, self.tokens, self.clock())
        except (Unavailable, Refused) as error:
            log.warning("%s: %d tokens were not counted: %s", self.conversation, self.tokens, error)

    async def _claimed(self) -> events.Step:
        """The claim as it goes into the log: what it takes over from, and what it keeps of that."""
        claim, over = self.claim, self.claim.over
        supersedes, kept = None, None
        if over is not None:
            last = self.state.last_event_id
            supersedes = events.Superseded(attempt=over.attempt, first=over.event_id, last=last)
            kept = await self._kept(over)
            if over.worker != self.worker:
                _takeovers.add(1)
        return events.Step(
            run=claim.run.run,
            ts=self.clock(),
            step=claim.step,
            attempt=claim.attempt,
            worker=self.worker,
            trigger=self.trigger.seq,
            delivery=self.trigger.delivery,
            model=self.model,
            supersedes=supersedes,
            resume="continue" if kept else "restart" if over else "",
            text=kept.text if kept else "",
            thinking=kept.thinking if kept else "",
        )

    async def _kept(self, over: StepState) -> Spoken | None:
        """What the lost attempt had said, where the model can go on from there; None to begin again."""
        if not self.models.continues(self.model):
            return None
        deltas = await self.tape.read(self.conversation, over.event_id, until=self.state.last_event_id)
        said = [record.event() for record in deltas]
        if any(isinstance(event, events.ToolInput) for event in said):
            return None  # half a call cannot be continued
        kept = spoken(said, self.claim.run.run, over)
        text = kept.text.rstrip()  # providers refuse to go on from a blank
        return dataclasses.replace(kept, text=text) if text else None

    def _ends(self, record: Record) -> bool:
        """Whether another's event ends this attempt: a stop, a takeover, the run's end."""
        match record.event():
            case events.Step(run=run, worker=worker):
                return run == self.claim.run.run and worker != self.worker
            case events.Stop(run=run) | events.Done(run=run) | events.Error(run=run):
                return run == self.claim.run.run
            case _:
                return False

    async def _watch(self, claimed: int) -> None:
        try:
            async with contextlib.aclosing(follow(self.tape, self.conversation, claimed)) as pages:
                async for page in pages:
                    for record in page:
                        if record.is_fact and self._ends(record):
                            raise Overtaken(record)
        except Gone as gone:
            raise Overtaken(None) from gone

    async def _produce(self, deltas: Deltas, begun: str) -> Finish:
        """Streams the provider; tries again while nothing is visible."""
        for wait_s in (*limits.PROVIDER_RETRY_S, None):
            try:
                return await self._stream(deltas, begun)
            except ProviderError as error:
                await deltas.flush()
                if not error.retryable:
                    raise Failed(error, again=False) from error
                if deltas.count or wait_s is None:
                    raise Failed(error, again=deltas.count > 0) from error
                log.warning("%s: %s; trying again", self.model, error.message)
                _retries.add(1, {"code": error.code})
                await asyncio.sleep(max(wait_s, error.retry_after_s or 0))
        raise AssertionError("the last try returns or raises")

    async def _stream(self, deltas: Deltas, begun: str) -> Finish:
        run, step = self.claim.run.run, self.claim.step
        prompt = prompt_of(self.state, self.claim.run, self.model, self.offered.values(), begun)
        finish, refused, before = None, False, deltas.bytes
        async with contextlib.aclosing(self.models.stream(prompt)) as parts:
            try:
                async for part in parts:
                    match part:
                        case Text(text=text):
                            await deltas.put(events.Token, text)
                        case Thinking(text=text):
                            await deltas.put(events.Thinking, text)
                        case CallInput(index=index, tool=tool, text=text):
                            await deltas.put(events.ToolInput, text, call_id(run, step, index), tool)
                        case Finish():
                            finish = part
            except Full:
                finish = Finish(reason="length", calls=[], usage={})
            except ProviderError:
                refused = deltas.bytes == before
                raise
            finally:
                if not refused:
                    self.tokens += _tokens(finish, prompt, deltas.bytes - before)
        await deltas.flush()
        if finish is None:
            raise AssertionError("a provider's stream ends with Finish or raises")
        return finish


def _tokens(finish: Finish | None, prompt: Prompt, said_bytes: int) -> int:
    """What one request used: as its provider counted, or an estimate where that has said nothing."""
    usage = finish.usage if finish else {}
    counted = usage.get("input_tokens", 0) + usage.get("output_tokens", 0)
    return counted or (len(msgspec.json.encode(prompt)) + said_bytes) // limits.TOKEN_BYTES


async def _first(*work: Coroutine[Any, Any, Any]) -> Any:
    """Runs these side by side until one returns or raises; the others are cancelled, and have ended."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        failed = [task for task in done if task.exception() is not None]
        return (failed or list(done))[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
