"""A conversation's events over HTTP: as server-sent events that resume anywhere, or as lines that end.

One visible loop per response. It ends at an event boundary: after the run's terminal event, when the reader
leaves or takes nothing for too long, or when this edge is drained.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Final

from starlette.types import Receive, Scope, Send
from tapeline import limits, subjects
from tapeline.connection import Unavailable
from tapeline.tape import Tape

from .feed import Feeds
from .frame import HEARTBEAT, HELLO, Frame, frame, line
from .meters import Meters

log = logging.getLogger(__name__)

SSE_HEADERS: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),
)


@dataclass(frozen=True)
class Reading:
    """What a reader asked for."""

    conversation: str
    after: int
    run: str | None = None
    facts_only: bool = False
    resumed: bool = False


class Events:
    """The response that streams a `Reading` as server-sent events. An ASGI application."""

    def __init__(
        self, reading: Reading, feeds: Feeds, meters: Meters, draining: asyncio.Event, heartbeat_s: float
    ) -> None:
        self._reading = reading
        self._feeds = feeds
        self._meters = meters
        self._draining = draining
        self._heartbeat_s = heartbeat_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Streams until there is a reason to end, and ends the response properly."""
        if scope["method"] == "HEAD":  # without an end, the connection would take no further request
            await send({"type": "http.response.start", "status": 200, "headers": list(SSE_HEADERS)})
            await send({"type": "http.response.body", "body": b""})
            return
        self._meters.opened(resumed=self._reading.resumed)
        how = "failed"
        ends = {
            asyncio.create_task(self._send_all(send)): "complete",
            asyncio.create_task(_left(receive)): "left",
            asyncio.create_task(self._drained()): "drained",
        }
        try:
            finished, __ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            ended = finished.pop()
            how = ends[ended]
            ended.result()
        except TimeoutError:
            how = "slow"
        except Unavailable as error:
            log.warning("%s: a stream was ended: %s", self._reading.conversation, error)
        finally:
            for task in ends:
                task.cancel()
            await asyncio.gather(*ends, return_exceptions=True)
            self._meters.closed(how)
        if how in ("complete", "drained"):
            patience_s = limits.WRITE_TIMEOUT_S if how == "complete" else limits.DRAIN_END_S
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(patience_s):
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
        # otherwise the response stays unfinished: the server cuts the connection, and the reader resumes

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": list(SSE_HEADERS)})
        async with contextlib.aclosing(self._chunks()) as chunks:
            async for chunk in chunks:
                async with asyncio.timeout(limits.WRITE_TIMEOUT_S):
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def _chunks(self) -> AsyncGenerator[bytes]:
        reading = self._reading
        yield HELLO
        async with self._feeds.of(reading.conversation) as feed:
            pages = feed.read(reading.after, facts_only=reading.facts_only, idle_s=self._heartbeat_s)
            async with contextlib.aclosing(pages):
                async for page in pages:
                    if not page:
                        yield HEARTBEAT
                        continue
                    mine, ended = _of_run(page, reading.run)
                    for chunk in _joined(mine):
                        yield chunk
                    if ended:
                        return

    async def _drained(self) -> None:
        await self._draining.wait()
        # not all at once: they reconnect elsewhere, and would all arrive there together
        await asyncio.sleep(random.uniform(0, limits.DRAIN_JITTER_S))


class Lines:
    """The response that sends what is stored, as lines of JSON, and ends. An ASGI application."""

    def __init__(self, reading: Reading, tape: Tape) -> None:
        self._reading = reading
        self._tape = tape

    async def __call__(self, _: Scope, __: Receive, send: Send) -> None:
        """Reads a page only when the one before it has been taken."""
        headers = [(b"content-type", b"application/x-ndjson"), (b"cache-control", b"no-cache, no-transform")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for chunk in self._chunks():
            async with asyncio.timeout(limits.WRITE_TIMEOUT_S):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _chunks(self) -> AsyncIterator[bytes]:
        reading = self._reading
        kind = subjects.FACTS if reading.facts_only else subjects.ALL
        async for page in self._tape.pages(reading.conversation, reading.after, kind):
            lines = [line(record) for record in page if reading.run in (None, frame(record).run)]
            if lines:
                yield b"".join(lines)


def _of_run(page: list[Frame], run: str | None) -> tuple[list[Frame], bool]:
    """The frames of `run` (None: all), and whether they end it."""
    if run is None:
        return page, False
    mine = []
    for one in page:
        if one.run == run:
            mine.append(one)
            if one.ends_run:
                return mine, True
    return mine, False


def _joined(frames: Iterable[Frame]) -> Iterable[bytes]:
    """Frames joined into writes of a bounded size."""
    parts: list[bytes] = []
    size = 0
    for one in frames:
        parts.append(one.data)
        size += len(one.data)
        if size >= limits.WRITE_BYTES_MAX:
            yield b"".join(parts)
            parts, size = [], 0
    if parts:
        yield b"".join(parts)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
