"""Promise 2, one order: whatever happens to a reader's connections, what it has received is the log, byte for
byte, none missing and none twice, through whichever edge.
"""

import json
import re
import socket
import time
from collections.abc import Iterator
from typing import Final

import httpx
import pytest
from tapeline import limits

from tests.client import FLOOD_EVENTS, SSE, Client, Received, as_received, at_once, flood, log_of, stored, types
from tests.stack import Stack

QUESTION: Final = "long 60"
EVENTS_MIN: Final = 60
EVENTS_MAX: Final = 128  # more than an answer to the question can have
READERS: Final = 16  # at once
BYTES_STRIDE: Final = 53  # a frame has some 130 bytes, so each is cut several times, at ever other places
WAYS: Final = ((0, 1), (1, 0))


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The whole of Tapeline, with heartbeats to wait for."""
    stack = Stack(tmp_path_factory.mktemp("stack"), {"TAPELINE_HEARTBEAT_S": "1"})
    try:
        yield stack.start()
    finally:
        stack.stop()


async def cut_after(
    count: int, conversation: str, run: str, first: Client, second: Client
) -> tuple[int, list[Received], float]:
    """What a reader has that was cut off after `count` events and resumed; and when it resumed."""
    async with first.events(conversation, run=run) as stream:
        before = (await stream.take(count))[:]
    resumed_at = time.time()
    return count, before + await second.run(conversation, run, before[-1].id), resumed_at


# Cut anywhere


@pytest.mark.parametrize("way", WAYS)
async def test_cut_after_every_event_of_an_ended_run(
    way: tuple[int, int], stack: Stack, clients: tuple[Client, Client]
) -> None:
    first, second = (clients[edge] for edge in way)
    conversation, run = await first.answered(QUESTION)
    log = as_received(await log_of(stack.nats.url, conversation), run)
    assert len(log) >= EVENTS_MIN

    readings = await at_once(
        READERS, (cut_after(count, conversation, run, first, second) for count in range(1, len(log) + 1))
    )

    for count, received, _ in readings:
        assert received == log, f"cut after {count} events"


@pytest.mark.parametrize("way", WAYS)
async def test_cut_after_every_event_while_the_run_is_live(
    way: tuple[int, int], stack: Stack, clients: tuple[Client, Client]
) -> None:
    first, second = (clients[edge] for edge in way)
    groups = EVENTS_MAX // READERS
    cuts, live = set(), 0
    for group in range(groups):
        conversation, run = await first.ask(QUESTION)
        counts = range(group + 1, EVENTS_MAX + 1, groups)
        readings = await at_once(READERS, (cut_after(count, conversation, run, first, second) for count in counts))

        log = as_received(await log_of(stack.nats.url, conversation), run)
        ended_at = json.loads(log[-1].data)["ts"] / 1000
        assert EVENTS_MIN <= len(log) <= EVENTS_MAX
        for count, received, resumed_at in readings:
            assert received == log, f"cut after {count} of {len(log)} events"
            cuts.add(min(count, len(log)))
            live += resumed_at < ended_at
    assert cuts >= set(range(1, EVENTS_MIN))
    assert live >= EVENTS_MIN // 2, "too few readers were back before the run ended for this to be a test"


async def test_cut_at_every_nth_byte(stack: Stack, clients: tuple[Client, Client]) -> None:
    first, second = clients
    conversation, run = await first.answered(QUESTION)
    log = as_received(await log_of(stack.nats.url, conversation), run)
    async with first.events(conversation, run=run) as whole:
        assert await whole.rest() == log
    inside = 0

    async def cut_at(count: int) -> tuple[int, list[Received]]:
        nonlocal inside
        async with first.events(conversation, run=run) as stream:
            before = await stream.take_bytes(count)
            assert stream.bytes_read == count
            inside += stream.parser.is_inside
        return count, before + await second.run(conversation, run, before[-1].id if before else None)

    readings = await at_once(READERS, (cut_at(count) for count in range(1, whole.bytes_read, BYTES_STRIDE)))

    for count, received in readings:
        assert received == log, f"cut at byte {count}"
    assert inside > len(log), "too few cuts were inside a frame for this to be a test"


async def test_cut_again_and_again_on_alternating_edges(stack: Stack, clients: tuple[Client, Client]) -> None:
    conversation, run = await clients[0].ask(QUESTION)
    received: list[Received] = []
    connections = 0
    while not received or received[-1].event != "done":
        cursor = received[-1].id if received else None
        async with clients[connections % 2].events(conversation, cursor, run=run) as stream:
            received += (await stream.take(3))[:]
        connections += 1
    assert received == as_received(await log_of(stack.nats.url, conversation), run)
    assert connections > EVENTS_MIN // 3


# Cursors


async def test_after_means_the_same_as_last_event_id(stack: Stack, client: Client) -> None:
    conversation, run = await client.answered(QUESTION)
    log = as_received(await log_of(stack.nats.url, conversation), run)
    for index in (0, 1, len(log) // 2, len(log) - 2):
        cursor = log[index].id
        async with client.events(conversation, run=run, after=cursor) as by_query:
            assert await by_query.rest() == log[index + 1 :]
        assert await client.run(conversation, run, cursor) == log[index + 1 :]


async def test_last_event_id_wins_over_after(client: Client) -> None:
    """A browser's EventSource reconnects to the URL it was given, `?after=` and all."""
    conversation, run = await client.answered(QUESTION)
    whole = await client.run(conversation, run)
    async with client.events(conversation, whole[40].id, run=run, after=whole[3].id) as stream:
        assert await stream.rest() == whole[41:]


async def test_a_cursor_between_two_events_of_the_conversation_means_the_next_one(client: Client) -> None:
    """Sequences are the stream's, so other conversations' events lie between; a cursor may be any of them."""
    (one, run), _ = await at_once(2, [client.answered(QUESTION), client.answered(QUESTION)])
    whole = await client.run(one, run)
    for cursor in range(whole[0].id, whole[-1].id):
        assert await client.run(one, run, cursor) == [event for event in whole if event.id > cursor]


# The end


async def test_a_run_ends_after_its_terminal_event_and_a_reconnect_gets_204(clients: tuple[Client, Client]) -> None:
    conversation, run = await clients[0].ask(QUESTION)
    received = await clients[0].run(conversation, run)
    assert types(received).count("done") == 1
    assert received[-1].event == "done"
    for client in clients:
        response = await client.get_events(conversation, str(received[-1].id), run=run)
        assert (response.status_code, response.content) == (204, b"")


async def test_a_run_that_is_over_stays_over_when_the_conversation_goes_on(client: Client) -> None:
    conversation, first = await client.answered(QUESTION)
    received = await client.run(conversation, first)
    second = (await client.post(conversation, QUESTION)).run
    later = await client.run(conversation, second)
    assert (await client.get_events(conversation, str(later[-1].id), run=first)).status_code == 204
    assert await client.run(conversation, first) == received
    assert {json.loads(one.data)["run"] for one in later} == {second}


async def test_past_the_end_without_a_run_the_stream_stays_open_for_what_comes(client: Client) -> None:
    conversation, run = await client.answered(QUESTION)
    last = (await client.snapshot(conversation))["last_event_id"]
    async with client.events(conversation, last) as stream:
        await stream.heartbeats(2)
        assert stream.received == []
        posted = await client.post(conversation, QUESTION)
        received = await stream.until("done")
    assert received == await client.run(conversation, posted.run)
    assert run != posted.run


# The same bytes for everyone


async def test_the_post_streams_what_the_get_does(stack: Stack, client: Client) -> None:
    conversation = await client.create()
    path, key = f"/v1/conversations/{conversation}/messages", {"Idempotency-Key": "one"}
    body = {"content": QUESTION}
    async with client.stream("POST", path, json=body, headers={**SSE, **key}) as stream:
        posted = await stream.rest()
    records = await log_of(stack.nats.url, conversation)
    run = json.loads(posted[0].data)["run"]
    assert posted == as_received(records, run) == await client.run(conversation, run)
    async with client.stream("POST", path, json=body, headers={**SSE, **key}) as again:
        assert await again.rest() == posted


async def test_the_compact_view_is_the_facts(stack: Stack, clients: tuple[Client, Client]) -> None:
    conversation, run = await clients[0].ask(QUESTION)
    async with clients[1].events(conversation, run=run, view="compact") as live:
        received = await live.rest()
    facts = [record for record in await log_of(stack.nats.url, conversation) if record.is_fact]
    assert received == as_received(facts, run)
    assert types(received) == ["message", "step", "answer", "done"]
    for index, one in enumerate(received[:-1]):
        async with clients[0].events(conversation, one.id, run=run, view="compact") as resumed:
            assert await resumed.rest() == received[index + 1 :]


async def test_two_readers_on_two_edges_see_the_same_bytes(stack: Stack, clients: tuple[Client, Client]) -> None:
    conversation = await clients[0].create()

    async def read(client: Client) -> list[Received]:
        async with client.events(conversation) as stream:
            return (await stream.until("done"))[:]

    async def ask() -> list[Received]:
        await clients[0].post(conversation, QUESTION)
        return []

    one, other, _ = await at_once(3, [read(clients[0]), read(clients[1]), ask()])
    assert one == other == as_received(await log_of(stack.nats.url, conversation))


async def test_the_lines_are_the_log(stack: Stack, client: Client) -> None:
    conversation, run = await client.answered(QUESTION)
    records = await log_of(stack.nats.url, conversation)
    lines = [json.loads(line) for line in await client.lines(conversation)]
    assert lines == [{"id": record.seq, "prev": record.prev, **json.loads(record.data)} for record in records]
    half = records[len(records) // 2].seq
    assert [json.loads(line)["id"] for line in await client.lines(conversation, after=half, run=run)] == [
        record.seq for record in records if record.seq > half
    ]


# Slow readers


async def test_a_reader_of_many_events_that_reads_nothing_for_a_while_catches_up_whole(fresh_stack: Stack) -> None:
    fresh_stack.env["TAPELINE_DEMO_DELAY_MS"] = "0"
    fresh_stack.start()
    async with Client(fresh_stack.url) as client:
        conversation = await client.create()
        async with client.events(conversation) as slow:
            await slow.take(1)
            passed = 0
            while passed <= limits.RING_FRAMES_MAX:
                posted = await client.post(conversation, "long 3000")
                passed += len(await client.run(conversation, posted.run))
            received = await slow.take(1 + passed)
        assert received == as_received(await log_of(fresh_stack.nats.url, conversation))


async def test_a_reader_that_leaves_the_ring_catches_up_from_the_log(stack: Stack, client: Client) -> None:
    """More bytes than the kernel holds between the two, so that the edge itself must cope with them."""
    small = httpx.AsyncHTTPTransport(socket_options=[(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)])
    conversation = await client.create()
    async with Client(stack.url, transport=small) as slow, slow.events(conversation) as stream:
        await stream.take(1)
        last = await flood(stack.nats.url, conversation)
        async with client.events(conversation, last - 1) as quick:  # the feed has everything now
            await quick.take(1)
        before = await catch_up_reads(client)
        received = await stream.take(1 + FLOOD_EVENTS)
        assert await catch_up_reads(client) > before, "it never left the ring, so this was no test"
    assert received == as_received(await stored(stack.nats.url, conversation))


async def catch_up_reads(client: Client) -> float:
    """How often a reader of this edge has had to read the log."""
    exposition = (await client.http.get("/metrics")).text
    match = re.search(r"^tapeline_feed_catch_up_reads_total\{.*\} (\S+)$", exposition, re.MULTILINE)
    assert match, exposition
    return float(match[1])
