"""The worker: takes calls of its tools from every shard, runs them, and writes what came of them to the tape.

Everything that is written goes through `append`, under the conversation's fence: a claim before the tool runs,
progress while it does, and one result. Nothing that matters lives in this process.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import aclosing
from typing import Final

from opentelemetry import metrics, trace
from opentelemetry.context import attach

from tapeline import events, limits, settings, subjects, telemetry
from tapeline.append import Chain, Overtaken
from tapeline.clock import now_ms
from tapeline.connection import Unavailable
from tapeline.delivery import Deliveries, Delivery
from tapeline.events import Done, Error, Stop, ToolCall, ToolProgress, ToolResult, ToolStarted
from tapeline.fold import fold
from tapeline.follow import follow
from tapeline.registry import Registry
from tapeline.settings import ConfigError, Settings
from tapeline.tape import Record, Tape

from . import consumer
from .context import Context
from .decision import Nothing, Run, Settle, decide
from .definition import AnyTool
from .execution import Result, run

log = logging.getLogger(__name__)

_tracer = trace.get_tracer("tapeline")
_meter = metrics.get_meter("tapeline")
_duration: Final = _meter.create_histogram("gen_ai.execute_tool.duration", "s", "From a call's claim to its result")
_queued: Final = _meter.create_histogram("tapeline.tool.queue_time", "s", "From a tool_call to its claim")


def serve(tools: Iterable[AnyTool], pool: str = "") -> None:
    """Runs a worker for these tools until SIGTERM or SIGINT: the whole life of a process.

    Settings: `TAPELINE_NATS_URL`, required, and `TAPELINE_POOL`, which goes before `pool`.
    """

    async def main(environment: Settings) -> None:
        telemetry.setup("tools")
        try:
            await _serve(list(tools), environment.text("TAPELINE_POOL", pool), environment.nats_url)
        finally:
            telemetry.shutdown()

    settings.run("tools", main)


async def _serve(tools: list[AnyTool], pool: str, nats_url: str) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    tape = await Tape.open(nats_url, "tapeline-tools")
    try:
        worker = Worker(tape, tools, pool, nats_url)
        await worker.start()
        print(f"tools ready: {', '.join(sorted(worker.tools))}", flush=True)
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({stopping, worker.upkeep}, return_when=asyncio.FIRST_COMPLETED)
        await worker.stop()
        if not stopping.done():
            stopping.cancel()
            await worker.upkeep  # it ended by itself: say why
    finally:
        await tape.close()
    await _leave_behind()


async def _leave_behind() -> None:
    """Tools that ignore their cancellation would keep the event loop, and so the process, for ever."""
    left = {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}
    for task in left:
        task.cancel()
    if left and (await asyncio.wait(left, timeout=limits.TOOL_CANCEL_S))[1]:
        log.warning("ending, although tools are left that do not")
        telemetry.shutdown()
        logging.shutdown()
        os._exit(0)


class Worker:
    """One worker process: its tools, and the calls it has. `upkeep` ends only with an error, which says why."""

    upkeep: asyncio.Task[None]

    def __init__(self, tape: Tape, tools: list[AnyTool], pool: str, nats_url: str) -> None:
        self.tape = tape
        self.pool = pool
        self.tools = {tool.name: tool for tool in tools}
        if not tools:
            raise ConfigError("there are no tools to serve")
        if len(self.tools) < len(tools):
            raise ConfigError("two tools have the same name")
        if pool and not subjects.is_tool(pool):
            raise ConfigError(f"the pool's name {pool!r} must be letters, digits, _ and -, 64 at most")
        self.id = f"{pool or 'tools'}-{secrets.token_hex(4)}"
        self.registry = Registry(tape, self.id)
        self._slots = {name: asyncio.Semaphore(limits.TOOL_CALLS_PER_WORKER) for name in self.tools}
        self._held: dict[str, Delivery] = {}  # by call: those that wait for a slot, and those that run
        self._calls: set[asyncio.Task[None]] = set()
        self._draining = False
        self._cut = asyncio.Event()
        self._deliveries = Deliveries(nats_url, "tapeline-tools-delivery", self._take)
        for tool in self.tools:
            for shard in range(tape.deployment.shards):
                subject = subjects.chain(shard, "*", subjects.call(tool))
                self._deliveries.bind(subjects.stream(shard), subjects.tool_consumer(tool), subject)

    async def start(self) -> None:
        """Takes calls, and then offers its tools. Raises `Refused`, `Unavailable`."""
        await self.tape.patiently("JetStream", self._ensure_consumers)
        await self._deliveries.start()
        await self._announce()
        self.upkeep = asyncio.create_task(self._keep_up())

    async def stop(self) -> None:
        """Takes no more calls, lets those that run end for `DRAIN_S`, and cuts the rest: an idempotent tool's go
        to another worker, any other's end as `unknown`.
        """
        self._draining = True
        self.upkeep.cancel()
        await self._deliveries.stop_taking()
        for slot in self._slots.values():
            slot.release()  # whoever waits for one gives its call back, and the slot to the next
        try:
            await self.registry.withdraw()
        except Unavailable as error:
            log.warning("could not withdraw the tools, they expire by themselves: %s", error)
        await self._calls_end(limits.DRAIN_S)
        self._cut.set()
        await self._calls_end(limits.APPEND_TIMEOUT_S)
        await self._deliveries.close()

    async def _calls_end(self, within_s: float) -> None:
        if self._calls:
            await asyncio.wait(self._calls, timeout=within_s)

    # What keeps the worker in business

    async def _keep_up(self) -> None:
        while True:
            await asyncio.sleep(limits.REGISTRY_REFRESH_S)
            await self._deliveries.check()
            try:
                await self._announce()
                if made := await self._ensure_consumers():
                    log.warning("%d consumers were gone, and are there again", made)
            except Unavailable as error:
                log.warning("%s; trying again in %g s", error, limits.REGISTRY_REFRESH_S)

    async def _announce(self) -> None:
        await self.registry.announce(tool.spec(self.pool) for tool in self.tools.values())

    async def _ensure_consumers(self) -> int:
        """Makes those that are absent; how many. A deleted consumer looks like one without messages."""
        made = 0
        for tool in self.tools:
            for shard in range(self.tape.deployment.shards):
                made += await consumer.ensure(self.tape, tool, shard)
        return made

    # Deliveries

    async def _take(self, delivery: Delivery) -> None:
        """One delivery. Returns when its call has a slot to run in."""
        conversation, kind = subjects.split(delivery.subject)
        try:
            call = _call(delivery.data, kind)
            if delivery.number > limits.TOOL_DELIVERIES_MAX:
                raise _Poison(f"delivered {delivery.number - 1} times in vain")
        except _Poison as poison:
            await self._bury(delivery, str(poison))
            return
        if mine := self._held.get(call.call):
            mine.renew(delivery)  # our word that we are at work did not get through
            return
        self._held[call.call] = delivery
        try:
            await self._slots[call.tool].acquire()
        except BaseException:  # cancelled while it waited for a slot, as a rule
            delivery.leave()
            raise
        task = asyncio.create_task(self._handle(conversation, call, delivery))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _bury(self, delivery: Delivery, why: str) -> None:
        try:
            await delivery.bury(self.tape, "tools", why)
        except Unavailable as error:
            log.warning("no dead letter yet, it will be delivered again: %s", error)
            delivery.leave()
        else:
            await delivery.drop()

    async def _handle(self, conversation: str, call: ToolCall, delivery: Delivery) -> None:
        attach(telemetry.context(delivery.headers))  # for this task only, so it need not be detached
        try:
            if self._draining:
                await delivery.give_back()
            else:
                await self._process(conversation, call, delivery)
        except Unavailable as error:
            log.warning("call %s: %s; it will be delivered again", call.call, error)
        except Exception:
            log.exception("call %s could not be handled; it will be delivered again", call.call)
        finally:
            delivery.leave()
            del self._held[call.call]
            self._slots[call.tool].release()

    # One call

    async def _process(self, conversation: str, call: ToolCall, delivery: Delivery) -> None:
        """Decides, acts, and decides again where another writer came first, until there is nothing left to do."""
        tool = self.tools[call.tool]
        while True:
            pages = self.tape.pages(conversation, kind=subjects.FACTS, until=delivery.seq)
            facts = [record async for page in pages for record in page]
            if not facts or facts[-1].seq < delivery.seq:
                await delivery.ack()  # the conversation was purged
                return
            # The fence is the last fact, not the last event: what came after it, the chain reads before it appends.
            chain = Chain(self.tape, conversation, facts[-1].seq, ends=_ends_work(call))
            action = decide(fold(facts), call, delivery.number, now_ms(), idempotent=tool.idempotent)
            try:
                match action:
                    case Nothing(over=False):
                        return
                    case Nothing():
                        pass
                    case Settle(outcome, message):
                        await self._conclude(chain, call, Result(outcome, message=message), 0)
                    case Run() if not await self._run(tool, chain, call, action, delivery):
                        await delivery.give_back()
                        return
            except Overtaken as overtaken:
                log.info("call %s: %s", call.call, overtaken)
            else:
                await delivery.ack()
                return

    async def _run(self, tool: AnyTool, chain: Chain, call: ToolCall, action: Run, delivery: Delivery) -> bool:
        """Claims the call, runs the tool and writes the result. False: it was cut, and another worker may run it."""
        decided_on = chain.last
        claim = ToolStarted(
            run=call.run,
            ts=now_ms(),
            call=call.call,
            tool=call.tool,
            worker=self.id,
            attempt=action.attempt,
            delivery=delivery.number,
        )
        await chain.append(subjects.TOOL, claim, telemetry.carrier())
        _queued.record(max(0.0, time.time() - delivery.stored_at.timestamp()), {"gen_ai.tool.name": tool.name})
        attributes = {
            "gen_ai.operation.name": "execute_tool",
            "gen_ai.tool.name": tool.name,
            "gen_ai.tool.call.id": call.call,
            "gen_ai.conversation.id": chain.conversation,
        }
        with _tracer.start_as_current_span(f"execute_tool {tool.name}", attributes=attributes) as span:
            started = time.monotonic()
            result = await self._execute(tool, chain, call, action, decided_on)
            if result is None:
                return False
            duration_s = time.monotonic() - started
            if result.is_error:
                span.set_attribute("error.type", result.outcome)
                span.set_status(trace.StatusCode.ERROR)  # what it says may be content
            _duration.record(duration_s, {"gen_ai.tool.name": tool.name, "tapeline.tool.outcome": result.outcome})
            await self._conclude(chain, call, result, int(duration_s * 1000))
        return True

    async def _execute(
        self, tool: AnyTool, chain: Chain, call: ToolCall, action: Run, decided_on: int
    ) -> Result | None:
        """Runs the tool while others report its progress and look out for a stop. None: cut, may run again."""
        progress = _Progress()
        context = Context(
            tool=tool.name,
            call=call.call,
            deadline=action.call.deadline / 1000,
            attempt=action.attempt,
            say=progress.say,
        )
        work = asyncio.create_task(run(tool, action.call.arguments, context))
        cut = asyncio.create_task(self._cut.wait())
        helpers = [
            asyncio.create_task(self._report(progress, chain, call, context)),
            asyncio.create_task(self._watch(chain.conversation, decided_on, call, context)),
        ]
        try:
            await asyncio.wait({work, cut}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            if tool.idempotent:
                return None
            message = "its worker was shut down while it ran; whether it had its effect is not known"
            return Result("unknown", message=message)
        finally:
            for task in (work, cut, *helpers):
                task.cancel()
            for outcome in await asyncio.gather(work, cut, *helpers, return_exceptions=True):
                if isinstance(outcome, Exception):
                    log.error("call %s: a helper failed", call.call, exc_info=outcome)

    async def _conclude(self, chain: Chain, call: ToolCall, result: Result, duration_ms: int) -> None:
        # Not the chain's own end: a result may come after its run's, for the audit.
        chain = Chain(self.tape, chain.conversation, chain.last, ends=_ends(call, mine=self.id))
        event = ToolResult(
            run=call.run,
            ts=now_ms(),
            call=call.call,
            tool=call.tool,
            outcome=result.outcome,
            is_error=result.is_error,
            content=result.content,
            message=result.message,
            duration_ms=duration_ms,
        )
        while True:
            try:
                await chain.append(subjects.TOOL, event, telemetry.carrier())
            except Unavailable as error:
                if now_ms() > call.deadline:  # by now inference has settled the call, or will
                    raise
                log.warning("call %s: the result is not written yet: %s", call.call, error)
            else:
                return

    async def _report(self, progress: "_Progress", chain: Chain, call: ToolCall, context: Context) -> None:
        """Appends the newest progress, at most one every `PROGRESS_INTERVAL_S`."""
        while True:
            fraction, message = await progress.next()
            event = ToolProgress(
                run=call.run, ts=now_ms(), call=call.call, tool=call.tool, fraction=fraction, message=message
            )
            try:
                await chain.append(subjects.TOOL_DELTA, event)
            except Overtaken:
                context.stopped.set()
                return
            except Unavailable as error:
                log.warning("call %s: progress was dropped: %s", call.call, error)
            await asyncio.sleep(limits.PROGRESS_INTERVAL_S)

    async def _watch(self, conversation: str, after: int, call: ToolCall, context: Context) -> None:
        """Tells the tool when its run was stopped or has ended, or when its call was taken from this worker."""
        ends = _ends(call, mine=self.id)
        while not context.stopped:
            try:
                async with aclosing(follow(self.tape, conversation, after)) as pages:
                    async for page in pages:
                        for record in page:
                            after = record.seq
                            if _ends_run(record, call) or ends(record):
                                context.stopped.set()
                                return
            except Unavailable as error:
                log.warning("call %s: a stop would not be seen: %s", call.call, error)
                await asyncio.sleep(limits.READ_RETRY_S)


class _Progress:
    """The newest progress that has not been reported. Said in any thread, read on the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._newest: tuple[float | None, str] = None, ""
        self._said = asyncio.Event()

    def say(self, fraction: float | None, message: str) -> None:
        self._newest = fraction, message
        with contextlib.suppress(RuntimeError):  # a thread left behind, and the loop has closed
            self._loop.call_soon_threadsafe(self._said.set)

    async def next(self) -> tuple[float | None, str]:
        await self._said.wait()
        self._said.clear()
        return self._newest


class _Poison(Exception):
    """A delivery that can never be handled. The message says why."""


def _call(data: bytes, kind: str) -> ToolCall:
    """The call in a delivery. Raises `_Poison`."""
    try:
        event = events.decode(data)
    except events.Undecodable as error:
        raise _Poison(f"no event: {error}") from error
    if not isinstance(event, ToolCall):
        raise _Poison(f"an event of type {event.type if isinstance(event, events.Unknown) else type(event).__name__}")
    if subjects.call(event.tool) != kind:
        raise _Poison(f"a call of {event.tool!r}, which is another tool")
    return event


def _ends(call: ToolCall, mine: str = "") -> Callable[[Record], bool]:
    """Whether an event ends a worker's right to write about this call: its result, or a claim not by `mine`."""

    def ends(record: Record) -> bool:
        if not record.is_fact:
            return False
        event = record.event()
        if isinstance(event, ToolStarted):
            return event.call == call.call and event.worker != mine
        return isinstance(event, ToolResult) and event.call == call.call

    return ends


def _ends_work(call: ToolCall) -> Callable[[Record], bool]:
    """Whether an event ends a worker's right to begin this call, or to say how far it is."""
    ends = _ends(call)
    return lambda record: ends(record) or _ends_run(record, call)


def _ends_run(record: Record, call: ToolCall) -> bool:
    if not record.is_fact:
        return False
    event = record.event()
    return isinstance(event, Stop | Done | Error) and event.run == call.run
