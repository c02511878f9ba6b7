"""The tape as NATS JetStream keeps it: append, read, listen. What the server does by surprise is known here, what a
connection does in `connection`, and neither anywhere else.

It never interprets an event and never retries an append: `append` does that, under its fence.
"""

import asyncio
import contextlib
import datetime
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, Self, TypeVar
from uuid import uuid4

import msgspec
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from . import limits, subjects
from .clock import now_ms
from .connection import (
    ApiError,
    Denied,
    Doubts,
    Pulse,
    Refused,
    Unavailable,
    answered,
    api,
    connect,
    failure,
    listen,
    reason,
    reply,
)
from .connection import request as ask
from .events import NO_RUN
from .record import FENCE, FENCE_SUBJECT, Entry, Record, record

log = logging.getLogger(__name__)

T = TypeVar("T")

STALE_CODES: Final = (10071, 10164)  # wrong last sequence: that it is; that an append is under way (replicated)
NO_MESSAGE: Final = 10037


class Stale(Exception):
    """The fence did not hold: somebody appended first. `last` is the conversation's true last sequence."""

    def __init__(self, last: int) -> None:
        super().__init__(f"the conversation's last sequence is {last}")
        self.last = last


class Gone(Exception):
    """The conversation was deleted. Whatever has its id by now is another conversation."""

    def __init__(self) -> None:
        super().__init__("the conversation was deleted")


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
    except Denied:
        raise
    except (Refused, KeyError, ValueError) as error:
        raise Refused("no tape is provisioned here; run `python -m services.provision`") from error


class _Ack(msgspec.Struct):
    seq: int = 0
    val: str = ""  # a counter's new total
    error: ApiError | None = None


class _Stored(msgspec.Struct):
    seq: int = 0
    subject: str = ""
    data: bytes = b""  # base64 on the wire


class _Counted(msgspec.Struct):
    val: str


class _Found(msgspec.Struct):
    message: _Stored | None = None
    error: ApiError | None = None


_ack = msgspec.json.Decoder(_Ack)
_found = msgspec.json.Decoder(_Found)
_counted = msgspec.json.Decoder(_Counted)
_json = msgspec.json.Encoder().encode


class Tape:
    """A connection to the tape of one deployment."""

    def __init__(self, nc: Client, deployment: Deployment, doubts: Doubts) -> None:
        self.nc = nc
        self.deployment = deployment
        self._doubts = doubts
        self._doubts.add(self._connected)
        self._connected()
        self._pulse = Pulse(nc)
        self._reading = asyncio.Semaphore(limits.READS_MAX)
        self.storing = asyncio.Semaphore(limits.RESULTS_STORING_MAX)
        """Of results, which are large: see `results`."""

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

    @property
    def connected_s(self) -> float:
        """For how long there was no break."""
        return time.monotonic() - self._connected_at

    def _connected(self) -> None:
        self._connected_at = time.monotonic()

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
        batch = [(self.subject(conversation, entry.kind), entry.data, self._headers(entry)) for entry in entries]
        last = await self._commit(batch, self._fence(conversation, after))
        return list(range(last - len(entries) + 1, last + 1))

    async def _commit(self, batch: Sequence[tuple[str, bytes, dict[str, str]]], fence: Mapping[str, str]) -> int:
        """Stores two or more messages, all or none; the last one's sequence."""
        name = uuid4().hex
        last = 0
        for number, (subject, data, own) in enumerate(batch, start=1):
            headers = own | {"Nats-Batch-Id": name, "Nats-Batch-Sequence": str(number)}
            if number == 1:  # the fence goes on the first; its reply is empty, or says that batches do not work
                await self._ask(subject, data, {**headers, **fence}, staged=True)
            elif number < len(batch):
                await self._send(subject, data, headers)
            else:
                last = await self._ask(subject, data, headers | {"Nats-Batch-Commit": "1"})
        return last

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
        return (await self._acked(subject, data, headers, staged=staged)).seq

    async def _acked(self, subject: str, data: bytes, headers: dict[str, str], *, staged: bool = False) -> _Ack:
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
            return ack
        if ack.error.err_code in STALE_CODES:
            number = ack.error.description.rpartition(" ")[2]
            raise Stale(int(number) if number.isdigit() else -1)
        raise failure(ack.error, ack.error.description)

    # Reading

    async def first(self, conversation: str, kind: str = subjects.ALL) -> Record | None:
        """The conversation's first event, without its headers; from the leader: see `confirm`. Raises `Unavailable`."""
        found = await self._found(
            self._stream(conversation), {"seq": 1, "next_by_subj": self.subject(conversation, kind)}
        )
        return Record(found.seq, None, found.subject, found.data, {}) if found else None

    async def last(self, conversation: str, kind: str = subjects.ALL) -> int:
        """The conversation's last sequence, 0 where it has no event; from the leader, so not behind: see `confirm`."""
        return await self._last(self._stream(conversation), self.subject(conversation, kind))

    async def _last(self, stream: str, subject: str) -> int:
        found = await self._found(stream, {"last_by_subj": subject})
        return found.seq if found else 0

    async def _found(self, stream: str, which: dict[str, Any]) -> _Stored | None:
        """One event, as the leader has it."""
        request = _json(which)

        async def once() -> _Stored | None:
            message = await ask(self.nc, f"$JS.API.STREAM.MSG.GET.{stream}", request)
            found = _found.decode(message.data)
            if found.message is None and (found.error is None or found.error.err_code != NO_MESSAGE):
                raise Unavailable(found.error.description if found.error else "no message")
            self._pulse.felt(stream)
            return found.message

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

    async def pages(
        self, conversation: str, after: int = 0, kind: str = subjects.ALL, until: int | None = None
    ) -> AsyncGenerator[list[Record]]:
        """What is stored after sequence `after`, in order, a page at a time, up to the end of the log.

        Any replica answers, and may lag behind the leader. `until` is an event known to be stored, by default the
        leader's newest: it is read for until it is there, or has been purged. Raises `Gone` where the conversation was
        purged and begun again between two pages, `Unavailable`.
        """
        seen = 0
        pages = self._pages(self._stream(conversation), self.subject(conversation, kind), after, until)
        async with contextlib.aclosing(pages):
            async for page in pages:
                for one in page:
                    if not one.follows(seen):
                        raise Gone
                    seen = one.seq
                yield page

    async def _pages(self, stream: str, subject: str, after: int, until: int | None) -> AsyncGenerator[list[Record]]:
        if until is None and self.deployment.replicas > 1:
            await self._confirm(stream)
            until = await self._last(stream, subject)
            if not until:
                return  # whatever a replica has of it was purged
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
        newest = await self._newest(self._stream(conversation), self.subject(conversation), known)
        return max((record.seq for record in newest if record.is_fact), default=0)

    async def _newest(self, stream: str, subject: str, known: int) -> list[Record]:
        """The newest message at each subject that matches `subject`, from a replica that has message `known`."""
        while True:
            newest, cut = await self._page(stream, {"multi_last": [subject]})
            if not cut and not await self._lags(stream, subject, newest[-1].seq if newest else 0, known):
                return newest

    async def _page(self, stream: str, request: dict[str, Any]) -> tuple[list[Record], bool]:
        """One batched direct get: the records, and whether there are more."""
        subject, body = f"$JS.API.DIRECT.GET.{stream}", _json(request)

        async def once() -> tuple[list[Record], bool]:
            page: list[Record] = []
            end: asyncio.Future[Mapping[str, str]] = asyncio.get_running_loop().create_future()
            before = 0

            def take(message: Msg) -> None:
                nonlocal before
                headers = message.headers or {}
                if end.done():
                    return
                if "Nats-Sequence" not in headers:  # the server's own word; `Status` may be that of an event's writer
                    end.set_result(headers)
                elif int(headers["Nats-Last-Sequence"]) != before:  # a reply is missing: keep what is whole
                    end.set_result({"Status": "204", "Nats-Num-Pending": "1"})
                else:
                    page.append(record(message))
                    before = page[-1].seq

            inbox = self.nc.new_inbox()
            subscription = await listen(self.nc, inbox, take)
            try:
                async with answered(self.nc, subject, limits.READ_TIMEOUT_S):
                    await self.nc.publish(subject, body, reply=inbox)
                    status = await end
            except TimeoutError:
                if not page:
                    raise
                return page, True  # what came is whole, and a further try would have as much to read again
            finally:
                if not self.nc.is_closed:
                    await subscription.unsubscribe()
            code = status.get("Status", "")
            if code == "404":
                return [], False
            if code != "204":
                raise Unavailable(f"a read was answered {code} {status.get('Description', '')}")
            more = status.get("Nats-Num-Pending", "0") != "0"
            if more and not page:
                raise Unavailable("the first reply to a read is missing")
            return page, more

        async with self._reading:  # all at once, none would have its answer in time, nor the next time
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

    def live(
        self, conversation: str, take: Callable[[Record], None], doubt: Callable[[], None]
    ) -> AbstractAsyncContextManager[None]:
        """While open, `take` is given the live copy of each stored event. Copies may be lost; `doubt` is called
        when the connection was, so that some probably are.

        On entry the subscription is on its way, before any later request: what is stored after such a request
        was answered is sent.
        """
        return _Live(self.nc, self._doubts, subjects.live(self.subject(conversation)), take, doubt)

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
        subject = subjects.alarm(self.shard(conversation), conversation, run)
        await api(self.nc, f"STREAM.PURGE.{subjects.WAKES}", {"filter": subject})

    async def purge(self, conversation: str, through: int) -> None:
        """Takes the conversation's events up to sequence `through`, and before them its alarms and results, so that
        whoever purges because of an event still has it if this is cut short. One alarm it sets, for what a worker is
        storing at this moment. Raises `Unavailable`, `Refused`.
        """
        shard = self.shard(conversation)
        method = f"STREAM.PURGE.{subjects.stream(shard)}"
        alarms = subjects.alarm(shard, conversation, subjects.ALL)
        await api(self.nc, f"STREAM.PURGE.{subjects.WAKES}", {"filter": alarms})
        await self.set_alarm(conversation, NO_RUN, now_ms() + int(limits.RESULTS_SWEEP_S * 1000))
        await self.purge_results(conversation, through)
        await api(self.nc, method, {"filter": self.subject(conversation), "seq": through + 1})

    async def purge_results(self, conversation: str, through: int = 0) -> None:
        """Takes the results stored beside the conversation, unless it has an event after sequence `through`: they may
        be those of the next conversation under its id. Raises `Unavailable`, `Refused`.
        """
        stored = subjects.result(conversation)
        newest = await self._last(subjects.RESULTS, stored)  # before it is known whose they are
        await self.confirm(conversation)
        if newest and await self.last(conversation) <= through:
            await api(self.nc, f"STREAM.PURGE.{subjects.RESULTS}", {"filter": stored, "seq": newest + 1})

    # Beside the tape

    async def put(
        self,
        subject: str,
        data: bytes,
        headers: Mapping[str, str] | None = None,
        after: int | None = None,
        within: str | None = None,
    ) -> int:
        """Stores a message in whichever stream has its subject; with `after` only if that is the sequence of the
        newest message at the subject, or of all that match `within`, 0 for none. Raises as `append` does.
        """
        fence = {} if after is None else {FENCE: str(after)}
        if within is not None:
            fence[FENCE_SUBJECT] = within
        return await self._ask(subject, data, {**(headers or {}), **fence})

    async def put_all(self, messages: Sequence[tuple[str, bytes]], after: int) -> None:
        """Stores two or more messages, all or none, in the stream that has their subjects, if `after` is the sequence
        of the newest message at the first one's subject. Raises as `append` does.
        """
        await self._commit([(subject, data, {}) for subject, data in messages], {FENCE: str(after)})

    async def count(self, subject: str, by: int) -> int:
        """Adds to a counter; its new total. Raises as `append` does, but for `Stale`."""
        return int((await self._acked(subject, b"", {"Nats-Incr": str(by)})).val)

    async def counted(self, stream: str, subject: str) -> int:
        """A counter's total, 0 where nothing was counted. Raises `Unavailable`."""
        found = await self._found(stream, {"last_by_subj": subject})
        return int(_counted.decode(found.data).val) if found else 0

    async def newest(self, stream: str, subject: str) -> list[Record]:
        """The newest message at each subject that matches `subject`, 1,024 at most, by sequence: nothing that is
        stored by now is missing. Takes time that depends on these alone.
        """
        known = 0
        if self.deployment.replicas > 1:
            await self._confirm(stream)
            known = await self._last(stream, subject)
        return await self._newest(stream, subject, known)

    async def stored(self, stream: str, subject: str) -> list[Record]:
        """What a small stream keeps under `subject`, in order."""
        return [record async for page in self.stored_pages(stream, subject) for record in page]

    def stored_pages(self, stream: str, subject: str) -> AsyncGenerator[list[Record]]:
        """The same a page at a time, for what may be large."""
        return self._pages(stream, subject, 0, None)

    async def bury(self, service: str, data: bytes, headers: Mapping[str, str]) -> None:
        """Puts what cannot be handled where an operator finds it."""
        await self.put(subjects.dead(service), data, headers)


class _Live:
    """One subscription to live copies. A generator would be a KiB more for every conversation that is watched."""

    __slots__ = ("_doubt", "_doubts", "_nc", "_subject", "_subscription", "_take")

    def __init__(
        self, nc: Client, doubts: Doubts, subject: str, take: Callable[[Record], None], doubt: Callable[[], None]
    ) -> None:
        self._nc, self._doubts, self._subject, self._take, self._doubt = nc, doubts, subject, take, doubt

    async def __aenter__(self) -> None:
        # No flush here: a flush that is cancelled, or times out, ends nats-py's read loop when its PONG comes.
        self._subscription = await listen(self._nc, self._subject, self._taken)
        self._doubts.add(self._doubt)

    async def __aexit__(self, *_: object) -> None:
        self._doubts.discard(self._doubt)
        if not self._nc.is_closed:
            await self._subscription.unsubscribe()

    def _taken(self, message: Msg) -> None:
        self._take(record(message))
