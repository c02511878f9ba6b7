"""The inference service, wired: triggers from every shard's durable consumer, through FastStream, to the engine.

FastStream delivers; it declares nothing, decodes nothing and acknowledges nothing by itself (see field notes).
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator
from typing import Any

import nats.errors
from faststream import AckPolicy
from faststream.nats import JStream, NatsBroker, NatsMessage, PullSub
from opentelemetry import context, trace
from tapeline import limits, provision, subjects, telemetry
from tapeline.events import Undecodable, peek
from tapeline.registry import Registry
from tapeline.settings import Settings
from tapeline.tape import Pulse, Tape, Unavailable, servers

from .decide import Budget, Trigger
from .engine import Engine
from .provider import Models

log = logging.getLogger(__name__)
_tracer = trace.get_tracer("tapeline")


class Inference:
    """One inference process: its engine, and the triggers it holds."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._held: dict[tuple[str, int], asyncio.Future[bool]] = {}

    async def handle(self, message: NatsMessage) -> None:
        """One delivery of one trigger. Acknowledged when all there is to do has been done, and only then."""
        raw = message.raw_message
        metadata = raw.metadata
        trigger = Trigger(metadata.sequence.stream, metadata.num_delivered)
        conversation, kind = subjects.split(raw.subject)
        try:
            if kind != "due":
                peek(raw.data)
        except Undecodable as error:
            await self._bury(message, conversation, f"a trigger that is no event: {error}")
            return
        if trigger.delivery > limits.TRIGGER_DELIVERIES_MAX:
            await self._bury(message, conversation, f"delivered {trigger.delivery - 1} times in vain")
            return
        held = (metadata.stream, trigger.seq)
        async with _kept_alive(message):
            try:
                if held in self._held:  # our own acks did not get through: the first delivery is still at work
                    acknowledge = await asyncio.shield(self._held[held])
                else:
                    acknowledge = await self._react(held, conversation, trigger, message)
            except asyncio.CancelledError:
                await raw.nak()  # this process is going: another worker continues at once
                raise
            except Unavailable as error:
                log.warning("%s: %s; the trigger will come again", conversation, error)
                return
            except Exception:
                log.exception("%s: a trigger could not be handled; it will come again", conversation)
                await raw.nak(delay=1.0)
                return
        if acknowledge:
            await message.ack()

    async def _react(self, held: tuple[str, int], conversation: str, trigger: Trigger, message: NatsMessage) -> bool:
        result: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._held[held] = result
        token = context.attach(telemetry.context(message.headers))
        try:
            with _tracer.start_as_current_span(
                "react", kind=trace.SpanKind.CONSUMER, attributes={"gen_ai.conversation.id": conversation}
            ):
                acknowledge = await self.engine.react(conversation, trigger)
            result.set_result(acknowledge)
            return acknowledge
        finally:
            context.detach(token)
            del self._held[held]
            if not result.done():
                result.set_result(False)

    async def _bury(self, message: NatsMessage, conversation: str, why: str) -> None:
        """A trigger that can never be handled: into the dead letters, and its run ends with an error."""
        raw = message.raw_message
        log.error("%s: %s: dead letter", conversation, why)
        headers = {
            "Tapeline-Subject": raw.subject,
            "Tapeline-Sequence": str(raw.metadata.sequence.stream),
            "Tapeline-Reason": why.encode("ascii", "replace").decode().replace("\r", " ").replace("\n", " "),
        }
        await self.engine.tape.bury("inference", raw.data, headers)
        await self.engine.fail(conversation, "poison", f"the run met {why}")
        await raw.term()


@contextlib.asynccontextmanager
async def _kept_alive(message: NatsMessage) -> AsyncIterator[None]:
    """While open, the server is told that the trigger is being worked on, so that nobody else gets it."""

    async def beat() -> None:
        while True:
            await asyncio.sleep(limits.IN_PROGRESS_S)
            with contextlib.suppress(nats.errors.Error):  # NATS is away: redelivery is what we would want then
                await message.in_progress()

    task = asyncio.create_task(beat())
    try:
        yield
    finally:
        task.cancel()


async def _raw(message: NatsMessage) -> Any:
    return message.body


def subscribe(broker: NatsBroker, inference: Inference, shards: int) -> None:
    """One pull subscriber per shard, on the consumer that provision made."""
    for shard in range(shards):
        subscriber = broker.subscriber(
            f"tape.{shard}.>",
            stream=JStream(subjects.stream(shard), declare=False),
            durable=subjects.TRIGGERS,
            pull_sub=PullSub(batch_size=1, timeout=5.0),
            max_workers=limits.RUNS_PER_WORKER_MAX,
            ack_policy=AckPolicy.MANUAL,
            decoder=_raw,
        )
        subscriber(inference.handle)


async def _watch(tape: Tape, delivery: Pulse) -> None:
    """Ends with `Refused` when what this service needs in NATS is no longer there: a consumer that somebody
    deleted, or one that cannot be reached, looks like one that has nothing to deliver."""
    while True:
        await asyncio.sleep(limits.DRIFT_CHECK_S)
        await delivery.take()
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
    await provision.verify(tape)
    worker = f"{socket.gethostname()}-{os.getpid()}-{os.urandom(3).hex()}"
    budget = Budget(
        run_s=settings.number("TAPELINE_RUN_DEADLINE_S", int(limits.RUN_DEADLINE_S), least=1),
        steps=settings.number("TAPELINE_STEPS_MAX", limits.STEPS_MAX, least=1),
    )
    inference = Inference(Engine(tape, Registry(tape), models, default_model, budget, worker))
    broker = NatsBroker(
        servers(settings.nats_url),
        name="tapeline-inference-triggers",
        max_reconnect_attempts=-1,
        reconnect_time_wait=1,
        graceful_timeout=0.01,  # what is under way is handed to another worker, not waited for
        logger=None,
    )
    subscribe(broker, inference, tape.deployment.shards)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await broker.start()
    print(f"inference ready: {worker}, model {default_model}", flush=True)
    watching = asyncio.create_task(_watch(tape, Pulse(await broker.connect())))
    stopping = asyncio.create_task(stop.wait())
    try:
        done, _ = await asyncio.wait({watching, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if watching in done:
            await watching  # what drifted, as the reason to end
    finally:
        watching.cancel()
        await broker.stop()
        await models.aclose()
        await tape.close()
        telemetry.shutdown()
