"""Tools on offer: what workers announce, in a bucket whose entries expire unless they are refreshed.

A worker owns its own keys, `<tool>.<worker>`, and touches no other. A reader sees what is alive: a worker that
is killed disappears within `REGISTRY_TTL_S`, one that ends in order at once.

Of workers that describe a tool differently, the one counts that has taken its calls for longest; those whose schema
or need of approval is another stand by. Who came first, the server says: an offer's place is its sequence in the
bucket, and no clock's.
"""

import asyncio
import logging
from collections.abc import Collection, Iterable
from typing import Any, Final

import msgspec
from msgspec import structs

from . import limits, subjects
from .record import Record
from .tape import Tape

log = logging.getLogger(__name__)

_STREAM: Final = f"KV_{subjects.REGISTRY}"
_PREFIX: Final = f"$KV.{subjects.REGISTRY}"


class ToolSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What the model and inference need to know about a tool."""

    name: str
    description: str
    parameters: dict[str, Any]
    """JSON Schema of the arguments, an object."""
    timeout_s: float = limits.TOOL_TIMEOUT_S_DEFAULT
    idempotent: bool = False
    needs_approval: bool = False
    pool: str = ""

    def agrees(self, other: "ToolSpec") -> bool:
        """Whether a call that was made for one may go to workers of the other: they take the same arguments, and a
        person is asked for both or for neither.
        """
        return (self.parameters, self.needs_approval) == (other.parameters, other.needs_approval)


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """One worker's announcement of one tool."""

    tool: ToolSpec
    worker: str
    since: int = 0
    """Its place: the sequence of the first announcement of this offer, 0 in that one itself."""
    stands_by: bool = False
    """Takes no calls: a worker whose schema is another does."""


_offer = msgspec.json.Decoder(Offer)


class Registry:
    """The registry as one process sees it: it reads all, and writes only what it announces under `worker`."""

    def __init__(self, tape: Tape, worker: str = "") -> None:
        self.tape = tape
        self.worker = worker
        self._mine: dict[str, Offer] = {}
        self._refreshed_at = -limits.REGISTRY_TTL_S
        self._cached: dict[str, ToolSpec] = {}
        self._lately: set[str] = set()
        self._fresh_until = 0.0
        self._reading = asyncio.Lock()

    async def announce(self, tools: Iterable[ToolSpec], stand_by: Collection[str] = ()) -> bool:
        """Offers these tools, and no others, for the next `REGISTRY_TTL_S`; repeat it to keep them. Of those named in
        `stand_by` this worker takes no calls. Whether there is something new to it. Raises `Unavailable`.
        """
        offers = [Offer(tool=tool, worker=self.worker, stands_by=tool.name in stand_by) for tool in tools]
        for name in sorted(self._mine.keys() - {offer.tool.name for offer in offers}):
            await self.tape.put(self._key(name), b"", {"KV-Operation": "DEL"})
            del self._mine[name]
        # What was not refreshed in time has expired, and others may have come first since.
        now = asyncio.get_running_loop().time()
        known = self._mine if now < self._refreshed_at + limits.REGISTRY_TTL_S else {}
        new = False
        for offer in offers:
            name = offer.tool.name
            mine = known.get(name)
            since = mine.since if mine and _same(mine, offer) else 0
            self._mine.setdefault(name, offer)  # lest it is not withdrawn when we never hear that it was stored
            seq = await self.tape.put(self._key(name), msgspec.json.encode(structs.replace(offer, since=since)))
            self._mine[name] = structs.replace(offer, since=since or seq)
            new = new or not since
        self._refreshed_at = now
        return new

    async def withdraw(self) -> None:
        """Takes back at once whatever this process has announced. Raises `Unavailable`."""
        await self.announce(())

    async def offered(self) -> dict[str, ToolSpec]:
        """The tools that are alive, by name; at most `REGISTRY_CACHE_S` old. Raises `Unavailable`.

        Where workers describe a tool differently, the offer that counts is believed: a new version takes over when
        the last worker of the old one has gone.
        """
        async with self._reading:
            clock = asyncio.get_running_loop().time
            if clock() >= self._fresh_until:
                records = await self._records()
                self._cached = {name: offer.tool for name, offer in _counting(records).items()}
                self._lately = {record.subject.removeprefix(_PREFIX).split(".")[1] for record in records}
                self._fresh_until = clock() + limits.REGISTRY_CACHE_S
            return dict(self._cached)

    async def counting(self, *tools: str) -> dict[str, Offer]:
        """The offer that counts of each of these tools, by name, as of now. Raises `Unavailable`."""
        read = (self.tape.stored(_STREAM, f"{_PREFIX}.{tool}.>") for tool in tools)
        return _counting(record for records in await asyncio.gather(*read) for record in records)

    async def offers(self) -> list[Offer]:
        """Every worker's offer of every tool, as of now, in the order in which they count. Raises `Unavailable`."""
        return _ordered(await self._records())

    async def absent(self, names: Collection[str]) -> set[str]:
        """Those of these tools that nobody has offered for about `REGISTRY_TTL_S`: so long a killed worker's offer
        stays, and the trace of one that was withdrawn. Raises `Unavailable`.

        None are while this process is connected for less than `TOOL_ABSENT_S`: after NATS was away, or everything,
        workers come back one by one.
        """
        if not names or self.tape.connected_s < limits.TOOL_ABSENT_S:
            return set()
        await self.offered()
        return set(names) - self._lately

    async def _records(self) -> list[Record]:
        return await self.tape.stored(_STREAM, f"{_PREFIX}.>")

    def _key(self, tool: str) -> str:
        return f"{_PREFIX}.{tool}.{self.worker}"


def _same(one: Offer, other: Offer) -> bool:
    """Whether an offer has kept its place."""
    return one.tool.agrees(other.tool) and one.stands_by == other.stands_by


def _decoded(record: Record) -> Offer | None:
    if not record.data:
        return None  # withdrawn
    try:
        offer = _offer.decode(record.data)
    except msgspec.MsgspecError as error:
        log.warning("%s in the tool registry cannot be read: %s", record.subject, error)
        return None
    return structs.replace(offer, since=offer.since or record.seq)


def _counting(records: Iterable[Record]) -> dict[str, Offer]:
    counting: dict[str, Offer] = {}
    for offer in _ordered(records):
        counting.setdefault(offer.tool.name, offer)
    return counting


def _ordered(records: Iterable[Record]) -> list[Offer]:
    offers = filter(None, map(_decoded, records))
    return sorted(offers, key=lambda offer: (offer.tool.name, offer.stands_by, offer.since))
