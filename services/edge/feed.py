"""The fan-out: per process one follower of each watched conversation, shared by all its readers.

A feed keeps a bounded ring of recent frames. A reader that falls behind the ring, or begins before it, reads the
log at its own pace until it is back; nothing is kept for it meanwhile.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from opentelemetry import metrics
from tapeline import limits, subjects
from tapeline.connection import Unavailable
from tapeline.follow import follow, within
from tapeline.tape import Tape

from .frame import Frame, frame
from .meters import Meters

_meter = metrics.get_meter("tapeline")
_catch_ups: Final = _meter.create_counter("tapeline.feed.catch_up_reads", "1", "Times a reader read the log")


class Feed:
    """One conversation, followed."""

    def __init__(self, tape: Tape, conversation: str, meters: Meters) -> None:
        self._tape = tape
        self._conversation = conversation
        self._meters = meters
        self._ring: deque[Frame] = deque()
        self._ring_bytes = 0
        self._base = 0
        """Every event after this one, up to the newest, is in the ring."""
        self._stirred = asyncio.Event()
        self._error: Exception | None = None
        self._task = asyncio.create_task(self._run())
        self._ready = asyncio.Event()
        self.readers = 0

    @property
    def failed(self) -> bool:
        return self._error is not None

    def cancel(self) -> None:
        self._task.cancel()

    async def _run(self) -> None:
        try:
            self._base = await self._tape.last(self._conversation)
            async with contextlib.aclosing(follow(self._tape, self._conversation, self._base)) as pages:
                async for page in pages:
                    for record in page:
                        self._meters.event(record)
                        self._add(frame(record))
                    self._ready.set()
                    self._stir()
        except Exception as error:  # noqa: BLE001 - whatever it is, the readers are told, and come back
            self._error = error
            self._ready.set()
            self._stir()

    def _add(self, one: Frame) -> None:
        self._ring.append(one)
        self._ring_bytes += len(one.data)
        while len(self._ring) > limits.RING_FRAMES_MAX or self._ring_bytes > limits.RING_BYTES_MAX:
            oldest = self._ring.popleft()
            self._ring_bytes -= len(oldest.data)
            self._base = oldest.seq

    def _stir(self) -> None:
        self._stirred.set()
        self._stirred = asyncio.Event()

    async def read(self, after: int, *, facts_only: bool, idle_s: float) -> AsyncGenerator[list[Frame]]:
        """Frames after sequence `after`, for ever; an empty list after each `idle_s` of silence.

        Raises `Unavailable` when the tape cannot be followed any longer.
        """
        await self._ready.wait()
        while True:
            if self._error is not None:
                raise Unavailable(str(self._error)) from self._error
            if after < self._base:
                _catch_ups.add(1)
                base = until = self._base
                kind = subjects.ALL
                if facts_only:
                    kind, until = subjects.FACTS, await self._tape.newest_fact(self._conversation, base)
                pages = self._tape.pages(self._conversation, after, kind, until)
                async with contextlib.aclosing(pages):
                    async for page in pages:
                        after = page[-1].seq
                        yield [frame(record) for record in page]
                after = max(after, base)
                continue
            stirred = self._stirred
            if fresh := self._after(after, facts_only=facts_only):
                after = fresh[-1].seq
                yield fresh
            elif not await within(stirred, idle_s):
                yield []

    def _after(self, after: int, *, facts_only: bool) -> list[Frame]:
        fresh: list[Frame] = []
        for one in reversed(self._ring):
            if one.seq <= after:
                break
            if one.is_fact or not facts_only:
                fresh.append(one)
        fresh.reverse()
        return fresh


class Feeds:
    """The conversations that are watched in this process."""

    def __init__(self, tape: Tape, meters: Meters) -> None:
        self._tape = tape
        self._meters = meters
        self._feeds: dict[str, Feed] = {}

    @asynccontextmanager
    async def of(self, conversation: str) -> AsyncIterator[Feed]:
        """The conversation's feed, kept while open and a little longer."""
        feed = self._feeds.get(conversation)
        if feed is None or feed.failed:
            feed = self._feeds[conversation] = Feed(self._tape, conversation, self._meters)
        feed.readers += 1
        try:
            yield feed
        finally:
            feed.readers -= 1
            if feed.readers == 0:
                asyncio.get_running_loop().call_later(limits.FEED_LINGER_S, self._drop, conversation, feed)

    def _drop(self, conversation: str, feed: Feed) -> None:
        if feed.readers:
            return
        if self._feeds.get(conversation) is feed:
            del self._feeds[conversation]
        feed.cancel()

    def close(self) -> None:
        for feed in self._feeds.values():
            feed.cancel()
