"""Connections that are slow, half there, or gone without a word: each costs a bounded buffer, and others nothing."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

import pytest

from tests.client import Client, at_once, flood, log_of
from tests.hardening.attacker import Wire, answers, get, post, statuses, wire
from tests.hardening.vitals import GROWTH_BYTES_MAX, Vitals, open_streams, streams_are
from tests.stack import Stack

HI: Final = b'{"content": "long 3"}'
SLOW: Final = 50  # attackers at once
DRIP_S: Final = 0.005  # between two bytes; an attacker who has time waits longer
USERS: Final = 20  # well-behaved ones
SERVED_S: Final = 15.0  # for a run of each of them beside the attackers, and
SERVED_TIMES: Final = 5  # times as long as it took without
STINGY_BYTES: Final = 2_048  # of a receive buffer: what a kernel gives at least


@asynccontextmanager
async def many(stack: Stack, count: int = SLOW, receive_bytes: int | None = None) -> AsyncIterator[list[Wire]]:
    """So many attackers' connections."""
    async with AsyncExitStack() as open_:
        yield [await open_.enter_async_context(wire(stack.url, receive_bytes=receive_bytes)) for _ in range(count)]


Served = Callable[[], Awaitable[None]]


@pytest.fixture
async def all_are_served(client: Client) -> Served:
    """Sees that users are answered beside whatever else there is, about as they were before."""
    alone_s = await served_s(client)

    async def beside() -> None:
        took_s = await served_s(client)
        print(f"{USERS} users were served in {took_s:.1f} s beside them, in {alone_s:.1f} s without")
        assert took_s < SERVED_S + SERVED_TIMES * alone_s

    return beside


async def served_s(client: Client) -> float:
    began = time.monotonic()

    async def asked() -> None:
        conversation, run = await client.ask("long 3")
        assert (await client.run(conversation, run))[-1].event == "done"

    await at_once(10, (asked() for _ in range(USERS)))
    return time.monotonic() - began


async def drip(attackers: list[Wire], data: bytes) -> None:
    """Each sends a byte, then each the next, for as long as the edge lets them."""
    for byte in data:
        for attacker in attackers:
            await attacker.send(bytes([byte]))
        await asyncio.sleep(DRIP_S)


async def test_heads_a_byte_at_a_time(stack: Stack, client: Client, all_are_served: Served) -> None:
    """Would hold a place each, for a request that never comes: there would be none left for users."""
    async with many(stack) as attackers:
        dripping = asyncio.create_task(drip(attackers, get("/healthz", "X: " + "x" * 1_000_000)))
        await all_are_served()
        dripping.cancel()
    async with wire(stack.url) as slow:  # one who is merely slow is served
        await drip([slow], get("/healthz", "Connection: close"))
        assert [answer.status for answer in answers(await slow.rest())] == [200]


async def test_bodies_a_byte_at_a_time(stack: Stack, client: Client, all_are_served: Served) -> None:
    """Would hold a handler each."""
    conversation = await client.create()
    path = f"/v1/conversations/{conversation}/messages"
    head = post(path, b" " * 900_000, "Connection: close").rstrip(b" ")
    async with many(stack) as attackers:
        for attacker in attackers:
            await attacker.send(head)
        dripping = asyncio.create_task(drip(attackers, b" " * 900_000))
        await all_are_served()
        dripping.cancel()
    async with wire(stack.url) as slow:
        await drip([slow], post(path, HI, "Connection: close"))
        [answer] = answers(await slow.rest())
        assert answer.status == 202
    await client.run(conversation, json.loads(answer.body)["run"])
    assert len((await client.snapshot(conversation))["runs"]) == 1
    await log_of(stack.nats.url, conversation)


async def test_connections_that_say_nothing(stack: Stack, client: Client, all_are_served: Served) -> None:
    """Would each hold a file of the edge's, of which there is an end."""
    async with many(stack, 500):
        await all_are_served()


async def test_readers_that_take_a_byte_now_and_then_or_none(
    stack: Stack, client: Client, all_are_served: Served
) -> None:
    """Would make the edge keep for each what it has not taken, or keep the others waiting for it."""
    edge = stack.edges[0]
    assert edge is not None
    before = Vitals.of(edge)
    conversation = await client.create()
    last = await flood(stack.nats.url, conversation)
    request = get(f"/v1/conversations/{conversation}/events")
    async with many(stack, receive_bytes=STINGY_BYTES) as attackers:
        for attacker in attackers:
            await attacker.send(request)
            assert await attacker.until(b"\r\n\r\n")
        await all_are_served()
        for attacker in attackers[::2]:  # the others take nothing
            assert await attacker.reader.readexactly(1)
        assert await open_streams(client) == SLOW, "slow is no reason to end a stream"
        growth = Vitals.of(edge).rss_bytes - before.rss_bytes
        print(f"{growth / SLOW / 1e6:.2f} MB for each reader")
        async with client.events(conversation, cursor=last - 3) as beside:
            assert [one.id for one in await beside.take(3)] == [last - 2, last - 1, last]
    await streams_are(client, 0)
    assert growth < GROWTH_BYTES_MAX


async def test_readers_that_vanish(stack: Stack, client: Client) -> None:
    """Would be followed, and written to, for ever: a phone in a tunnel says no goodbye."""
    conversation = await client.create()
    run = (await client.post(conversation, "long 2000")).run
    async with many(stack) as attackers:
        for attacker in attackers:
            await attacker.send(get(f"/v1/conversations/{conversation}/events"))
        for attacker in attackers:
            await attacker.until(b"event: message\n")
        assert await open_streams(client) == SLOW
        for attacker in attackers:
            attacker.reset()
        await streams_are(client, 0)
    assert (await client.stop(conversation, run)).status_code == 202
    assert (await client.run(conversation, run))[-1].event == "done"
    await log_of(stack.nats.url, conversation)


async def test_senders_that_vanish_in_mid_message(stack: Stack, client: Client) -> None:
    """Would leave half a message, or a handler that waits for the rest."""
    conversation = await client.create()
    request = post(f"/v1/conversations/{conversation}/messages", HI)
    for length in range(1, len(request), 7):
        async with wire(stack.url) as attacker:
            await attacker.send(request[:length])
            attacker.reset()
    assert len(await log_of(stack.nats.url, conversation)) == 1


async def test_senders_that_vanish_before_the_answer(stack: Stack, client: Client) -> None:
    """Would leave it open whether the message was taken: with a key the next attempt finds out."""
    conversation = await client.create()
    path = f"/v1/conversations/{conversation}/messages"
    for number in range(10):
        async with wire(stack.url) as attacker:
            await attacker.send(post(path, HI, f"Idempotency-Key: {number}"))
            attacker.reset()
        posted = await client.post(conversation, json.loads(HI)["content"], str(number), on_busy="queue")
        assert (await client.run(conversation, posted.run))[-1].event == "done"
    assert len((await client.snapshot(conversation))["runs"]) == 10
    await log_of(stack.nats.url, conversation)


async def test_a_reader_that_closes_its_sending_half_has_left(stack: Stack, client: Client) -> None:
    """Would be kept for ever where it is gone: whether one who sends no more still reads, nobody can tell. As most
    servers do, the edge takes it for a goodbye, and hangs up at once; what was sent whole before counts.
    """
    conversation = await client.create()
    async with wire(stack.url) as attacker:
        await attacker.send(get(f"/v1/conversations/{conversation}/events"))
        await attacker.until(b"event: conversation\n")
        attacker.half_close()
        assert await attacker.closed()
    await streams_are(client, 0)
    for number in range(10):
        async with wire(stack.url) as attacker:
            path = f"/v1/conversations/{conversation}/messages"
            await attacker.send(post(path, HI, f"Idempotency-Key: {number}"))
            attacker.half_close()
            assert await attacker.closed()
        posted = await client.post(conversation, json.loads(HI)["content"], str(number), on_busy="queue")
        await client.run(conversation, posted.run)
    assert len((await client.snapshot(conversation))["runs"]) == 10
    await log_of(stack.nats.url, conversation)


async def test_a_half_open_connection_is_not_reused(stack: Stack) -> None:
    """Would answer the next request of another: what came before the end of a connection ends with it."""
    async with wire(stack.url) as attacker:
        await attacker.send(get() + b"GET /heal")
        assert (await attacker.until(b"}")).startswith(b"HTTP/1.1 200 ")
        attacker.half_close()
        assert await attacker.closed()
    assert await statuses(stack.url, get("/healthz", "Connection: close")) == [200]
