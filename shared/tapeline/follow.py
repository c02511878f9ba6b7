"""Following one conversation: its stored events from a cursor on, then the live ones, without gap or duplicate.

Live copies can be lost (reconnect, slow consumer, route loss, leader change). Each event names its
predecessor, so a gap shows at once; a lost tail shows when the log is asked, after a silence or a reconnect.
Both heal from history. The log is the buffer: what waits here is bounded, and dropped rather than kept.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from typing import Final

from opentelemetry import metrics

from . import limits
from .tape import Record, Tape

_meter = metrics.get_meter("tapeline")
_healed: Final = _meter.create_counter("tapeline.follow.gaps_healed", "1", "Gaps in live copies, read from history")


async def follow(tape: Tape, conversation: str, after: int = 0) -> AsyncGenerator[list[Record]]:
    """Pages of the events after sequence `after`, for ever; close it to stop. Raises `Unavailable`.

    One empty page says that history has been read to its end: what follows is live.
    """
    waiting: deque[Record] = deque()
    stirred = asyncio.Event()
    doubtful = False

    def take(record: Record) -> None:
        if len(waiting) == limits.FOLLOW_PENDING_MAX:
            waiting.popleft()  # the next one names its predecessor, so the gap will show
        waiting.append(record)
        stirred.set()

    def doubt() -> None:
        nonlocal doubtful
        doubtful = True
        stirred.set()

    async with tape.live(conversation, take, doubt):
        async for page in tape.pages(conversation, after):
            after = page[-1].seq
            yield page
        yield []
        patience_s = limits.RECONCILE_FIRST_S
        while True:
            if await within(stirred, min(patience_s, limits.RECONCILE_S)):
                patience_s = limits.RECONCILE_FIRST_S
            else:
                patience_s *= 2
                doubtful = True
            stirred.clear()
            ready: list[Record] = []
            missing = 0
            while waiting and not missing:
                record = waiting.popleft()
                if record.seq <= after:
                    continue  # history had it already
                if record.prev == after:
                    ready.append(record)
                    after = record.seq
                else:
                    missing = record.seq
            if ready:
                yield ready
            if doubtful:
                doubtful = False
                missing = max(missing, await tape.last(conversation))
            if missing > after:
                _healed.add(1)
                async for page in tape.pages(conversation, after, until=missing):
                    after = page[-1].seq
                    yield page
            if waiting:
                stirred.set()


async def within(event: asyncio.Event, seconds: float) -> bool:
    """Whether the event was set within so many seconds."""
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False
