"""One worker's attempt at one call: the claim, the tool while it runs, and the result, all under the fence.

Everything that is written goes through `append`: whoever comes first counts, and the others decide again.
"""

import asyncio
import enum
import logging
import time
from contextlib import aclosing
from typing import Final

from opentelemetry import metrics, trace

from tapeline import limits, results, subjects, telemetry
from tapeline.append import Chain, Overtaken
from tapeline.clock import now_ms
from tapeline.connection import Refused, Unavailable
from tapeline.delivery import Delivery
from tapeline.events import Done, Error, Stop, Stored, ToolCall, ToolProgress, ToolResult, ToolStarted
from tapeline.fold import fold
from tapeline.follow import follow
from tapeline.record import Record
from tapeline.tape import Gone, Tape

from .context import Context
from .decision import Nothing, Run, Settle, decide
from .desk import Desk
from .execution import Large, Result, run
from .report import Report

log = logging.getLogger(__name__)

_tracer = trace.get_tracer("tapeline")
_meter = metrics.get_meter("tapeline")
_duration: Final = _meter.create_histogram("gen_ai.execute_tool.duration", "s", "From a call's claim to its result")
_queued: Final = _meter.create_histogram("tapeline.tool.queue_time", "s", "From a tool_call to its claim")


class _End(enum.Enum):
    """What an event ends for the worker of a call."""

    WORK = enum.auto()
    """Its right to begin, or to say how far it is, its run being stopped or over. The result may be written yet."""
    CALL = enum.auto()
    """Its right to write anything: somebody else has claimed the call, or its result is there."""


class Attempt:
    """What the worker of that name does at a desk with one delivery of one call. `cut` is set when it must end at
    once."""

    def __init__(
        self,
        tape: Tape,
        worker: str,
        desk: Desk,
        conversation: str,
        call: ToolCall,
        delivery: Delivery,
        cut: asyncio.Event,
    ) -> None:
        self.tape = tape
        self.worker = worker
        self.desk = desk
        self.tool = desk.tool
        self.conversation = conversation
        self.call = call
        self.delivery = delivery
        self.cut = cut

    async def make(self) -> None:
        """Decides, acts, and decides again where another writer came first, until there is nothing left to do.

        Raises `Unavailable`: it will be delivered again.
        """
        while True:
            pages = self.tape.pages(self.conversation, kind=subjects.FACTS, until=self.delivery.seq)
            facts = [record async for page in pages for record in page]
            if not facts or facts[-1].seq < self.delivery.seq:
                await self.delivery.ack()  # the conversation was purged
                return
            action = decide(
                fold(facts),
                self.call,
                self.delivery.number,
                now_ms(),
                idempotent=self.tool.idempotent,
                needs_approval=self.tool.needs_approval,
            )
            # The fence is the last fact, not the last event: what came after it, the chain reads before it appends.
            decided_on = facts[-1].seq
            try:
                match action:
                    case Nothing(over=False):
                        return
                    case Nothing():
                        pass
                    case Settle(outcome, message):
                        await self._conclude(decided_on, Result(outcome, message=message), 0)
                    case Run() if not await self._run(decided_on, action):
                        await self.delivery.give_back()
                        return
            except Overtaken as overtaken:
                log.info("call %s: %s", self.call.call, overtaken)
            else:
                await self.delivery.ack()
                return

    async def _run(self, decided_on: int, action: Run) -> bool:
        """Claims the call, runs the tool and writes the result. False: it was cut or lost, and may be run again."""
        chain = Chain(self.tape, self.conversation, decided_on, ends=lambda record: self._end(record) is not None)
        claim = ToolStarted(
            run=self.call.run,
            ts=now_ms(),
            call=self.call.call,
            tool=self.call.tool,
            worker=self.worker,
            attempt=action.attempt,
            delivery=self.delivery.number,
            idempotent=self.tool.idempotent,
        )
        await chain.append(subjects.TOOL, claim, telemetry.carrier())
        name = {"gen_ai.tool.name": self.tool.name}
        _queued.record(max(0.0, time.time() - self.delivery.stored_at.timestamp()), name)
        attributes = {
            "gen_ai.operation.name": "execute_tool",
            "gen_ai.tool.call.id": self.call.call,
            "gen_ai.conversation.id": self.conversation,
        }
        with _tracer.start_as_current_span(f"execute_tool {self.tool.name}", attributes=attributes | name) as span:
            started = time.monotonic()
            result = await self._execute(chain, action, decided_on)
            if result is None:
                return False
            duration_s = time.monotonic() - started
            if result.is_error:
                span.set_attribute("error.type", result.outcome)
                span.set_status(trace.StatusCode.ERROR)  # what it says may be content
            _duration.record(duration_s, name | {"tapeline.tool.outcome": result.outcome})
            await self._conclude(chain.last, result, int(duration_s * 1000), action.attempt)
        return True

    async def _execute(self, chain: Chain, action: Run, decided_on: int) -> Result | None:
        """Runs the tool while others write what it says and look out for a stop. None: it may run again."""
        report = Report()
        context = Context(
            tool=self.tool.name,
            call=self.call.call,
            deadline=action.call.deadline / 1000,
            attempt=action.attempt,
            say=report.say,
            room=report.room,
        )
        work = asyncio.create_task(run(self.desk, action.call.arguments, context))
        cut = asyncio.create_task(self.cut.wait())
        reporting = asyncio.create_task(self._report(report, chain, context))
        watching = asyncio.create_task(self._watch(decided_on, context))
        try:
            await asyncio.wait({work, cut}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                report.end()
                await asyncio.wait({reporting})  # what it said comes before its result
                result = work.result()
                return None if result.outcome == "unknown" and self.tool.idempotent else result
            if self.tool.idempotent:
                return None
            message = "its worker was shut down while it ran; whether it had its effect is not known"
            return Result("unknown", message=message)
        finally:
            report.end()
            tasks = (work, cut, reporting, watching)
            for task in tasks:
                task.cancel()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(outcome, Exception):
                    log.error("call %s: a helper failed", self.call.call, exc_info=outcome)

    async def _conclude(self, after: int, result: Result, duration_ms: int, attempt: int = 0) -> None:
        stored = None
        if result.large is not None:
            try:
                stored = await self._store(result.large, attempt)
            except Refused as refused:
                log.exception("call %s: its result cannot be stored", self.call.call)
                result = Result("error", message=f"the tool {self.tool.name} returned what cannot be stored: {refused}")
        # Not the end of its work: a result may come after its run's, for the audit.
        chain = Chain(
            self.tape, self.conversation, after, ends=lambda record: self._end(record, self.worker) is _End.CALL
        )
        event = ToolResult(
            run=self.call.run,
            ts=now_ms(),
            call=self.call.call,
            tool=self.call.tool,
            outcome=result.outcome,
            is_error=result.is_error,
            content=result.content,
            stored=stored,
            message=result.message,
            duration_ms=duration_ms,
        )
        while True:
            try:
                await chain.append(subjects.TOOL, event, telemetry.carrier())
            except Unavailable as error:
                if now_ms() > self.call.deadline:  # by now inference has settled the call, or will
                    raise
                log.warning("call %s: the result is not written yet: %s", self.call.call, error)
            else:
                return

    async def _store(self, large: Large, attempt: int) -> Stored:
        """Before its event is written, so that whoever sees that has all of it."""
        of = (self.conversation, self.call.call, attempt)
        return await results.store(self.tape, *of, large.data, large.preview, self.call.deadline)

    async def _report(self, report: Report, chain: Chain, context: Context) -> None:
        """Appends what the tool says, every `PROGRESS_INTERVAL_S` at most, until it has ended and all is written."""
        over = False
        while not over:
            await report.stirred()
            over = report.ended  # then nothing comes after what is taken now
            try:
                for progress, text in report.take():
                    event = ToolProgress(
                        run=self.call.run,
                        ts=now_ms(),
                        call=self.call.call,
                        tool=self.call.tool,
                        fraction=progress.fraction,
                        message=progress.message,
                        text=text,
                    )
                    await chain.append(subjects.TOOL_DELTA, event)
            except Overtaken:
                context.stopped.set()
                report.end()
                return
            except Unavailable as error:
                log.warning("call %s: what it said is dropped: %s", self.call.call, error)
                report.cut()
            await report.pause()

    async def _watch(self, after: int, context: Context) -> None:
        """Tells the tool when its run was stopped or has ended, its call taken from this worker, or the conversation
        deleted."""
        while not context.stopped:
            try:
                async with aclosing(follow(self.tape, self.conversation, after)) as pages:
                    async for page in pages:
                        for record in page:
                            after = record.seq
                            if self._end(record, self.worker):
                                context.stopped.set()
                                return
            except Gone:
                context.stopped.set()  # nobody will see what comes of it
            except Unavailable as error:
                log.warning("call %s: a stop would not be seen: %s", self.call.call, error)
                await asyncio.sleep(limits.READ_RETRY_S)

    def _end(self, record: Record, mine: str = "") -> _End | None:
        """What somebody's event ends, if anything. A claim by `mine` ends nothing."""
        if not record.is_fact:
            return None
        event = record.event()
        if isinstance(event, Stop | Done | Error):
            return _End.WORK if event.run == self.call.run else None
        if isinstance(event, ToolStarted | ToolResult) and event.call == self.call.call:
            return None if isinstance(event, ToolStarted) and event.worker == mine else _End.CALL
        return None
