"""A conversation's events over HTTP: followed for as long as it takes, or replayed as they are stored.

One visible loop per response. It ends at an event boundary: after the run's terminal event, when the reader
leaves or may read no longer, or when this edge is drained. That a reader takes nothing for too long is its connection's
to see.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from starlette.types import Receive, Scope, Send
from tapeline import limits, subjects
from tapeline.connection import Unavailable, reason
from tapeline.record import Record
from tapeline.replay import Expired, check_whole, may_have_expired
from tapeline.tape import Gone, Tape

from .feed import About, Feeds, View
from .frame import HEARTBEAT, HELLO, frame, line
from .meters import Meters

log = logging.getLogger(__name__)

STREAM: Final = "tapeline.stream"
"""Where `scope` has the stream that has begun, once the layers around it have returned. Within them, every one of
thousands of idle streams would keep a dozen frames alive, and every event would pass through four `send`s.
"""

CONNECTION: Final = "tapeline.connection"
"""Where `scope` has the connection that the request came in by, if it is one that says when it ends."""

NDJSON_HEADERS: Final = (
    (b"content-type", b"application/x-ndjson"),
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),
)
SSE_HEADERS: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),
)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a reader asked for."""

    conversation: str
    about: About
    after: int
    view: View
    resumed: bool = False
    until: float | None = None
    """When the reader's token expires, seconds since the epoch."""


class Streams:
    """The responses that are streaming in this process, and the one clock that they share.

    A timer for each of them, set anew with each event, would cost more than sending the event does.
    """

    def __init__(self, feeds: Feeds, meters: Meters, heartbeat_s: float) -> None:
        self.feeds = feeds
        self.meters = meters
        self.draining = False
        self._heartbeat_s = heartbeat_s
        self._open: set[Stream] = set()
        self._failed = 0
        """Since the last tick."""
        self._why: Exception = Exception()
        self._clock = asyncio.create_task(self._tick())

    def drain(self) -> None:
        """Ends all, though not at once: they reconnect elsewhere, and would all arrive there together."""
        self.draining = True
        loop = asyncio.get_running_loop()
        for stream in self._open:
            loop.call_later(random.uniform(0, limits.DRAIN_JITTER_S), stream.end, "drained")

    def close(self) -> None:
        self._clock.cancel()
        self.feeds.close()

    def opened(self, stream: "Stream", *, resumed: bool) -> None:
        self._open.add(stream)
        self.meters.opened(resumed=resumed)
        if self.draining:
            stream.end("drained")

    def closed(self, stream: "Stream", how: str) -> None:
        self._open.discard(stream)
        self.meters.closed(how)

    def failed(self, error: Exception) -> None:
        """A stream could not go on. As a rule all fail for one reason, so the log has one line for many."""
        self._failed += 1
        self._why = error

    async def _tick(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(min(limits.STREAM_TICK_S, self._heartbeat_s / 4))
            now, date = clock(), time.time()
            for stream in self._open:
                stream.look(now, date, self._heartbeat_s)
            if self._failed:
                log.warning("%d streams could not go on: %s", self._failed, reason(self._why))
                self._failed = 0


class Stream:
    """A response that streams a `Reading`: how it begins, is watched, and ends. An ASGI application.

    What it sends in between is its kind's own loop, which ends when `how` is set.
    """

    __slots__ = ("_now", "_release", "_sent_at", "beat", "how", "news", "reading", "streams")

    headers = SSE_HEADERS
    finished: Sequence[str] = ("complete", "drained", "expired")
    """The ways to end that are an end; any other cuts the connection, so that nobody takes a part for the whole."""

    def __init__(self, reading: Reading, streams: Streams, release: Callable[[], None]) -> None:
        """`release` gives the reader's place back, and is called once, however this ends."""
        self.reading = reading
        self.streams = streams
        self._release = release
        self.how: str | None = None
        """Why it has to end, if it has to."""
        self.beat = False
        """A heartbeat is due."""
        self.news: asyncio.Future[None] | None = None
        """What it waits for, if it waits."""
        self._now = asyncio.get_running_loop().time
        self._sent_at = 0.0

    async def __call__(self, scope: Scope, _: Receive, send: Send) -> None:
        """Begins the response. `run` has to follow, outside of whatever is around this."""
        with contextlib.ExitStack() as undo:
            undo.callback(self._release)
            await send({"type": "http.response.start", "status": 200, "headers": list(self.headers)})
            if scope["method"] == "HEAD":  # without an end, the connection would take no further request
                await send({"type": "http.response.body", "body": b""})
            else:
                scope[STREAM] = self
                undo.pop_all()

    async def run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Streams until there is a reason to end. Where that is an end, and the reader takes it, the response has one;
        otherwise it stays unfinished, so that its connection is cut and the reader resumes.
        """
        self.streams.opened(self, resumed=self.reading.resumed)
        watch = None
        if connection := scope.get(CONNECTION):
            connection.tell(self.end)
        else:
            watch = asyncio.create_task(self._watch(receive))
        try:
            await self.stream(send)
            if self.how in self.finished:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (Expired, Gone, Unavailable) as error:
            self.streams.failed(error)
        finally:
            if watch is not None:
                watch.cancel()
            self._release()
            self.streams.closed(self, self.how or "failed")

    async def stream(self, send: Send) -> None:
        """The loop. Raises `Unavailable`."""
        raise NotImplementedError

    async def send(self, send: Send, data: bytes) -> None:
        """One write, which waits while the reader does not take what was written before."""
        self.beat = False
        self._sent_at = self._now()
        await send({"type": "http.response.body", "body": data, "more_body": True})

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.end("left")

    def wake(self) -> None:
        """There may be something to do."""
        if self.news is not None and not self.news.done():
            self.news.set_result(None)

    def end(self, how: str) -> None:
        """It shall end, at the next event boundary."""
        self.how = self.how or how
        self.wake()

    def look(self, now: float, date: float, heartbeat_s: float) -> None:
        """What time means to it: `now` by the loop's clock, `date` in seconds since the epoch."""
        if self.reading.until is not None and date >= self.reading.until:
            self.end("expired")
        elif now - self._sent_at >= heartbeat_s:
            self.beat = True
            self.wake()


class Events(Stream):
    """Follows: what is stored after the cursor, then what is being written, as server-sent events."""

    __slots__ = ()

    async def stream(self, send: Send) -> None:
        """Ends by itself after the end of the run that is read, if it is one."""
        after, view = self.reading.after, self.reading.view
        await self.send(send, HELLO)
        feeds = self.streams.feeds
        feed = await feeds.enter(self.reading.conversation, self.reading.about)
        try:
            while self.how is None:
                if feed.ends_at(after):
                    if self.beat:
                        await self.send(send, HEARTBEAT)
                    else:
                        self.news = feed.news()
                        await self.news
                    continue
                chunk = feed.since(after, view)
                if chunk is None:
                    async with contextlib.aclosing(feed.history(after, view)) as history:
                        async for chunk in history:
                            after = chunk.after
                            if chunk.data:
                                await self.send(send, chunk.data)
                            if chunk.ends:
                                self.how = "complete"
                            if self.how:
                                break
                    continue
                after = chunk.after
                if chunk.data:
                    await self.send(send, chunk.data)
                if chunk.ends:
                    self.how = "complete"
        finally:
            feeds.leave(self.reading.conversation, feed)


class Replay(Stream):
    """Sends what is stored after the cursor, and ends; at a pace, as it came, so many times as fast.

    A page is read when the one before it has been taken.
    """

    hello = HELLO
    ends_with_run = True

    def __init__(
        self, reading: Reading, streams: Streams, release: Callable[[], None], tape: Tape, pace: float | None
    ) -> None:
        super().__init__(reading, streams, release)
        self._tape = tape
        self._pace = pace

    def encoded(self, record: Record) -> bytes:
        return frame(record).data

    async def stream(self, send: Send) -> None:
        """Ends by itself at the end of the log, or of the run that is read."""
        pages = self._asked_for()
        if self._pace is not None:
            pages = self._paced(pages, self._pace)
        await self.send(send, self.hello)
        async with contextlib.aclosing(pages):
            async for page in pages:
                if self.how:
                    return
                await self.send(send, b"".join(map(self.encoded, page)))
        self.end("complete")

    async def _asked_for(self) -> AsyncGenerator[list[Record]]:
        """What is stored of the reader's view, a page at a time. Raises `Expired`, `Gone`, `Unavailable`."""
        reading, view = self.reading, self.reading.view
        seen = reading.after
        kind = subjects.FACTS if view.facts_only else subjects.ALL
        async with contextlib.aclosing(self._tape.pages(reading.conversation, seen, kind)) as pages:
            async for page in pages:
                if not view.facts_only and may_have_expired(self._tape, reading.about.created_ts):
                    check_whole(page, seen)
                seen = page[-1].seq
                mine, has_ended = (page, False) if view.run is None else self._of_run(page, view.run)
                if mine:
                    yield mine
                if has_ended:
                    return

    def _of_run(self, page: list[Record], run: str) -> tuple[list[Record], bool]:
        """What of a page is the run's, and whether there is nothing more of it to send."""
        mine: list[Record] = []
        for record in page:
            one = frame(record)
            if one.run == run:
                mine.append(record)
                if one.ends_run and self.ends_with_run:
                    return mine, True
        return mine, False

    async def _paced(self, pages: AsyncGenerator[list[Record]], pace: float) -> AsyncGenerator[list[Record]]:
        """Each record when its time has come; a long silence is cut short."""
        loop = asyncio.get_running_loop()
        due, before = loop.time(), None
        async with contextlib.aclosing(pages):
            async for page in pages:
                for record in page:
                    if before is not None:
                        silence_s = (record.stored_at - before).total_seconds() / pace
                        due += min(silence_s, limits.PACE_SILENCE_S_MAX)
                    before = record.stored_at
                    while self.how is None and due > loop.time():
                        self.news = loop.create_future()
                        timer = loop.call_at(due, self.wake)
                        await self.news
                        timer.cancel()
                    yield [record]


class Lines(Replay):
    """As lines of JSON. Cut short for whatever reason, it is not a whole file, and must not look like one."""

    headers = NDJSON_HEADERS
    finished = ("complete",)
    hello = b""
    ends_with_run = False  # a result may come late, and is on the tape

    def encoded(self, record: Record) -> bytes:
        return line(record)
