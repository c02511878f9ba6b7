"""The log by itself: the fence, batches, history, and following, on a real server."""

import asyncio
import json
import random
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from tapeline import events, limits, provision, subjects
from tapeline.append import Chain, Overtaken
from tapeline.connection import Connection, Refused, Unavailable, api, connect, listen
from tapeline.follow import follow
from tapeline.record import Entry, Record
from tapeline.tape import Deployment, Stale, Tape

from services.embedded import EmbeddedNats

CONVERSATION = "c-1"


def token(text: str, run: str = "r") -> events.Token:
    return events.Token(run=run, ts=1, step=1, attempt=1, text=text)


def harmless(_: Record) -> bool:
    return False


async def fill(tape: Tape, count: int, conversation: str = CONVERSATION, after: int = 0) -> Chain:
    chain = Chain(tape, conversation, after)
    for number in range(count):
        await chain.append(subjects.MODEL_DELTA, token(f"t{number}"))
    return chain


async def until(pages: AsyncIterator[list[Record]], count: int) -> list[Record]:
    """The first `count` records that are followed."""
    seen: list[Record] = []
    async with asyncio.timeout(20):
        async for page in pages:
            seen += page
            if len(seen) >= count:
                return seen
    raise AssertionError("following ended by itself")


def assert_chained(records: Iterable[Record]) -> None:
    last = 0
    for record in records:
        assert record.prev == last
        last = record.seq


# The fence


async def test_an_append_that_has_not_seen_the_newest_event_is_refused(tape: Tape) -> None:
    chain = await fill(tape, 3)
    entry = Entry(subjects.MODEL, events.encode(token("zombie")))
    with pytest.raises(Stale) as stale:
        await tape.append(CONVERSATION, entry, chain.last - 1)
    assert stale.value.last == chain.last
    assert len(await tape.read(CONVERSATION)) == 3


async def test_a_fence_holds_over_all_subjects_of_the_conversation_and_no_other(tape: Tape) -> None:
    chain = await fill(tape, 1)
    await tape.append(CONVERSATION, Entry(subjects.INPUT, b'{"type":"x"}'), chain.last)
    with pytest.raises(Overtaken):
        await chain.append(subjects.MODEL_DELTA, token("late"))
    await fill(tape, 1, "another")


async def test_a_writer_passes_what_is_harmless_and_stops_at_what_ends_it(tape: Tape) -> None:
    await fill(tape, 1)
    chain = Chain(tape, CONVERSATION, 1, lambda record: isinstance(record.event(), events.Stop))
    await Chain(tape, CONVERSATION, 1).append(subjects.TOOL_DELTA, token("harmless"))
    await chain.append(subjects.MODEL_DELTA, token("mine"))
    await Chain(tape, CONVERSATION, chain.last).append(subjects.INPUT, events.Stop(run="r", ts=1))
    with pytest.raises(Overtaken) as overtaken:
        await chain.append(subjects.MODEL_DELTA, token("too late"))
    assert overtaken.value.by is not None
    assert isinstance(overtaken.value.by.event(), events.Stop)
    records = await tape.read(CONVERSATION)
    assert_chained(records)
    assert len(records) == 4


async def test_many_writers_on_one_conversation_lose_no_event_and_make_one_chain(tape: Tape) -> None:
    chains = [Chain(tape, CONVERSATION, 0, harmless) for _ in range(8)]

    async def write(number: int, chain: Chain) -> None:
        for index in range(20):
            await chain.append(subjects.MODEL_DELTA, token(f"{number}.{index}", run=str(number)))

    await asyncio.gather(*(write(number, chain) for number, chain in enumerate(chains)))
    records = await tape.read(CONVERSATION)
    assert_chained(records)
    for number in range(8):
        mine = [
            event.text
            for event in (r.event() for r in records)
            if isinstance(event, events.Token) and event.run == str(number)
        ]
        assert mine == [f"{number}.{index}" for index in range(20)]


async def test_an_append_whose_answer_was_lost_is_found_and_not_stored_twice(
    tape: Tape, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = await fill(tape, 2)
    stored = tape.append

    async def answer_lost(conversation: str, entry: Entry, after: int) -> int:
        await stored(conversation, entry, after)
        monkeypatch.undo()
        raise Unavailable("the answer was lost")

    monkeypatch.setattr(tape, "append", answer_lost)
    seq = await chain.append(subjects.MODEL_DELTA, token("once"))
    assert [record.seq for record in await tape.read(CONVERSATION)][-1] == seq == 3


async def test_a_purged_conversation_ends_its_writers(tape: Tape) -> None:
    chain = await fill(tape, 3)
    stream = subjects.stream(tape.shard(CONVERSATION))
    await tape.nc.request(f"$JS.API.STREAM.PURGE.{stream}", b'{"filter":"tape.*.c-1.>"}')
    with pytest.raises(Overtaken) as overtaken:
        await chain.append(subjects.MODEL_DELTA, token("into the void"))
    assert overtaken.value.by is None
    assert await tape.last(CONVERSATION) == 0


async def test_an_event_too_large_is_refused_with_its_size_and_nothing_is_stored(tape: Tape) -> None:
    with pytest.raises(Refused, match=str(limits.EVENT_BYTES_MAX)):
        await Chain(tape, CONVERSATION, 0).append(subjects.MODEL, token("x" * 1_100_000))
    assert await tape.last(CONVERSATION) == 0


async def test_an_append_that_is_cancelled_as_its_answer_comes_is_cancelled(tape: Tape) -> None:
    chance, met = random.Random(7), 0
    for _ in range(400):
        chain = Chain(tape, CONVERSATION, await tape.last(CONVERSATION))
        append = asyncio.create_task(chain.append(subjects.MODEL_DELTA, token("x")))
        give_up = time.perf_counter() + chance.uniform(0, 0.0015)
        while time.perf_counter() < give_up and not append.done():
            await asyncio.sleep(0)
        if append.cancel():
            met += 1
            async with asyncio.timeout(5):
                await asyncio.gather(append, return_exceptions=True)
            assert append.cancelled(), "who cancels it, and waits for it to end, would wait for ever"
    assert met > 20


async def test_connecting_ends_though_a_cancellation_is_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As nats-py's `wait_for` may: it tried again for ever, and a service that is not let in never said so."""
    ignored = 0

    async def connect_of_nats_py(*_: Any, **__: Any) -> None:
        nonlocal ignored
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                if ignored == 2:
                    raise
                ignored += 1

    monkeypatch.setattr(limits, "CONNECT_TIMEOUT_S", 0)
    monkeypatch.setattr(Client, "connect", connect_of_nats_py)
    async with asyncio.timeout(30):
        with pytest.raises(Unavailable, match="cannot reach NATS"):
            await connect("nats://127.0.0.1:1", "test")
    assert ignored == 2


# Batches


async def test_a_batch_is_stored_together_or_not_at_all(tape: Tape) -> None:
    chain = Chain(tape, CONVERSATION, 0)
    batch = [(subjects.MODEL_DELTA, token("a")), (subjects.call("t"), token("b")), (subjects.call("t"), token("c"))]
    sequences = await chain.commit(batch)
    assert sequences == [1, 2, 3]
    with pytest.raises(Overtaken):
        await Chain(tape, CONVERSATION, 2).commit(batch)
    records = await tape.read(CONVERSATION)
    assert_chained(records)
    assert len(records) == 3


async def test_racing_batches_do_not_mix(tape: Tape) -> None:
    async def commit(number: int) -> None:
        batch = [(subjects.MODEL_DELTA, token(f"{number}.{index}")) for index in range(5)]
        await Chain(tape, CONVERSATION, 0, harmless).commit(batch)

    await asyncio.gather(*(commit(number) for number in range(10)))
    texts = [
        event.text for event in (r.event() for r in await tape.read(CONVERSATION)) if isinstance(event, events.Token)
    ]
    groups = [texts[start : start + 5] for start in range(0, 50, 5)]
    assert sorted(groups) == [[f"{number}.{index}" for index in range(5)] for number in range(10)]


# History


async def test_history_is_whole_over_many_pages_and_from_any_cursor(
    tape: Tape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "HISTORY_BATCH", 7)
    await fill(tape, 40)
    await fill(tape, 10, "another")
    records = await tape.read(CONVERSATION)
    assert_chained(records)
    assert len(records) == 40
    for cursor in (0, 1, 6, 7, 8, 39, 40, 1_000_000):
        assert [r.seq for r in await tape.read(CONVERSATION, cursor)] == [r.seq for r in records if r.seq > cursor]


async def test_a_page_with_a_reply_missing_is_read_again_from_there(
    tape: Tape, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(tape, 50)
    dropped: list[int] = []

    async def lossy(nc: Client, subject: str, take: Callable[[Msg], None]) -> Subscription:
        def taken(message: Msg) -> None:
            seq = int((message.headers or {}).get("Nats-Sequence", 0))
            if seq in (10, 11, 37) and seq not in dropped:
                dropped.append(seq)
            else:
                take(message)

        return await listen(nc, subject, taken)

    monkeypatch.setattr("tapeline.tape.listen", lossy)
    assert [r.seq for r in await tape.read(CONVERSATION)] == list(range(1, 51))
    assert set(dropped) == {10, 11, 37}


async def test_a_page_that_never_begins_is_an_error_and_not_asked_for_for_ever(
    tape: Tape, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(tape, 3)

    async def lossy(nc: Client, subject: str, take: Callable[[Msg], None]) -> Subscription:
        def taken(message: Msg) -> None:
            if (message.headers or {}).get("Nats-Sequence") != "1":
                take(message)

        return await listen(nc, subject, taken)

    monkeypatch.setattr("tapeline.tape.listen", lossy)
    monkeypatch.setattr(limits, "READ_PATIENCE_S", 0.2)
    async with asyncio.timeout(20):
        with pytest.raises(Unavailable, match="first reply"):
            await tape.read(CONVERSATION)


# Following


async def test_following_joins_history_and_live_copies_without_gap_or_double(tape: Tape) -> None:
    chain = await fill(tape, 100)
    async with aclosing(follow(tape, CONVERSATION)) as pages:
        reading = asyncio.create_task(until(pages, 300))
        for number in range(200):
            await chain.append(subjects.MODEL_DELTA, token(f"live {number}"))
        records = await reading
    assert [r.seq for r in records] == list(range(1, 301))


@asynccontextmanager
async def mistreated(tape: Tape, seed: int, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """Live copies are dropped, doubled and reordered on their way to the follower."""
    chance = random.Random(seed)
    real = tape.live

    @asynccontextmanager
    async def unfair(
        conversation: str, take: Callable[[Record], None], doubt: Callable[[], None]
    ) -> AsyncIterator[None]:
        held: list[Record] = []

        def taken(record: Record) -> None:
            held.extend([record] * chance.choice((0, 1, 1, 2)))
            if chance.random() < 0.5:
                chance.shuffle(held)
                for one in held:
                    take(one)
                held.clear()

        async with real(conversation, taken, doubt):
            yield

    monkeypatch.setattr(tape, "live", unfair)
    yield
    monkeypatch.undo()


@pytest.mark.parametrize("seed", range(5))
async def test_dropped_doubled_and_reordered_live_copies_are_not_noticed(
    tape: Tape, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(limits, "RECONCILE_S", 0.2)
    async with mistreated(tape, seed, monkeypatch):
        monkeypatch.setattr(limits, "RECONCILE_S", 0.2)
        async with aclosing(follow(tape, CONVERSATION)) as pages:
            reading = asyncio.create_task(until(pages, 200))
            await fill(tape, 200)
            records = await reading
    assert [r.seq for r in records] == list(range(1, 201)), f"seed {seed}"
    assert_chained(records)


class Kept(dict[str, str]):
    """A record's headers, of which one can see whether they are still there."""


async def test_a_follower_that_does_not_read_keeps_a_bounded_number_and_misses_nothing(
    tape: Tape, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = limits.FOLLOW_PENDING_MAX + 500
    real, came = tape.live, 0
    kept: set[int] = set()

    def counted(conversation: str, take: Callable[[Record], None], doubt: Callable[[], None]) -> Any:
        def taken(record: Record) -> None:
            nonlocal came
            came += 1
            headers = Kept(record.headers)
            kept.add(record.seq)
            weakref.finalize(headers, kept.discard, record.seq)
            take(record._replace(headers=headers))

        return real(conversation, taken, doubt)

    monkeypatch.setattr(tape, "live", counted)
    async with aclosing(follow(tape, CONVERSATION)) as pages:
        assert await anext(pages) == []
        await fill(tape, count)
        async with asyncio.timeout(20):
            while came < count:
                await asyncio.sleep(0.01)
        assert kept == set(range(count - limits.FOLLOW_PENDING_MAX + 1, count + 1))
        records = await until(pages, count)
    assert [r.seq for r in records] == list(range(1, count + 1))


async def test_an_event_that_names_no_predecessor_is_read_from_history(tape: Tape) -> None:
    async with aclosing(follow(tape, CONVERSATION)) as pages:
        assert await anext(pages) == []
        await tape.nc.request(tape.subject(CONVERSATION, subjects.INPUT), b'{"type":"foreign"}')
        await fill(tape, 1, after=1)
        records = await until(pages, 2)
    assert [r.seq for r in records] == [1, 2]
    assert records[0].prev is None


async def test_nats_killed_and_back_loses_nothing_acknowledged_and_followers_go_on(tmp_path: Path) -> None:
    server = EmbeddedNats(tmp_path / "nats")
    server.start()
    starting: asyncio.Task[None] | None = None
    nc = await connect(server.url, "provision")
    await provision.apply(nc, Deployment())
    await nc.close()
    tape = await Tape.open(server.url, "test")
    try:
        async with aclosing(follow(tape, CONVERSATION)) as pages:
            reading = asyncio.create_task(until(pages, 300))
            chain = Chain(tape, CONVERSATION, 0)
            acknowledged = []
            for number in range(300):
                if number in (100, 200):
                    await asyncio.to_thread(server.kill)
                    starting = asyncio.create_task(asyncio.to_thread(server.start))
                acknowledged.append(await chain.append(subjects.MODEL_DELTA, token(f"t{number}")))
            assert starting is not None
            await starting
            records = await reading
        assert [r.seq for r in records] == acknowledged == list(range(1, 301))
    finally:
        await tape.close()
        server.stop()


# Timers


async def test_an_alarm_fires_once_and_a_later_one_replaces_it(tape: Tape) -> None:
    shard = tape.shard(CONVERSATION)
    now = int(time.time() * 1000)
    await tape.set_alarm(CONVERSATION, "cancelled", now + 300)
    await tape.cancel_alarm(CONVERSATION, "cancelled")
    await tape.set_alarm(CONVERSATION, "r", now + 60_000)
    await tape.set_alarm(CONVERSATION, "r", now + 400)

    async def stored() -> list[str]:
        info = await tape.nc.request(f"$JS.API.STREAM.INFO.{subjects.WAKES}", b'{"subjects_filter":"wake.>"}')
        return sorted(json.loads(info.data)["state"].get("subjects", {}))

    async with asyncio.timeout(10):
        while subjects.due(shard, CONVERSATION) not in await stored():
            await asyncio.sleep(0.02)
    assert await stored() == [subjects.due(shard, CONVERSATION)]


# Provisioning


async def test_provision_is_idempotent_and_keeps_what_an_operator_set(tape: Tape) -> None:
    assert await provision.apply(tape.nc, tape.deployment) == []
    info = await tape.nc.request("$JS.API.STREAM.INFO.TAPE_0", b"")
    config = json.loads(info.data)["config"] | {"max_bytes": 10**10}
    await tape.nc.request("$JS.API.STREAM.UPDATE.TAPE_0", json.dumps(config).encode())
    assert await provision.apply(tape.nc, tape.deployment) == []
    info = await tape.nc.request("$JS.API.STREAM.INFO.TAPE_0", b"")
    assert json.loads(info.data)["config"]["max_bytes"] == 10**10


async def test_a_deployment_whose_timers_were_among_the_events_is_upgraded(
    nats_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    nc = await connect(nats_url, "provision")
    deployment = Deployment(shards=1)
    (tape_0, *_), (woken, *_) = provision.streams(deployment), provision.consumers(deployment)
    before = tape_0 | {"subjects": ["tape.0.>", "wake.0.>"], "allow_msg_schedules": True}
    await api(nc, "STREAM.CREATE.TAPE_0", before)
    filters = {"filter_subjects": [*woken.config["filter_subjects"], "wake.0.due.>"]}
    await api(nc, "CONSUMER.CREATE.TAPE_0.inference", {"stream_name": "TAPE_0", "config": woken.config | filters})
    tape = await Tape.open(nats_url, "test")
    try:
        await fill(tape, 3)
        changes = await provision.apply(nc, deployment)
        assert "updated stream TAPE_0" in changes
        assert "updated consumer inference of TAPE_0" in changes
        assert "TAPE_0 still allows schedules" in caplog.text
        assert await provision.drift(nc, deployment) == []
        assert len(await tape.read(CONVERSATION)) == 3
        await tape.set_alarm(CONVERSATION, "r", int(time.time() * 1000) + 200)
        async with asyncio.timeout(10):
            while not await tape.stored(subjects.WAKES, subjects.due(0, CONVERSATION)):
                await asyncio.sleep(0.02)
    finally:
        await tape.close()
        await nc.close()


async def test_drift_is_named_refused_and_mended(tape: Tape) -> None:
    await tape.nc.request("$JS.API.CONSUMER.DELETE.TAPE_1.inference", b"")
    await tape.nc.request("$JS.API.STREAM.DELETE.DEAD", b"")
    lines = await provision.drift(tape.nc, tape.deployment)
    assert lines == ["stream DEAD is missing", "consumer inference of TAPE_1 is missing"]
    with pytest.raises(Refused, match=r"services\.provision"):
        await provision.verify(tape)
    assert await provision.apply(tape.nc, tape.deployment) == [
        "created stream DEAD",
        "created consumer inference of TAPE_1",
    ]
    await provision.verify(tape)


async def test_the_number_of_shards_can_never_change(tape: Tape) -> None:
    with pytest.raises(Refused, match="never change"):
        await provision.apply(tape.nc, Deployment(shards=8))


async def test_a_server_that_is_not_there_or_not_provisioned_is_one_clear_error(nats_url: str) -> None:
    with pytest.raises(Refused, match=r"services\.provision"):
        await Tape.open(nats_url, "test")
    with pytest.raises(Unavailable, match=r"cannot reach NATS at nats://127\.0\.0\.1:1, nats://localhost:2:") as error:
        await Tape.open("nats://user:secret@127.0.0.1:1, nats://other:secret@localhost:2", "test")
    assert "secret" not in str(error.value)


async def test_of_several_servers_one_that_is_there_is_enough(tape: Tape, nats_url: str) -> None:
    other = await Tape.open(f"nats://127.0.0.1:1,{nats_url}", "test")
    assert other.deployment == tape.deployment
    await other.close()


# The connection


@given(st.dictionaries(st.from_regex(r"[A-Za-z][A-Za-z0-9-]{0,20}", fullmatch=True), st.text("abz:é \U0001f600,=\t09")))
def test_headers_are_read_as_nats_py_reads_them(headers: dict[str, str]) -> None:
    raw = "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode() + b"\r\n"
    assert Connection._parse_header_lines(raw) == Client._parse_header_lines(raw)
