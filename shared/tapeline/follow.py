"""Following one conversation: its stored events from a cursor on, then the live ones, without gap or duplicate.

Live copies can be lost (reconnect, slow consumer, route loss, leader change). Each event names its
predecessor, so a gap shows at once; a lost tail shows when the log is asked, after a silence or a reconnect.
Both heal from history. The log is the buffer: what waits here is bounded, and dropped rather than kept.
"""

import asyncio
from collections.abc import AsyncGenerator
from typing import Final

from opentelemetry import metrics

from . import limits
from .connection import Unavailable
from .record import Record
from .tape import Gone, Tape

_meter = metrics.get_meter("tapeline")
_healed: Final = _meter.create_counter("tapeline.follow.gaps_healed", "1", "Gaps in live copies, read from history")


async def follow(tape: Tape, conversation: str, after: int = 0) -> AsyncGenerator[list[Record]]:
    """Pages of the events after event `after` (0: from the first on), for ever; close it to stop.

    Raises `Gone` after the event that deleted the conversation, also where that was missed; `Unavailable` where history
    cannot be read. One empty page says that it has been read to its end: what follows is live, and while NATS is away
    from then on there is nothing to follow, which is no failure.
    """
    waiting: list[Record] = []
    bell = Bell()
    doubtful = False

    def take(record: Record) -> None:
        if len(waiting) == limits.FOLLOW_PENDING_MAX:
            del waiting[0]  # the next one names its predecessor, so the gap will show
        waiting.append(record)
        bell.ring()

    def doubt() -> None:
        nonlocal doubtful
        doubtful = True
        bell.ring()

    async with tape.live(conversation, take, doubt):
        async for page in tape.pages(conversation, after):
            after = joined(page, after)
            yield page
            end(page)
        yield []
        patience_s = limits.RECONCILE_FIRST_S
        while True:
            if waiting or await bell.heard(min(patience_s, limits.RECONCILE_S)):
                patience_s = limits.RECONCILE_FIRST_S
            else:
                patience_s *= 2
                doubtful = True
            ready: list[Record] = []
            missing = 0
            while waiting and not missing:
                record = waiting.pop(0)  # one, as a rule
                if record.seq <= after:
                    continue  # history had it already
                if record.prev == after:
                    ready.append(record)
                    after = record.seq
                else:
                    missing = record.seq
            if ready:
                yield ready
                end(ready)
            doubtful = doubtful or missing > after
            if not doubtful or not tape.connected:
                continue
            doubtful = False
            try:
                newest = await tape.last(conversation)
                if after and not newest:
                    await tape.confirm(conversation)
                    newest = await tape.last(conversation)
                    if not newest:
                        raise Gone
                missing = max(missing, newest)
                if missing > after:
                    _healed.add(1)
                    async for page in tape.pages(conversation, after, until=missing):
                        after = joined(page, after)
                        yield page
                        end(page)
            except Unavailable:
                doubtful = True


def joined(page: list[Record], after: int) -> int:
    """The sequence that a page leads to. Raises `Gone` where it is not of the conversation that `after` is of."""
    if not page[0].follows(after):
        raise Gone
    return page[-1].seq


def end(page: list[Record]) -> None:
    """Raises `Gone` where the conversation is deleted in this page."""
    if any(record.deletes for record in page):
        raise Gone


class Bell:
    """What one waiter listens for: that it is rung, or a silence. Lighter than an `Event` with a timeout, of which
    there would be one for every conversation that is watched.
    """

    __slots__ = ("_is_rung", "_waiter")

    def __init__(self) -> None:
        self._is_rung = False
        self._waiter: asyncio.Future[None] | None = None

    def ring(self) -> None:
        """Wakes the waiter, or whoever comes to wait."""
        self._is_rung = True
        self._wake()

    async def heard(self, within_s: float) -> bool:
        """Whether it has been rung since it was last heard, or is within so many seconds."""
        if not self._is_rung:
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            silence = loop.call_later(within_s, self._wake)
            try:
                await self._waiter
            finally:
                silence.cancel()
        is_rung, self._is_rung = self._is_rung, False
        return is_rung

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
