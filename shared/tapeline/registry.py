"""Tools on offer: what workers announce, in a bucket whose entries expire unless they are refreshed.

A worker owns its own keys, `<tool>.<worker>`, and touches no other. A reader sees what is alive: a worker that
is killed disappears within `REGISTRY_TTL_S`, one that ends in order at once.
"""

import asyncio
import logging
from collections.abc import Iterable
from typing import Any, Final

import msgspec

from . import limits, subjects
from .clock import now_ms
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


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """One worker's announcement of one tool."""

    tool: ToolSpec
    worker: str
    since: int
    """When this worker began to offer it, ms since the epoch, by its own clock."""


_offer = msgspec.json.Decoder(Offer)


class Registry:
    """The registry as one process sees it: it reads all, and writes only what it announces under `worker`."""

    def __init__(self, tape: Tape, worker: str = "") -> None:
        self.tape = tape
        self.worker = worker
        self._since = now_ms()
        self._mine: set[str] = set()
        self._cached: dict[str, ToolSpec] = {}
        self._fresh_until = 0.0
        self._reading = asyncio.Lock()
        self._conflicts: set[tuple[str, str]] = set()

    async def announce(self, tools: Iterable[ToolSpec]) -> None:
        """Offers these tools for the next `REGISTRY_TTL_S`; repeat it to keep them. Raises `Unavailable`."""
        for tool in tools:
            offer = Offer(tool=tool, worker=self.worker, since=self._since)
            self._mine.add(tool.name)
            await self.tape.put(self._key(tool.name), msgspec.json.encode(offer))

    async def withdraw(self) -> None:
        """Takes back at once whatever this process has announced. Raises `Unavailable`."""
        for name in sorted(self._mine):
            await self.tape.put(self._key(name), b"", {"KV-Operation": "DEL"})
        self._mine.clear()

    async def offered(self) -> dict[str, ToolSpec]:
        """The tools that are alive, by name; at most `REGISTRY_CACHE_S` old. Raises `Unavailable`.

        Where workers describe a tool differently, the one that offered it first is believed: a new version
        takes over when the last worker of the old one has gone.
        """
        async with self._reading:
            clock = asyncio.get_running_loop().time
            if clock() >= self._fresh_until:
                records = await self.tape.stored(_STREAM, f"{_PREFIX}.>")
                self._cached = self._believed(_decoded(record.subject, record.data) for record in records)
                self._fresh_until = clock() + limits.REGISTRY_CACHE_S
            return dict(self._cached)

    def _key(self, tool: str) -> str:
        return f"{_PREFIX}.{tool}.{self.worker}"

    def _believed(self, offers: Iterable[Offer | None]) -> dict[str, ToolSpec]:
        tools: dict[str, ToolSpec] = {}
        conflicts = set()
        for offer in sorted(filter(None, offers), key=lambda offer: (offer.since, offer.worker)):
            first = tools.setdefault(offer.tool.name, offer.tool)
            if first.parameters != offer.tool.parameters:
                conflicts.add((offer.tool.name, offer.worker))
        for name, worker in sorted(conflicts - self._conflicts):
            log.warning(
                "tool %s: worker %s offers it with another schema than an older worker; the older one counts",
                name,
                worker,
            )
        self._conflicts = conflicts
        return dict(sorted(tools.items()))


def _decoded(subject: str, data: bytes) -> Offer | None:
    if not data:
        return None  # withdrawn
    try:
        return _offer.decode(data)
    except msgspec.MsgspecError as error:
        log.warning("%s in the tool registry cannot be read: %s", subject, error)
        return None
