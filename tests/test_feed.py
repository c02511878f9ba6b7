"""The fan-out by itself, on a real server: readers behind one feed see the log, whatever happens to live copies; what
they share is made once; and it is gone when they are.
"""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from functools import partial
from typing import Any, Final

import pytest
from tapeline import events, limits, subjects
from tapeline.append import Chain
from tapeline.clock import now_ms
from tapeline.connection import api
from tapeline.record import Record
from tapeline.replay import Expired
from tapeline.tape import Tape

from services.edge import feed as feed_module
from services.edge.feed import About, Chunk, Feed, Feeds, Span, View
from services.edge.frame import Frame, frame
from services.edge.meters import Meters
from services.edge.stream import Events, Reading, Streams
from tests.client import Parser, Received, as_received
from tests.stack import until
from tests.test_log import mistreated

TOKENS: Final = 150
RUN: Final[dict[str, Any]] = {"run": "r", "ts": 1}
STEP: Final[dict[str, Any]] = {**RUN, "step": 1, "attempt": 1}


@pytest.fixture
async def streams(tape: Tape, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Streams]:
    monkeypatch.setattr(limits, "FEED_LINGER_S", 0.05)
    meters = Meters()
    streams = Streams(Feeds(tape, meters), meters, 15.0)
    yield streams
    streams.close()


class Reader:
    """One response of the edge's, read as fast as `may_read` lets it."""

    def __init__(self, streams: Streams, conversation: str, about: About, after: int, view: View) -> None:
        self.view, self.after = view, after
        self.received: list[Received] = []
        self.may_read = asyncio.Event()
        self.may_read.set()
        self._parser = Parser()
        self._gone = asyncio.Event()
        response = Events(Reading(conversation, about, after, view), streams, lambda: None)
        self.task = asyncio.create_task(response.run({}, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        await self.may_read.wait()
        self.received += self._parser.feed(message["body"])

    async def leave(self) -> None:
        self._gone.set()
        await self.task

    def has(self, wanted: list[Received]) -> bool:
        return self.received == wanted

    def wanted(self, log: list[Record]) -> list[Received]:
        """What it has to have been sent of the log."""
        mine = [one for one in log if one.seq > self.after and (one.is_fact or not self.view.facts_only)]
        return as_received(mine, self.view.run)


async def begun(tape: Tape, conversation: str) -> tuple[Chain, About]:
    chain = Chain(tape, conversation, 0)
    await chain.append(subjects.INPUT, events.Conversation(run=events.NO_RUN, ts=1, owner="ann"))
    await chain.append(subjects.INPUT, events.Message(**RUN, content="hi"))
    await chain.append(subjects.MODEL, events.Step(**STEP, worker="w", trigger=2))
    return chain, About("ann", now_ms(), chain.last)


async def say(chain: Chain, count: int) -> None:
    for number in range(count):
        await chain.append(subjects.MODEL_DELTA, events.Token(**STEP, text=f"t{number}"))


def heard(tape: Tape) -> list[str]:
    """What the connection is subscribed to of live copies."""
    return [one.subject for one in tape.nc._subs.values() if one.subject.startswith("live.")]


@asynccontextmanager
async def reading(*readers: Reader) -> AsyncIterator[None]:
    async with AsyncExitStack() as leaving:
        for reader in readers:
            leaving.push_async_callback(reader.leave)
        yield


@pytest.mark.parametrize("seed", range(3))
async def test_readers_do_not_notice_that_live_copies_are_dropped_doubled_and_reordered(
    tape: Tape, streams: Streams, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    print(f"seed {seed}")
    async with mistreated(tape, seed, monkeypatch):
        for limit, value in (("RECONCILE_S", 0.2), ("RECONCILE_FIRST_S", 0.2), ("RING_FRAMES_MAX", 16)):
            monkeypatch.setattr(limits, limit, value)
        chain, about = await begun(tape, "c")
        views = [View(), View(run="r"), View(facts_only=True), View(run="r", facts_only=True)]
        chance = random.Random(seed)
        readers = [Reader(streams, "c", about, after, view) for view in views for after in (0, 1, chain.last)]
        for _ in range(3):
            await say(chain, TOKENS // 3)
            readers += [Reader(streams, "c", about, chance.randint(0, chain.last), view) for view in views]
            slow = readers[chance.randrange(len(readers))]
            slow.may_read.clear() if slow.may_read.is_set() else slow.may_read.set()
        await chain.append(subjects.MODEL, events.Done(**STEP, reason="stop", duration_ms=1))
        log = await tape.read("c")
        async with reading(*readers):
            for reader in readers:
                reader.may_read.set()
                wanted = reader.wanted(log)
                await until(f"all {len(wanted)} are there", partial(reader.has, wanted))
                if reader.view.run:
                    await asyncio.wait_for(reader.task, 15)  # it ends with its run


async def test_a_watched_conversation_is_one_subscription_which_goes_with_its_last_reader(
    tape: Tape, streams: Streams
) -> None:
    one, about_one = await begun(tape, "one")
    other, about_other = await begun(tape, "other")
    readers = [Reader(streams, "one", about_one, 0, View()) for _ in range(20)]
    readers += [Reader(streams, "other", about_other, 0, View(facts_only=True)) for _ in range(20)]
    async with reading(*readers):
        await until("all read", lambda: all(len(reader.received) == 3 for reader in readers))
        assert len(heard(tape)) == 2
        feeds = list(streams.feeds._feeds.values())
        for reader in readers[1:]:
            await reader.leave()
        await say(one, 1)
        await until("it goes on for the one who stayed", lambda: len(readers[0].received) == 4)
        await until("the other's subscription has gone", lambda: heard(tape) == [f"live.{tape.subject('one')}"])
    await until("both have gone", lambda: not heard(tape))
    await until("nothing is kept", lambda: not streams.feeds._feeds and all(one._task.done() for one in feeds))
    again = Reader(streams, "other", about_other, 0, View())
    async with reading(again):
        await say(other, 1)
        await until("one who comes back is served", lambda: len(again.received) == 4)


async def test_an_event_is_encoded_once_for_all_its_readers(
    tape: Tape, streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []

    def counted(record: Record) -> Frame:
        encoded.append(record.seq)
        return frame(record)

    monkeypatch.setattr(feed_module, "frame", counted)
    chain, about = await begun(tape, "c")
    readers = [Reader(streams, "c", about, about.last_event_id, View()) for _ in range(50)]
    async with reading(*readers):
        await until("all are there", lambda: len(streams._open) == 50 and bool(heard(tape)))
        await say(chain, 40)
        await until("all have all", lambda: all(len(reader.received) == 40 for reader in readers))
    assert sorted(encoded) == [record.seq for record in await tape.read("c", about.last_event_id)]


async def followed(tape: Tape, chain: Chain, about: About, count: int) -> Feed:
    """A feed that has so many new events in its ring."""
    feed = Feed(tape, chain.conversation, about, Meters())
    await feed.ready()
    await say(chain, count)
    await until("it has them all", lambda: feed.about.last_event_id == chain.last)
    return feed


async def test_readers_who_choose_their_cursors_keep_nothing(tape: Tape) -> None:
    chain, about = await begun(tape, "c")
    feed = await followed(tape, chain, about, 40)
    try:
        for after in range(about.last_event_id, chain.last):
            for run in range(10):
                chunk = feed.since(after, View(run=f"no-{run}"))
                assert chunk == Chunk(b"", chain.last, ends=False)
        assert len(feed._cut) <= limits.CUTS_MAX
    finally:
        feed.cancel()


async def test_a_reader_behind_the_ring_is_told_of_what_has_expired_on_its_way(
    tape: Tape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "HISTORY_BATCH", 10)
    chain, about = await begun(tape, "c")
    await say(chain, 40)
    await chain.append(subjects.MODEL, events.Done(**STEP, reason="stop", duration_ms=1))
    old = now_ms() - 2 * tape.deployment.delta_ttl_s * 1000
    purge = f"STREAM.PURGE.{subjects.stream(tape.shard('c'))}"
    for created_ts, is_told in ((old, True), (now_ms(), False)):
        feed = Feed(tape, "c", about._replace(created_ts=created_ts), Meters())
        try:
            await feed.ready()
            async with aclosing(feed.history(0, View())) as history:
                first = await anext(history)
                await api(tape.nc, purge, {"filter": tape.subject("c", subjects.MODEL_DELTA)})
                if is_told:
                    assert first.after == 10
                    with pytest.raises(Expired):
                        await anext(history)
                else:  # nothing is old enough, so a gap is what somebody says who may say anything
                    assert [chunk.after async for chunk in history][-1:] in ([], [chain.last])
        finally:
            feed.cancel()


async def test_where_a_run_begins_and_ends_is_known_to_its_next_reader(tape: Tape, streams: Streams) -> None:
    chain, about = await begun(tape, "c")
    assert streams.feeds.about("c", "ann", run="r") is None
    stale = about._replace(last_event_id=about.last_event_id - 1, span=Span("stale", 2, None))
    mine = about._replace(span=Span("r", 2, None))
    over = stale._replace(span=Span("over", 1, 2))
    readers = [Reader(streams, "c", one, 0, View(run="r")) for one in (mine, stale, over)]
    async with reading(*readers):
        await until("all read", lambda: all(len(reader.received) == 2 for reader in readers))
        known = streams.feeds.about("c", "ann", chain.last, "r")
        assert known is not None
        assert known.span == Span("r", 2, None)
        assert streams.feeds.about("c", "bob", run="r") is None
        assert streams.feeds.about("c", "ann", run="stale") is None, "it may have ended before the feed began"
        assert streams.feeds.about("c", "ann", run="over") is not None
        plain = streams.feeds.about("c", "ann")
        assert plain is not None
        assert plain.span is None
        await chain.append(subjects.MODEL, events.Done(**STEP, reason="stop", duration_ms=1))
        await asyncio.wait_for(asyncio.gather(*(reader.task for reader in readers)), 15)
        known = streams.feeds.about("c", "ann", chain.last, "r")
        assert known is not None
        assert known.span == Span("r", 2, chain.last)
        feed = streams.feeds._feeds["c"]
        for number in range(2 * limits.SPANS_MAX):
            feed.learn(about._replace(span=Span(f"r{number}", 1, 1)))
        assert len(feed._spans) == limits.SPANS_MAX
