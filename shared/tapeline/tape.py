"""The tape as NATS JetStream keeps it: append, read, listen. What the server does by surprise is known here, what a
connection does in `connection`, and neither anywhere else.

It never interprets an event and never retries an append: `append` does that, under its fence.
"""

import asyncio
import contextlib
import datetime
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, NamedTuple, Self, TypeVar
from uuid import uuid4

import msgspec
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from . import events, limits, subjects
from .connection import ApiError, Doubts, Pulse, Refused, Unavailable, api, connect, failure, reason, reply
from .connection import request as ask

log = logging.getLogger(__name__)

T = TypeVar("T")

FENCE: Final = "Nats-Expected-Last-Subject-Sequence"
FENCE_SUBJECT: Final = "Nats-Expected-Last-Subject-Sequence-Subject"
STALE_CODES: Final = (10071, 10164)  # wrong last sequence: that it is; that an append is under way (replicated)
NO_MESSAGE: Final = 10037


class Stale(Exception):
    """The fence did not hold: somebody appended first. `last` is the conversation's true last sequence."""

    def __init__(self, last: int) -> None:
        super().__init__(f"the conversation's last sequence is {last}")
        self.last = last


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """What is chosen when a deployment is provisioned, kept in its streams. The shards can never change."""

    shards: int = limits.SHARDS_DEFAULT
    replicas: int = 1
    delta_ttl_s: int = limits.DELTA_TTL_S_DEFAULT
    """0: deltas are kept for ever."""

    @property
    def metadata(self) -> dict[str, str]:
        return {"tapeline.shards": str(self.shards), "tapeline.delta_ttl_s": str(self.delta_ttl_s)}


async def find(nc: Client) -> Deployment:
    """The deployment as it was provisioned. Raises `Refused` where there is none, `Unavailable`."""
    try:
        config = (await api(nc, f"STREAM.INFO.{subjects.stream(0)}"))["config"]
        return Deployment(
            shards=int(config["metadata"]["tapeline.shards"]),
            replicas=config["num_replicas"],
            delta_ttl_s=int(config["metadata"]["tapeline.delta_ttl_s"]),
        )
    except (Refused, KeyError, ValueError) as error:
        raise Refused("no tape is provisioned here; run `python -m services.provision`") from error


class Record(NamedTuple):
    """One stored event: its place in the log, and its bytes as they were written."""

    seq: int
    prev: int | None
    """The conversation's event before it; None where its writer did not say."""
    subject: str
    data: bytes
    headers: Mapping[str, str]

    @property
    def kind(self) -> str:
        return subjects.split(self.subject)[1]

    @property
    def is_fact(self) -> bool:
        return ".fact." in self.subject

    def event(self) -> events.AnyEvent | events.Unknown:
        """What it says. Bytes that are no event are `Unknown` too: what nobody can read must stop nobody."""
        try:
            return events.decode(self.data)
        except events.Undecodable:
            return events.Unknown(type=events.UNDECODABLE)


class Entry(NamedTuple):
    """One event to be appended: its kind, its bytes, and headers besides the fence."""

    kind: str
    data: bytes
    headers: Mapping[str, str] = {}


class _Ack(msgspec.Struct):
    seq: int = 0
    error: ApiError | None = None


class _Stored(msgspec.Struct):
    seq: int = 0


class _Found(msgspec.Struct):
    message: _Stored | None = None
    error: ApiError | None = None


_ack = msgspec.json.Decoder(_Ack)
_found = msgspec.json.Decoder(_Found)
_json = msgspec.json.Encoder().encode


class Tape:
    """A connection to the tape of one deployment."""

    def __init__(self, nc: Client, deployment: Deployment, doubts: Doubts) -> None:
        self.nc = nc
        self.deployment = deployment
        self._doubts = doubts
        self._pulse = Pulse(nc)

    @classmethod
    async def open(cls, url: str, name: str) -> Self:
        """Connects, and learns how the deployment was provisioned. Raises `Unavailable`, `Refused`."""
        doubts: Doubts = set()
        nc = await connect(url, name, doubts)
        clock = asyncio.get_running_loop().time
        give_up = clock() + limits.READ_PATIENCE_S
        pulse = Pulse(nc)
        try:
            while True:
                try:
                    return cls(nc, await find(nc), doubts)
                except Unavailable:
                    if len(nc.servers) == 1 or clock() > give_up:
                        raise
                    await pulse.missed("JetStream")  # it elects its leaders, or this server is cut off
                    await asyncio.sleep(limits.READ_RETRY_S)
        except BaseException:
            await nc.close()
            raise

    async def close(self) -> None:
        # It is lost, and with it what was still to be sent: uvloop calls writing to it a RuntimeError.
        with contextlib.suppress(OSError, RuntimeError):
            await self.nc.close()

    @property
    def connected(self) -> bool:
        return self.nc.is_connected

    def shard(self, conversation: str) -> int:
        return subjects.shard(conversation, self.deployment.shards)

    def _stream(self, conversation: str) -> str:
        return subjects.stream(self.shard(conversation))

    def subject(self, conversation: str, kind: str = subjects.ALL) -> str:
        return subjects.chain(self.shard(conversation), conversation, kind)

    # Appending

    async def append(self, conversation: str, entry: Entry, after: int) -> int:
        """Stores one event if the conversation's last sequence is `after`; its sequence, once it is stored.

        Raises `Stale`, `Unavailable`, `Refused`.
        """
        headers = self._headers(entry) | self._fence(conversation, after)
        return await self._ask(self.subject(conversation, entry.kind), entry.data, headers)

    async def append_batch(self, conversation: str, entries: Sequence[Entry], after: int) -> list[int]:
        """Stores several events, all or none, next to each other. Raises as `append` does."""
        if len(entries) == 1:
            return [await self.append(conversation, entries[0], after)]
        if len(entries) > limits.BATCH_EVENTS_MAX:
            raise Refused(f"a batch takes {limits.BATCH_EVENTS_MAX} events at most, not {len(entries)}")
        batch = uuid4().hex
        last = 0
        for number, entry in enumerate(entries, start=1):
            subject = self.subject(conversation, entry.kind)
            headers = self._headers(entry) | {"Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(number)}
            if number == 1:  # the fence goes on the first; its reply is empty, or says that batches do not work
                await self._ask(subject, entry.data, headers | self._fence(conversation, after), staged=True)
            elif number < len(entries):
                await self._send(subject, entry.data, headers)
            else:
                last = await self._ask(subject, entry.data, headers | {"Nats-Batch-Commit": "1"})
        return list(range(last - len(entries) + 1, last + 1))

    def _fence(self, conversation: str, after: int) -> dict[str, str]:
        return {FENCE: str(after), FENCE_SUBJECT: self.subject(conversation)}

    def _headers(self, entry: Entry) -> dict[str, str]:
        headers = dict(entry.headers)  # nats-py adds to the headers it is given
        if self.deployment.delta_ttl_s and entry.kind.startswith("delta."):
            headers["Nats-TTL"] = f"{self.deployment.delta_ttl_s}s"
        return headers

    async def _send(self, subject: str, data: bytes, headers: dict[str, str]) -> None:
        try:
            await self.nc.publish(subject, data, headers=headers)
        except nats.errors.MaxPayloadError as error:
            raise Refused(f"{len(data)} bytes are more than a message may have") from error
        except nats.errors.Error as error:
            raise Unavailable(str(error)) from error

    async def _ask(self, subject: str, data: bytes, headers: dict[str, str], *, staged: bool = False) -> int:
        whom = ".".join(subject.split(".", 2)[:2])  # as many as there are streams
        try:
            message = await reply(self.nc, subject, data, limits.APPEND_TIMEOUT_S, headers)
        except nats.errors.MaxPayloadError as error:
            raise Refused(f"{len(data)} bytes are more than a message may have") from error
        except (nats.errors.Error, TimeoutError) as error:
            await self._pulse.missed(whom)
            raise Unavailable(f"no answer to an append: {reason(error)}") from error
        ack = _Ack() if staged and not message.data else _ack.decode(message.data)
        if ack.error is None:
            self._pulse.felt(whom)
            return ack.seq
        if ack.error.err_code in STALE_CODES:
            number = ack.error.description.rpartition(" ")[2]
            raise Stale(int(number) if number.isdigit() else -1)
        raise failure(ack.error, ack.error.description)

    # Reading

    async def last(self, conversation: str, kind: str = subjects.ALL) -> int:
        """The conversation's last sequence, 0 where it has no event; from the leader, so not behind: see `confirm`."""
        return await self._last(self._stream(conversation), self.subject(conversation, kind))

    async def _last(self, stream: str, subject: str) -> int:
        request = _json({"last_by_subj": subject})

        async def once() -> int:
            message = await ask(self.nc, f"$JS.API.STREAM.MSG.GET.{stream}", request)
            found = _found.decode(message.data)
            if found.message is None and (found.error is None or found.error.err_code != NO_MESSAGE):
                raise Unavailable(found.error.description if found.error else "no message")
            self._pulse.felt(stream)
            return found.message.seq if found.message else 0

        return await self.patiently(stream, once)

    async def confirm(self, conversation: str) -> None:
        """Returns when the conversation's leader is one that most replicas follow, so that what it says now is so. A
        leader that was cut off from them does not know of its successor, for ten seconds or so. Raises `Unavailable`.
        """
        await self._confirm(self._stream(conversation))

    async def _confirm(self, stream: str) -> None:
        async def once() -> None:
            cluster = (await api(self.nc, f"STREAM.INFO.{stream}")).get("cluster", {})
            replicas = cluster.get("replicas", [])
            following = [one for one in replicas if one["active"] < limits.LEADER_LEASE_S * 1_000_000_000]
            if len(following) * 2 < len(replicas):  # the leader itself makes them more than half
                raise Unavailable(f"the leader of {stream} is cut off from its replicas")

        if self.deployment.replicas > 1:
            await self.patiently(stream, once)

    def pages(
        self, conversation: str, after: int = 0, kind: str = subjects.ALL, until: int | None = None
    ) -> AsyncGenerator[list[Record]]:
        """What is stored after sequence `after`, in order, a page at a time, up to the end of the log.

        Any replica answers, and may lag behind the leader. `until` is an event known to be stored, by default the
        leader's newest: it is read for until it is there, or has been purged.
        """
        return self._pages(self._stream(conversation), self.subject(conversation, kind), after, until)

    async def _pages(self, stream: str, subject: str, after: int, until: int | None) -> AsyncGenerator[list[Record]]:
        if until is None and self.deployment.replicas > 1:
            await self._confirm(stream)
            until = await self._last(stream, subject)
        until = until or 0
        while True:
            more = True
            while more:
                request = {
                    "seq": after + 1,
                    "batch": limits.HISTORY_BATCH,
                    "max_bytes": limits.HISTORY_BATCH_BYTES,
                    "next_by_subj": subject,
                }
                page, more = await self._page(stream, request)
                if page:
                    after = page[-1].seq
                    yield page
            if not await self._lags(stream, subject, after, until):
                return

    async def _lags(self, stream: str, subject: str, has: int, until: int) -> bool:
        """Whether it takes a replica that is up to date to read on from `has` to `until`, after a moment's wait."""
        if has >= until:
            return False
        await self._confirm(stream)
        if await self._last(stream, subject) < until:
            return False  # purged since
        await asyncio.sleep(limits.READ_RETRY_S)
        return True

    async def read(
        self, conversation: str, after: int = 0, kind: str = subjects.ALL, until: int | None = None
    ) -> list[Record]:
        """All pages in one list: for what is known to be small, such as facts."""
        return [record async for page in self.pages(conversation, after, kind, until) for record in page]

    async def newest_fact(self, conversation: str, known: int) -> int:
        """The conversation's newest fact, as a replica has it that has event `known`; 0 where there is one replica
        only, which can be asked for all facts at once.
        """
        if self.deployment.replicas == 1:
            return 0
        stream = self._stream(conversation)
        while True:
            newest, _ = await self._page(stream, {"multi_last": [self.subject(conversation)]})  # of each subject
            if not await self._lags(stream, self.subject(conversation), newest[-1].seq if newest else 0, known):
                return max((record.seq for record in newest if record.is_fact), default=0)

    async def _page(self, stream: str, request: dict[str, Any]) -> tuple[list[Record], bool]:
        """One batched direct get: the records, and whether there are more."""
        subject, body = f"$JS.API.DIRECT.GET.{stream}", _json(request)

        async def once() -> tuple[list[Record], bool]:
            page: list[Record] = []
            end: asyncio.Future[Mapping[str, str]] = asyncio.get_running_loop().create_future()
            before = 0

            async def take(message: Msg) -> None:
                nonlocal before
                headers = message.headers or {}
                if end.done():
                    return
                if "Status" in headers:
                    end.set_result(headers)
                elif int(headers["Nats-Last-Sequence"]) != before:  # a reply is missing: keep what is whole
                    end.set_result({"Status": "204", "Nats-Num-Pending": "1"})
                else:
                    page.append(record(message))
                    before = page[-1].seq

            inbox = self.nc.new_inbox()
            subscription = await self.nc.subscribe(inbox, cb=take)
            try:
                await self.nc.publish(subject, body, reply=inbox)
                async with asyncio.timeout(limits.READ_TIMEOUT_S):
                    status = await end
            finally:
                if not self.nc.is_closed:
                    await subscription.unsubscribe()
            if status["Status"] == "404":
                return [], False
            if status["Status"] != "204":
                raise Unavailable(f"a read was answered {status['Status']} {status.get('Description', '')}")
            return page, status.get("Nats-Num-Pending", "0") != "0"

        return await self.patiently(stream, once)

    async def patiently(self, whom: str, once: Callable[[], Awaitable[T]]) -> T:
        """Reads change nothing, so they are tried again while NATS is away or `whom` has no leader, up to a limit."""
        give_up = asyncio.get_running_loop().time() + limits.READ_PATIENCE_S
        while True:
            try:
                return await once()
            except (Unavailable, nats.errors.Error, TimeoutError) as error:
                await self._pulse.missed(whom)
                if asyncio.get_running_loop().time() > give_up:
                    raise Unavailable(f"no answer from {whom}: {reason(error)}") from error
                await asyncio.sleep(limits.READ_RETRY_S)

    # Listening

    @asynccontextmanager
    async def live(
        self, conversation: str, take: Callable[[Record], None], doubt: Callable[[], None]
    ) -> AsyncIterator[None]:
        """While open, `take` is given the live copy of each stored event. Copies may be lost; `doubt` is called
        when the connection was, so that some probably are.

        On entry the subscription is on its way, before any later request: what is stored after such a request
        was answered is sent.
        """
        # No flush here: a flush that is cancelled, or times out, ends nats-py's read loop when its PONG comes.

        async def deliver(message: Msg) -> None:
            take(record(message))

        subscription = await self.nc.subscribe(
            subjects.live(self.subject(conversation)),
            cb=deliver,
            pending_msgs_limit=limits.FOLLOW_PENDING_MAX,
        )
        self._doubts.add(doubt)
        try:
            yield
        finally:
            self._doubts.discard(doubt)
            if not self.nc.is_closed:
                await subscription.unsubscribe()

    # Timers and dead letters

    async def set_alarm(self, conversation: str, run: str, at_ms: int) -> None:
        """Wakes inference at `at_ms`, though every process be gone by then; replaces the run's earlier alarm."""
        at = datetime.datetime.fromtimestamp(at_ms / 1000, datetime.UTC)
        shard = self.shard(conversation)
        headers = {
            "Nats-Schedule": "@at " + at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "Nats-Schedule-Target": subjects.due(shard, conversation),
            "Nats-Schedule-TTL": f"{limits.WAKE_TTL_S}s",
        }
        await self._ask(subjects.alarm(shard, conversation, run), _json({"run": run}), headers)

    async def cancel_alarm(self, conversation: str, run: str) -> None:
        """Takes the run's alarm back, if one is set."""
        shard = self.shard(conversation)
        subject = subjects.alarm(shard, conversation, run)
        await api(self.nc, f"STREAM.PURGE.{subjects.stream(shard)}", {"filter": subject})

    # Beside the tape

    async def put(self, subject: str, data: bytes, headers: Mapping[str, str] | None = None) -> int:
        """Stores a message, unfenced, in whichever stream has its subject. Raises as `append` does."""
        return await self._ask(subject, data, dict(headers or {}))

    async def stored(self, stream: str, subject: str) -> list[Record]:
        """What a small stream keeps under `subject`, in order."""
        return [record async for page in self._pages(stream, subject, 0, None) for record in page]

    async def bury(self, service: str, data: bytes, headers: Mapping[str, str]) -> None:
        """Puts what cannot be handled where an operator finds it."""
        await self.put(subjects.dead(service), data, headers)


def record(message: Msg) -> Record:
    """The record in a live copy or in a direct get's reply: both carry the same headers."""
    headers = message.headers or {}
    seq = int(headers["Nats-Sequence"])
    fence = headers.get(FENCE)
    if fence is not None:
        prev: int | None = int(fence)
    elif int(headers.get("Nats-Batch-Sequence", 0)) > 1:
        prev = seq - 1  # inside a batch, sequences are contiguous
    else:
        prev = None
    return Record(seq, prev, headers["Nats-Subject"], message.data, headers)
