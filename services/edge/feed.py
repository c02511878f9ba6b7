"""The fan-out: per process one follower of each watched conversation, shared by all its readers.

A feed keeps a bounded ring of recent frames. A reader that falls behind the ring, or begins before it, reads the
log at its own pace until it is back; nothing is kept for it meanwhile.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Iterable, Iterator
from typing import Final, NamedTuple

from opentelemetry import metrics
from tapeline import limits, subjects
from tapeline.connection import Refused, Unavailable
from tapeline.follow import follow
from tapeline.replay import check_whole, may_have_expired
from tapeline.tape import Gone, Tape

from .frame import Frame, frame
from .meters import Meters

log = logging.getLogger(__name__)

_meter = metrics.get_meter("tapeline")
_watched: Final = _meter.create_up_down_counter("tapeline.feeds.open", "1", "Conversations that are followed")
_catch_ups: Final = _meter.create_counter("tapeline.feed.catch_up_reads", "1", "Times a reader read the log")


class View(NamedTuple):
    """Which of a conversation's events a reader wants."""

    run: str | None = None
    facts_only: bool = False


class Chunk(NamedTuple):
    """What goes out in one write."""

    data: bytes
    after: int
    """Where the reader is with it: it has seen every event of its view up to this one."""
    ends: bool
    """Its last event ends what the view shows."""


class Span(NamedTuple):
    """Where a run begins, and where it ended, if it has."""

    run: str
    first: int
    ended: int | None


class About(NamedTuple):
    """What has to be known of a conversation to let a reader in."""

    owner: str
    created_ts: int
    last_event_id: int
    span: Span | None = None
    """Of the run that is read, if it is one; as of `last_event_id`."""


class Feed:
    """One conversation, followed, of which its readers have already been told `about`."""

    __slots__ = (
        "_base",
        "_conversation",
        "_cut",
        "_error",
        "_is_ready",
        "_meters",
        "_pages",
        "_ring",
        "_ring_bytes",
        "_spans",
        "_tape",
        "_task",
        "_waiting",
        "about",
        "readers",
    )

    def __init__(self, tape: Tape, conversation: str, about: About, meters: Meters) -> None:
        self.about = about._replace(span=None)
        self.readers = 0
        self._waiting: list[asyncio.Future[None]] = []
        self._tape = tape
        self._conversation = conversation
        self._meters = meters
        self._ring: dict[int, Frame] = {}
        """By sequence, in order."""
        self._ring_bytes = 0
        self._base = 0
        """Every event after this one, up to the newest, is in the ring."""
        self._spans: dict[str, Span] = {}
        """Of runs that were read here, kept up with what is followed."""
        self._cut: dict[tuple[int, View], Chunk] = {}
        """What readers at the same place with the same view get: made once."""
        self._pages: dict[tuple[int, int, bool], asyncio.Task[list[Frame]]] = {}
        """What is being read from the log: after which event, up to which, and whether facts only."""
        self._error: Exception | None = None
        self._is_ready = False
        self._task = asyncio.create_task(self._run())

    @property
    def failed(self) -> bool:
        return self._error is not None

    def cancel(self) -> None:
        self._task.cancel()

    async def ready(self) -> None:
        """Returns when it is known where the log ends."""
        while not self._is_ready:
            await self.news()

    async def _run(self) -> None:
        _watched.add(1)
        try:
            self._base = await self._tape.last(self._conversation)
            if not self._base:
                raise Gone
            self.about = self.about._replace(last_event_id=self._base)
            async with contextlib.aclosing(follow(self._tape, self._conversation, self._base)) as pages:
                async for page in pages:
                    for record in page:
                        self._meters.event(record)
                        self._add(frame(record))
                    if page:
                        self.about = self.about._replace(last_event_id=page[-1].seq)
                    self._stir()
        except Exception as error:  # whatever it is, the readers are told, and come back
            if not isinstance(error, Gone | Unavailable | Refused):
                log.exception("%s: it cannot be followed", self._conversation)
            self._error = error
            self._stir()
        finally:
            _watched.add(-1)

    def about_run(self, run: str) -> About | None:
        """What has to be known to let in a reader of a run that was read here before."""
        span = self._spans.get(run)
        return None if span is None else self.about._replace(span=span)

    def learn(self, about: About) -> None:
        """Keeps what a reader knows of its run; but not what is older than the feed, which may have passed its end."""
        span = about.span
        if span is None or (span.ended is None and about.last_event_id < self.about.last_event_id):
            return
        if len(self._spans) == limits.SPANS_MAX:
            del self._spans[next(iter(self._spans))]
        self._spans[span.run] = span

    def _add(self, one: Frame) -> None:
        if one.ends_run and (span := self._spans.get(one.run)) and span.ended is None:
            self._spans[one.run] = span._replace(ended=one.seq)
        self._ring[one.seq] = one
        self._ring_bytes += len(one.data)
        while len(self._ring) > limits.RING_FRAMES_MAX or self._ring_bytes > limits.RING_BYTES_MAX:
            oldest = self._ring.pop(next(iter(self._ring)))
            self._ring_bytes -= len(oldest.data)
            self._base = oldest.seq

    def _stir(self) -> None:
        self._is_ready = True
        self._cut.clear()
        waiting, self._waiting = self._waiting, []
        for news in waiting:
            if not news.done():
                news.set_result(None)

    def news(self) -> asyncio.Future[None]:
        """Done when there is something new; the reader may set it itself, to go on without."""
        if len(self._waiting) > 2 * self.readers:  # heartbeats leave theirs behind
            self._waiting = [news for news in self._waiting if not news.done()]
        news: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(news)
        return news

    def ends_at(self, after: int) -> bool:
        """Whether a reader that has seen event `after` has seen all there is, and there may be more."""
        return after >= self.about.last_event_id and self._error is None

    def since(self, after: int, view: View) -> Chunk | None:
        """What a reader that has seen event `after` gets next; None: it is behind the ring.

        Raises `Unavailable` when there is no more, and the conversation is not followed any longer.
        """
        chunk = self._cut.get((after, view))
        if chunk is None:
            if after < self._base:
                return None
            fresh = self._after(after)
            if not fresh and self._error is not None:
                raise Unavailable(str(self._error)) from self._error
            if len(self._cut) == limits.CUTS_MAX:  # a cursor is its reader's to choose
                del self._cut[next(iter(self._cut))]
            chunk = self._cut[after, view] = next(chunks(fresh, view, after))
        return chunk

    def _after(self, after: int) -> list[Frame]:
        fresh: list[Frame] = []
        for one in reversed(self._ring.values()):
            if one.seq <= after:
                break
            fresh.append(one)
        fresh.reverse()
        return fresh

    async def history(self, after: int, view: View) -> AsyncGenerator[Chunk]:
        """From the log, what a reader behind the ring gets next, until it is back in the ring.

        Raises `Expired`, `Gone`, `Unavailable`.
        """
        _catch_ups.add(1)
        base = self._base
        while after < base and (page := await self._page(after, base, view.facts_only)):
            for chunk in chunks(page, view, after):
                after = chunk.after
                yield chunk
        if after < base:
            yield Chunk(b"", base, ends=False)

    async def _page(self, after: int, until: int, facts_only: bool) -> list[Frame]:
        """What comes next in the log, read once for all who ask for the same at the same time."""
        key = (after, until, facts_only)
        reading = self._pages.get(key)
        if reading is None:
            reading = self._pages[key] = asyncio.create_task(self._read(after, until, facts_only))
            reading.add_done_callback(lambda done: self._read_page(key, done))
        return await asyncio.shield(reading)

    def _read_page(self, key: tuple[int, int, bool], done: "asyncio.Task[list[Frame]]") -> None:
        del self._pages[key]
        if not done.cancelled():
            done.exception()  # all who asked may have left

    async def _read(self, after: int, until: int, facts_only: bool) -> list[Frame]:
        kind = subjects.ALL
        if facts_only:
            kind, until = subjects.FACTS, await self._tape.newest_fact(self._conversation, until)
        async with contextlib.aclosing(self._tape.pages(self._conversation, after, kind, until)) as pages:
            async for page in pages:
                if not facts_only and may_have_expired(self._tape, self.about.created_ts):
                    check_whole(page, after)
                return [frame(record) for record in page]
        return []


def chunks(frames: Iterable[Frame], view: View, after: int) -> Iterator[Chunk]:
    """Frames of a view, joined into writes of a bounded size; the last may be empty."""
    parts: list[bytes] = []
    size = 0
    for one in frames:
        after = one.seq
        if not one.ends_all and (view.run not in (None, one.run) or (view.facts_only and not one.is_fact)):
            continue
        parts.append(one.data)
        size += len(one.data)
        if one.ends_all or (one.ends_run and view.run is not None):
            yield Chunk(b"".join(parts), after, ends=True)
            return
        if size >= limits.WRITE_BYTES_MAX:
            yield Chunk(b"".join(parts), after, ends=False)
            parts, size = [], 0
    yield Chunk(b"".join(parts), after, ends=False)


class Feeds:
    """The conversations that are watched in this process."""

    def __init__(self, tape: Tape, meters: Meters) -> None:
        self._tape = tape
        self._meters = meters
        self._feeds: dict[str, Feed] = {}

    def about(self, conversation: str, user: str, after: int = 0, run: str | None = None) -> About | None:
        """What is known of a conversation of the user's, and of a run in it, that others are reading already, as far as
        event `after`.
        """
        feed = self._feeds.get(conversation)
        if feed is None or feed.failed or feed.about.owner != user or feed.about.last_event_id < after:
            return None
        return feed.about if run is None else feed.about_run(run)

    async def enter(self, conversation: str, about: About) -> Feed:
        """The conversation's feed, with one reader more."""
        feed = self._feeds.get(conversation)
        if feed is None or feed.failed or feed.about.owner != about.owner:
            feed = self._feeds[conversation] = Feed(self._tape, conversation, about, self._meters)
        feed.readers += 1
        try:
            await feed.ready()
        except BaseException:
            self.leave(conversation, feed)
            raise
        feed.learn(about)
        return feed

    def leave(self, conversation: str, feed: Feed) -> None:
        """With one less; without any, it is kept a little longer."""
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
