"""The inference service, wired: triggers from every shard's durable consumer to the engine."""

import asyncio
import logging
import os
import signal
import socket
import sys

from opentelemetry import context, trace
from tapeline import limits, provision, subjects, telemetry
from tapeline.connection import Unavailable
from tapeline.delivery import Deliveries, Delivery
from tapeline.events import Undecodable, peek
from tapeline.registry import Registry
from tapeline.settings import Settings
from tapeline.tape import Tape

from .decide import Budget, Trigger
from .engine import Engine
from .model import Models

log = logging.getLogger(__name__)
_tracer = trace.get_tracer("tapeline")


class Inference:
    """One inference process: its engine, and the triggers it holds."""

    def __init__(self, engine: Engine, nats_url: str, shards: int) -> None:
        self.engine = engine
        self.deliveries = Deliveries(nats_url, "tapeline-inference-delivery", self._take)
        self.shards = shards
        self._held: dict[tuple[str, int], Delivery] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Semaphore(limits.RUNS_PER_WORKER_MAX)
        self._stopping = False

    async def start(self) -> None:
        """Takes triggers. Raises `Unavailable`."""
        await self.deliveries.start()
        for shard in range(self.shards):
            await self.deliveries.bind(subjects.stream(shard), subjects.TRIGGERS, f"tape.{shard}.>")
        await self.deliveries.bind(subjects.WAKES, subjects.TRIGGERS, "wake.*.due.>")

    async def stop(self) -> None:
        """Hands over what is under way: other workers go on with it at once."""
        self._stopping = True
        self.deliveries.stop_taking()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.deliveries.close()

    async def _take(self, delivery: Delivery) -> None:
        """One delivery of one trigger. Returns when there is a slot to handle it in."""
        held = (delivery.stream, delivery.seq)
        if mine := self._held.get(held):
            mine.renew(delivery)  # our word that we are at work did not get through
            return
        self._held[held] = delivery
        try:
            await self._slots.acquire()
        except BaseException:  # cancelled while it waited for a slot, as a rule
            delivery.leave()
            raise
        if self._stopping:  # which is why there is a slot
            await delivery.give_back()
            return
        task = asyncio.create_task(self._handle(delivery))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _handle(self, delivery: Delivery) -> None:
        """Acknowledges the trigger when all there is to do has been done, and only then."""
        conversation, kind = subjects.split(delivery.subject)
        try:
            if why := _poison(delivery, kind):
                await delivery.bury(self.engine.tape, "inference", why)
                at = sys.maxsize if kind == subjects.DUE else delivery.seq  # a timer comes after its run's message
                await self.engine.fail(conversation, at, "poison", f"the run met {why}")
                await delivery.drop()
            elif await self._react(conversation, kind, delivery):
                await delivery.ack()
        except asyncio.CancelledError:
            await delivery.give_back()
            raise
        except Unavailable as error:
            log.warning("%s: %s; the trigger will come again", conversation, error)
        except Exception:
            log.exception("%s: a trigger could not be handled; it will come again", conversation)
            await delivery.give_back(limits.TRIGGER_AGAIN_S)
        finally:
            delivery.leave()
            del self._held[(delivery.stream, delivery.seq)]
            self._slots.release()

    async def _react(self, conversation: str, kind: str, delivery: Delivery) -> bool:
        context.attach(telemetry.context(delivery.headers))  # for this task only, so it need not be detached
        attributes = {"gen_ai.conversation.id": conversation}
        with _tracer.start_as_current_span("react", kind=trace.SpanKind.CONSUMER, attributes=attributes):
            return await self.engine.react(conversation, Trigger(_number(delivery, kind), delivery.number))


def _number(delivery: Delivery, kind: str) -> int:
    """Which trigger it is: its event's sequence; a timer's, which is another stream's, below 0."""
    return -delivery.seq if kind == subjects.DUE else delivery.seq


def _poison(delivery: Delivery, kind: str) -> str:
    """Why this trigger can never be handled; empty where it can."""
    if delivery.number > limits.TRIGGER_DELIVERIES_MAX:
        return f"a trigger that was delivered {delivery.number - 1} times in vain"
    if kind == subjects.DUE:
        return ""
    try:
        peek(delivery.data)
    except Undecodable as error:
        return f"a trigger that is no event: {error}"
    return ""


async def _watch(tape: Tape, deliveries: Deliveries) -> None:
    """Ends with `Refused` when what this service needs in NATS is no longer there: a consumer that somebody
    deleted, or one that cannot be reached, looks like one that has nothing to deliver."""
    while True:
        await asyncio.sleep(limits.DRIFT_CHECK_S)
        await deliveries.check()
        try:
            await provision.verify(tape)
        except Unavailable:
            log.warning("NATS is away; what is under way waits for it")


async def main(settings: Settings) -> None:
    """Runs the service until SIGTERM or SIGINT."""
    telemetry.setup("inference")
    default_model = settings.text("TAPELINE_MODEL", "demo")
    models = Models(default_model, settings.environ)
    models.check(default_model)
    tape = await Tape.open(settings.nats_url, "tapeline-inference")
    await provision.verify_patiently(tape)
    worker = f"{socket.gethostname()}-{os.getpid()}-{os.urandom(3).hex()}"
    budget = Budget(
        run_s=settings.number("TAPELINE_RUN_DEADLINE_S", int(limits.RUN_DEADLINE_S), least=1),
        steps=settings.number("TAPELINE_STEPS_MAX", limits.STEPS_MAX, least=1),
        approval_s=settings.number("TAPELINE_APPROVAL_S", int(limits.APPROVAL_S), least=1),
    )
    engine = Engine(tape, Registry(tape), models, default_model, budget, worker)
    inference = Inference(engine, settings.nats_url, tape.deployment.shards)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await inference.start()
    print(f"inference ready: {worker}, model {default_model}", flush=True)
    watching = asyncio.create_task(_watch(tape, inference.deliveries))
    stopping = asyncio.create_task(stop.wait())
    try:
        done, _ = await asyncio.wait({watching, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if watching in done:
            await watching  # what drifted, as the reason to end
    finally:
        watching.cancel()
        await inference.stop()
        await models.aclose()
        await tape.close()
        telemetry.shutdown()
