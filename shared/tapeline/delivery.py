"""Deliveries from durable consumers, and all that FastStream does by surprise.

FastStream fetches; by itself it would rewrite streams, decode bodies, acknowledge what nobody handled and prefetch
what it then lets expire. So it is told to declare nothing, decode nothing, acknowledge nothing and fetch one message
at a time. Knows nothing of what a delivery says. Needs `tapeline[tools]`.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from datetime import datetime
from typing import Any

import nats.errors
from faststream import AckPolicy
from faststream.nats import JStream, NatsBroker, NatsMessage, PullSub
from faststream.nats.security import NatsUserPassword
from nats.aio.msg import Msg
from nats.js.errors import ServiceUnavailableError

from . import limits
from .connection import Denied, Pulse, Unavailable, is_denial, login, reason
from .tape import Tape

log = logging.getLogger(__name__)


class Delivery:
    """One delivery of one stored event, kept ours for as long as we work on it.

    Tells the server every `IN_PROGRESS_S` that it is being worked on, until it is answered or left. Whether the
    server heard the answer does not matter: at worst it is delivered again, and the log says what became of it.
    """

    def __init__(self, message: NatsMessage) -> None:
        self.message = message
        self._beat = asyncio.create_task(self._keep())

    @property
    def subject(self) -> str:
        """Where it is stored."""
        return self.message.raw_message.subject

    @property
    def data(self) -> bytes:
        """The event's bytes."""
        return self.message.raw_message.data

    @property
    def headers(self) -> Mapping[str, str]:
        """The event's headers."""
        return self.message.raw_message.headers or {}

    @property
    def stream(self) -> str:
        """The stream that stores it."""
        return self.message.raw_message.metadata.stream

    @property
    def seq(self) -> int:
        """Its sequence there."""
        return self.message.raw_message.metadata.sequence.stream

    @property
    def number(self) -> int:
        """Which delivery of it this is, from 1."""
        return self.message.raw_message.metadata.num_delivered or 1

    @property
    def stored_at(self) -> datetime:
        """When it was stored."""
        return self.message.raw_message.metadata.timestamp

    def renew(self, newer: "Delivery") -> None:
        """Goes on with a newer delivery of the same event: the server has stopped listening to this one."""
        newer.leave()
        self.message = newer.message

    async def ack(self) -> None:
        """All there is to do has been done."""
        await self._end(self.message.ack())

    async def give_back(self, delay_s: float | None = None) -> None:
        """Another worker shall have it."""
        await self._end(self.message.nack(delay_s))

    def leave(self) -> None:
        """Says no more: it belongs to another worker, or comes again in `ACK_WAIT_S`."""
        self._beat.cancel()

    async def drop(self) -> None:
        """It shall never be delivered again."""
        await self._end(self.message.reject())

    async def bury(self, tape: Tape, service: str, why: str) -> None:
        """Puts a copy into the dead letters, before it is dropped. Raises `Unavailable`."""
        log.error("%s at %d: %s: dead letter", self.subject, self.seq, why)
        headers = {
            "Tapeline-Subject": self.subject,
            "Tapeline-Sequence": str(self.seq),
            "Tapeline-Reason": " ".join(why.encode("ascii", "replace").decode().split()),
        }
        await tape.bury(service, self.data, headers)

    async def _end(self, word: Coroutine[Any, Any, None]) -> None:
        self._beat.cancel()
        await _said(word)

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(limits.IN_PROGRESS_S)
            await _said(self.message.in_progress())


Take = Callable[[Delivery], Awaitable[None]]


class Deliveries:
    """What durable consumers that exist already deliver, each one message at a time.

    `take` is given each delivery; until it returns, no further one is fetched from the same consumer.
    """

    def __init__(self, nats_url: str, name: str, take: Take) -> None:
        self._take = take
        named, known = login(nats_url)
        quiet = logging.getLogger(f"{__name__}.faststream")
        quiet.setLevel(logging.ERROR)  # that a connection comes and goes, the tape's own says
        self._broker = NatsBroker(
            named,
            name=name,
            max_reconnect_attempts=-1,
            reconnect_time_wait=1,
            graceful_timeout=limits.TAKE_CANCEL_S,  # whoever stops has waited already
            logger=quiet,
            error_cb=self._failed,
            security=NatsUserPassword(*known) if known else None,
            apply_types=False,
        )
        self._subscribers: dict[tuple[str, str], Any] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._pulse: Pulse | None = None
        self._denial: Exception | None = None

    async def start(self) -> None:
        """Connects. Raises `Unavailable`."""
        with _available():
            await self._broker.start()
            self._pulse = Pulse(await self._broker.connect())

    async def bind(self, stream: str, durable: str, subject: str) -> None:
        """Begins to take what this consumer delivers, unless it does already; after `start`. Raises `Unavailable`."""
        if (stream, durable) in self._subscribers:
            return
        subscriber = self._broker.subscriber(
            subject,
            stream=JStream(stream, declare=False),
            durable=durable,
            pull_sub=PullSub(batch_size=1, timeout=limits.PULL_S),
            max_workers=1,
            ack_policy=AckPolicy.MANUAL,
            no_reply=True,
            decoder=_untouched,
            persistent=False,  # so that the broker forgets it when we do
        )
        subscriber(self._handle)
        with _available():
            await subscriber.start()
        subscription: Any = subscriber.subscription
        subscription.fetch = _Fetch(subscriber)
        self._subscribers[stream, durable] = subscriber

    def unbind(self, stream: str, durable: str) -> None:
        """Takes no more from this consumer: what a fetch under way still brings is given back, until it ends within
        `PULL_S`. What was taken can still be answered.
        """
        if (subscriber := self._subscribers.pop((stream, durable), None)) is None:
            return
        subscriber.running = False
        task = asyncio.create_task(subscriber.subscription.fetch.end())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def check(self) -> None:
        """To be called now and then: moves to another server where this one is cut off from its cluster.

        Raises `Denied` where the credentials do not allow taking or answering.
        """
        if self._denial is not None:
            raise Denied(f"these credentials do not allow it: {reason(self._denial)}")
        if self._pulse is not None:
            await self._pulse.take()

    def stop_taking(self) -> None:
        """Takes no more; what was taken can still be answered."""
        for binding in list(self._subscribers):
            self.unbind(*binding)

    async def close(self) -> None:
        """Ends the connection, after `stop_taking`, when no fetch is under way any more."""
        if self._ending:
            await asyncio.wait(self._ending, timeout=limits.PULL_S + limits.TAKE_CANCEL_S)
        for subscriber in self._broker.subscribers:
            ended: Any = subscriber
            ended.subscription = None  # FastStream would unsubscribe it once more, which raises
        # NATS is away: nothing is left to say to it. uvloop calls writing to a lost connection a RuntimeError.
        with contextlib.suppress(nats.errors.Error, OSError, RuntimeError):
            await self._broker.stop()

    async def _failed(self, error: Exception) -> None:
        if is_denial(error):
            self._denial = error

    async def _handle(self, message: NatsMessage) -> None:
        await self._take(Delivery(message))


@contextlib.contextmanager
def _available() -> Iterator[None]:
    try:
        yield
    except (nats.errors.Error, OSError, TimeoutError) as error:
        raise Unavailable(f"cannot take deliveries: {reason(error)}") from error


async def _said(word: Coroutine[Any, Any, None]) -> None:
    try:
        await word
    except nats.errors.Error as error:
        log.warning("a delivery could not be answered: %s", str(error) or type(error).__name__)


class _Fetch:
    """Stands where FastStream's subscriber fetches, for what it does not do."""

    def __init__(self, subscriber: Any) -> None:
        self._subscriber = subscriber
        self._fetch: Callable[..., Awaitable[list[Msg]]] = subscriber.subscription.fetch
        self._unsubscribe: Callable[[], Awaitable[None]] = subscriber.subscription.unsubscribe
        self._turn = asyncio.Lock()

    async def __call__(self, **how: Any) -> list[Msg]:
        async with self._turn:
            try:
                messages = await self._fetch(**how) if self._subscriber.running else []
            except ServiceUnavailableError:  # FastStream would ask again at once, as fast as the processor goes
                await asyncio.sleep(limits.PULL_RETRY_S)
                raise
            if self._subscriber.running:
                return messages
            for message in messages:  # which FastStream would drop, and the server deliver again when it is too late
                await _said(message.nak())
            return []

    async def end(self) -> None:
        """Waits for the fetch under way: the server may have answered it already."""
        async with self._turn:
            with contextlib.suppress(nats.errors.Error):  # the connection is gone, and so are the deliveries
                await self._unsubscribe()


async def _untouched(message: NatsMessage) -> NatsMessage:
    """FastStream's decoder: the handler is given the message as it is."""
    return message
