"""What a user may have, over all edges, and what a request may be: the limits hold exactly, say what they are, and give
back what is no longer used, however it ended.
"""

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final

import httpx
import pytest
from tapeline import counter, limits, subjects
from tapeline.clock import now_ms
from tapeline.connection import Unavailable
from tapeline.tape import Tape

from services.edge.lease import Leases
from services.edge.problem import Problem
from tests.client import SSE, Client, Stream, at_once, opened, problem, stored, types
from tests.crowd import kib
from tests.stack import Stack

USERS: Final = tuple(f"user-{number}" for number in range(40))
STREAMS: Final = 5
MESSAGES: Final = 3
TOKENS: Final = 2_000
FREED_S: Final = 2 / 3 * limits.LEASE_TTL_S  # before they would be free without anybody doing anything
AWAY_HEARTBEATS: Final = 6  # twice as many seconds as that edge's patience with a read, and what comes before it
SENDERS: Final = 200
RSS_MIB_MAX: Final = 100
"""By which the memory of an edge may grow under 200 senders: 32 kB and one read of 256 kB each, and room."""


def key(user: str) -> str:
    return f"key-of-{user}"


ENV: Final = {
    "TAPELINE_API_KEYS": ",".join(f"{user}={key(user)}" for user in USERS),
    "TAPELINE_STREAMS_PER_USER": str(STREAMS),
    "TAPELINE_MESSAGES_PER_MINUTE": str(MESSAGES),
    "TAPELINE_TOKENS_PER_MINUTE": str(TOKENS),
}


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Two edges with low limits."""
    stack = Stack(tmp_path_factory.mktemp("limited"), ENV)
    try:
        stack.start().add_edge()
        yield stack
    finally:
        stack.stop()


_unused = iter(USERS)


@pytest.fixture
def user() -> str:
    """Somebody who has used nothing yet."""
    return next(_unused)


@pytest.fixture
def another() -> str:
    """Somebody else."""
    return next(_unused)


@pytest.fixture
async def tape(limited: Stack) -> AsyncIterator[Tape]:
    tape = await opened(limited.nats.url)
    yield tape
    await tape.close()


async def leased(tape: Tape, user: str) -> int:
    """How many streams NATS has the user down for."""
    leases = await tape.newest(subjects.LEASES, subjects.lease(user))
    return sum(int(one.data.removeprefix(b'{"streams":').removesuffix(b"}")) for one in leases)


async def until_leased(tape: Tape, user: str, count: int, timeout_s: float = FREED_S) -> None:
    async with asyncio.timeout(timeout_s):
        while await leased(tape, user) != count:
            await asyncio.sleep(0.01)


async def until_enough_of_a_minute_is_left(least_s: float = 10.0) -> None:
    """Returns when the minute goes on for as long as a test takes."""
    if (rest_s := 60 - time.time() % 60) < least_s:
        await asyncio.sleep(rest_s + 0.01)


def too_many(response: httpx.Response, what: str, limit: int) -> int:
    """The seconds to wait that a refusal names."""
    assert problem(response, 429, f"too_many_{what}")["limit"] == limit
    return int(response.headers["retry-after"])


# Streams


async def test_of_50_that_race_on_two_edges_exactly_as_many_as_may_are_let_in(
    limited: Stack, tape: Tape, user: str, another: str
) -> None:
    async with Client(limited.edge_url(0), key(user)) as one, Client(limited.edge_url(1), key(user)) as other:
        conversation = await one.create()
        path = f"/v1/conversations/{conversation}/events"
        for again in range(3):
            async with contextlib.AsyncExitStack() as closing:

                async def opens(client: Client, closing: contextlib.AsyncExitStack) -> httpx.Response:
                    return await closing.enter_async_context(client.http.stream("GET", path, headers=SSE))

                responses = await at_once(50, [opens((one, other)[number % 2], closing) for number in range(50)])
                taken = [response for response in responses if response.status_code == 200]
                assert len(taken) == STREAMS, f"in round {again}"
                for response in responses:
                    if response.status_code != 200:
                        await response.aread()
                        assert too_many(response, "streams", STREAMS) == limits.STREAMS_RETRY_S
                await until_leased(tape, user, STREAMS)
                async with Client(limited.url, key(another)) as stranger:  # nobody else is refused
                    others = await stranger.create()
                    async with stranger.events(others) as stream:
                        await stream.take(1)
            await until_leased(tape, user, 0)


async def fill(closing: contextlib.AsyncExitStack, client: Client, conversation: str, count: int) -> list[Stream]:
    """So many streams, open until `closing` does."""
    streams = [await closing.enter_async_context(client.events(conversation)) for _ in range(count)]
    for stream in streams:
        await stream.take(1)
    return streams


@pytest.mark.parametrize("how", ["left", "GET", "POST", "NDJSON", "204", "deleted", "404"])
async def test_a_stream_that_ends_frees_its_place_however_it_ends(
    how: str, limited: Stack, tape: Tape, user: str
) -> None:
    async with contextlib.AsyncExitStack() as closing:
        client = await closing.enter_async_context(Client(limited.url, key(user)))
        other = await closing.enter_async_context(Client(limited.edge_url(1), key(user)))
        conversation, run = await client.answered("hi")
        await until_leased(tape, user, 0)
        await fill(closing, other, conversation, STREAMS - 1)
        path = f"/v1/conversations/{conversation}"
        last = (await client.snapshot(conversation))["last_event_id"]
        for _ in range(2 if how == "POST" else 5):
            match how:
                case "left":
                    async with client.events(conversation) as stream:
                        await stream.take(1)
                        assert await leased(tape, user) == STREAMS
                        too_many(await other.get_events(conversation), "streams", STREAMS)
                case "GET":
                    assert types(await client.run(conversation, run))[-1] == "done"
                case "POST":
                    async with client.stream("POST", f"{path}/messages", json={"content": "hi"}, headers=SSE) as stream:
                        assert types(await stream.rest())[-1] == "done"
                case "NDJSON":
                    assert await client.lines(conversation)
                case "204":
                    assert (await client.get_events(conversation, str(last), run=run)).status_code == 204
                case "404":
                    request = client.http.post(f"{path}x/messages", json={"content": "hi"}, headers=SSE)
                    problem(await request, 404, "not_found")
                case "deleted":
                    mine = await client.create()
                    async with client.events(mine) as stream:
                        await stream.take(1)
                        await client.http.delete(f"/v1/conversations/{mine}")
                        assert types(await stream.rest())[-1] == "deleted"
            await until_leased(tape, user, STREAMS - 1)


async def test_a_reader_that_leaves_with_a_request_waiting_behind_frees_its_place(
    limited: Stack, tape: Tape, user: str
) -> None:
    async with Client(limited.url, key(user)) as client:
        conversation = await client.create()
    path = f"/v1/conversations/{conversation}/events"
    request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key(user)}\r\n\r\n".encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", limited.ports[0])
    writer.write(request * 2)
    await reader.readuntil(b"event: conversation")
    await until_leased(tape, user, 1)
    writer.transport.abort()
    await until_leased(tape, user, 0)


async def test_a_post_that_may_not_stream_puts_nothing_on_the_tape(limited: Stack, user: str) -> None:
    async with contextlib.AsyncExitStack() as closing:
        client = await closing.enter_async_context(Client(limited.url, key(user)))
        conversation = await client.create()
        await fill(closing, client, conversation, STREAMS)
        path = f"/v1/conversations/{conversation}/messages"
        too_many(await client.http.post(path, json={"content": "hi"}, headers=SSE), "streams", STREAMS)
        assert (await client.snapshot(conversation))["messages"] == []


async def test_a_drained_edge_gives_back_and_a_killed_ones_streams_expire(tmp_path: Path) -> None:
    stack = Stack(tmp_path, ENV)
    try:
        for _ in range(3):
            stack.add_edge()
        tape = await opened(stack.nats.url)
        async with contextlib.AsyncExitStack() as closing:
            clients = [
                await closing.enter_async_context(Client(stack.edge_url(one), key(USERS[0]))) for one in range(3)
            ]
            conversation = await clients[0].create()
            drained = await fill(closing, clients[0], conversation, 2)
            await fill(closing, clients[1], conversation, 2)
            kept = await fill(closing, clients[2], conversation, 1)
            too_many(await clients[2].get_events(conversation), "streams", STREAMS)
            ending = asyncio.create_task(asyncio.to_thread(stack.kill_edge, 0, signal.SIGTERM))
            await asyncio.gather(*(stream.rest() for stream in drained))
            assert await ending == 0
            assert await leased(tape, USERS[0]) == 3
            await asyncio.to_thread(stack.kill_edge, 1)
            killed_at = time.monotonic()
            async with asyncio.timeout(limits.LEASE_TTL_S + 10):
                while (count := await leased(tape, USERS[0])) != 1:  # what is open stays on the books, being renewed
                    assert count == 3
                    await asyncio.sleep(0.1)
            print(f"the streams of a killed edge counted for {time.monotonic() - killed_at:.1f} s")
            await fill(closing, clients[2], conversation, STREAMS - 1)
            too_many(await clients[2].get_events(conversation), "streams", STREAMS)
            await kept[0].heartbeats(1)
        await tape.close()
    finally:
        stack.stop()


async def test_without_nats_open_streams_go_on_and_their_lease_is_renewed_after_it(tmp_path: Path) -> None:
    stack = Stack(tmp_path, ENV | {"TAPELINE_HEARTBEAT_S": "1"})
    try:
        stack.start_inference()
        stack.add_edge(module="tests.edge_with RECONCILE_FIRST_S=0.2 READ_PATIENCE_S=1 READ_TIMEOUT_S=1 AWAY_S=1")
        async with contextlib.AsyncExitStack() as closing:
            client = await closing.enter_async_context(Client(stack.url, key(USERS[0])))
            conversation = await client.create()
            streams = await fill(closing, client, conversation, STREAMS)
            stack.nats.kill()
            await streams[0].heartbeats(AWAY_HEARTBEATS)
            problem(await client.get_events(conversation), 503, "unavailable")
            stack.nats.start()
            tape = await opened(stack.nats.url)
            record = (await tape.newest(subjects.LEASES, subjects.lease(USERS[0])))[-1]
            async with asyncio.timeout(limits.LEASE_TTL_S):
                while (await tape.newest(subjects.LEASES, subjects.lease(USERS[0])))[-1].seq == record.seq:
                    await asyncio.sleep(0.1)
            assert await leased(tape, USERS[0]) == STREAMS
            too_many(await client.get_events(conversation), "streams", STREAMS)
            await tape.close()
            await client.post(conversation, "hi")
            for stream in streams:
                await stream.until("done")
    finally:
        stack.stop()


async def test_one_who_leaves_as_he_is_refused_gives_back_nothing(
    tape: Tape, user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases = Leases(tape, 1)
    release = await leases.take(user)
    (held,) = leases._users.values()
    real = held._answer

    def leaves(error: Problem | Unavailable | None = None) -> bool:
        answer = real(error)
        refused.cancel()
        return answer

    monkeypatch.setattr(held, "_answer", leaves)
    refused = asyncio.create_task(leases.take(user))
    await asyncio.wait([refused])
    assert refused.cancelled()
    monkeypatch.undo()
    with pytest.raises(Problem, match="streams open at a time"):
        await leases.take(user)
    await until_leased(tape, user, 1)
    release()
    await until_leased(tape, user, 0)


# Messages and tokens


async def test_messages_a_minute_over_two_edges_and_the_next_when_it_is_time(
    limited: Stack, user: str, another: str
) -> None:
    async with Client(limited.edge_url(0), key(user)) as one, Client(limited.edge_url(1), key(user)) as other:
        conversations = [await one.create() for _ in range(MESSAGES + 1)]
        await until_enough_of_a_minute_is_left()
        runs = [
            await client.post(where, "hi", key="same")
            for client, where in zip([one, other, one], conversations, strict=False)
        ]
        refused = await other.send(conversations[-1], "hi")
        wait_s = too_many(refused, "messages", MESSAGES)
        assert 1 <= wait_s <= 60
        assert len(await stored(limited.nats.url, conversations[-1])) == 1  # its `conversation`
        assert (await other.snapshot(conversations[-1]))["title"] == ""
        for client, where, run in zip([other, one, other], conversations, runs, strict=False):
            assert await client.post(where, "hi", key="same") == run  # neither counted nor refused
        async with Client(limited.url, key(another)) as stranger:
            await stranger.answered("hi")
        await asyncio.sleep(wait_s)
        await other.post(conversations[-1], "hi")


async def test_what_is_no_new_run_is_not_counted(limited: Stack, tape: Tape, user: str) -> None:
    async with Client(limited.url, key(user)) as client:
        await until_enough_of_a_minute_is_left()
        conversation = await client.create()
        before = await counter.used(tape, user, counter.MESSAGES, now_ms())
        posted = await client.post(conversation, "long 300", key="one")
        for _ in range(3):
            problem(await client.send(conversation, "again"), 409, "busy")
            assert await client.post(conversation, "long 300", key="one") == posted
            problem(await client.send(f"{conversation}x", "hi"), 404, "not_found")
        assert await counter.used(tape, user, counter.MESSAGES, now_ms()) == before + 1
        await client.stop(conversation, posted.run)


async def test_tokens_of_all_answers_together(limited: Stack, tape: Tape, user: str, another: str) -> None:
    async with Client(limited.edge_url(0), key(user)) as one, Client(limited.edge_url(1), key(user)) as other:
        await until_enough_of_a_minute_is_left(20)
        before = await counter.used(tape, user, counter.TOKENS, now_ms())
        conversation, run = await one.answered("hi")
        events = await one.run(conversation, run)
        usage = (await one.snapshot(conversation))["runs"][0]["usage"]
        tokens = usage["input_tokens"] + usage["output_tokens"]
        assert tokens > 0, types(events)
        async with asyncio.timeout(FREED_S):
            while (used := await counter.used(tape, user, counter.TOKENS, now_ms())) == before:
                await asyncio.sleep(0.01)
        assert used == before + tokens
        await counter.add(tape, user, counter.TOKENS, TOKENS - used - 1, now_ms())
        conversation, run = await other.ask("hi")  # one token is left, so it may begin
        assert types(await other.run(conversation, run))[-1] == "done"  # and is not cut
        async with asyncio.timeout(FREED_S):
            while await counter.used(tape, user, counter.TOKENS, now_ms()) < TOKENS:
                await asyncio.sleep(0.01)
        for client in (one, other):
            assert 1 <= too_many(await client.send(conversation, "hi"), "tokens", TOKENS) <= 60
        async with Client(limited.url, key(another)) as stranger:
            await stranger.answered("hi")


async def test_without_keys_there_are_no_limits(stack: Stack, client: Client) -> None:
    conversation = await client.create()
    async with contextlib.AsyncExitStack() as closing:
        await fill(closing, client, conversation, limits.STREAMS_PER_USER + 1)
    for _ in range(limits.MESSAGES_PER_MINUTE + 1):
        await client.post(conversation, "hi", on_busy="queue")
    tape = await opened(stack.nats.url)
    assert await tape.newest(subjects.LEASES, subjects.lease("local")) == []
    await tape.close()


# Requests

HEAD: Final = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
FLOODS: Final = {
    "a megabyte of headers": (HEAD + b"".join(b"x-%d: %s\r\n" % (n, b"y" * 1000) for n in range(1000)) + b"\r\n", 431),
    "10,000 headers": (HEAD + b"a: b\r\n" * 10_000 + b"\r\n", 431),
    "one header of a megabyte": (HEAD + b"a: " + b"b" * 1_000_000 + b"\r\n\r\n", 431),
    "the name of a header of a megabyte": (HEAD + b"a" * 1_000_000 + b": b\r\n\r\n", 431),
    "a megabyte of a URL": (b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
    "a megabyte of a query": (b"GET /healthz?" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
    "a megabyte of blank lines": (b"\r\n" * 500_000, 431),
    "trailers": (
        b"POST /v1/conversations HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
        + b"a: b\r\n" * 10_000
        + b"\r\n",
        431,
    ),
    "a chunk's extension": (
        b"POST /v1/conversations HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1;"
        + b"a" * 1_000_000
        + b"\r\n",
        431,
    ),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00" * 10, 400),
    "requests that do not wait": ((HEAD + b"\r\n") * 5_000, 400),
}


async def say(port: int, sent: bytes) -> bytes:
    """What an edge answers, to its end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(limits.LINGER_S + 5):
            writer.write(sent)
            return await reader.read()
    finally:
        writer.transport.abort()


@pytest.mark.parametrize("what", FLOODS)
async def test_a_request_too_large_is_told_so_and_the_connection_is_closed(what: str, stack: Stack) -> None:
    sent, status = FLOODS[what]
    answer = await say(stack.ports[0], sent)
    head, _, body = answer.rpartition(b"HTTP/1.1 ")[2].partition(b"\r\n\r\n")
    assert "Traceback" not in stack.logs()
    if what == "requests that do not wait" and not body.startswith(b'{"type"'):
        return  # it was cut in the middle of answering those before
    assert head.startswith(b"%d " % status), head
    assert b"content-type: application/problem+json" in head
    assert b"connection: close" in head
    assert b'"code":' in body


async def test_a_request_of_a_usual_size_is_taken_in_any_pieces(stack: Stack) -> None:
    head = HEAD + b"authorization: %s\r\n" % (b"x" * 8_192) + b"".join(b"x-%d: y\r\n" % n for n in range(90)) + b"\r\n"
    assert (await say(stack.ports[0], head + b"GET /healthz HTTP/1.0\r\n\r\n")).count(b"200 OK") == 2
    reader, writer = await asyncio.open_connection("127.0.0.1", stack.ports[0])
    for _ in range(3):
        for start in range(0, len(head), 97):
            writer.write(head[start : start + 97])
            await writer.drain()
            await asyncio.sleep(0)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK")
        assert await reader.readexactly(15) == b'{"status":"ok"}'
    writer.close()


POST: Final = b"POST /v1/conversations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
SLOW: Final = {
    "nothing": (b"", b""),
    "a blank line at a time": (b"", b"\r\n"),
    "a header at a time": (HEAD, b"a: b\r\n"),
    "a body that does not come": (POST + b"Content-Length: 100\r\n\r\n{", b" "),
    "a chunk that does not come": (POST + b"Transfer-Encoding: chunked\r\n\r\n100\r\n{", b" "),
    "after a first request": (HEAD + b"\r\n" + HEAD, b"a: b\r\n"),
    "blank lines after a first request": (HEAD + b"\r\n", b"\r\n"),
}
"""How each begins, and what it goes on with, a piece a second."""


async def test_whoever_takes_too_long_to_ask_is_sent_away(stack: Stack) -> None:
    async def ask(what: str) -> tuple[str, float, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", stack.ports[0])
        began = time.monotonic()
        begin, piece = SLOW[what]
        writer.write(begin)

        async def drip() -> None:
            while True:
                await asyncio.sleep(1)
                writer.write(piece)

        dripping = asyncio.create_task(drip())
        try:
            async with asyncio.timeout(limits.REQUEST_S + 10):
                answer = await reader.read()
            return what, time.monotonic() - began, answer
        finally:
            dripping.cancel()
            writer.transport.abort()

    for what, took_s, answer in await asyncio.gather(*map(ask, SLOW)):
        assert limits.REQUEST_S - 1 < took_s < limits.REQUEST_S + 5, (what, took_s, answer)
        assert answer.rpartition(b"HTTP/1.1 ")[2].startswith(b"408 "), (what, answer)
    assert "Traceback" not in stack.logs()


@pytest.mark.parametrize("what", ["headers", "one header", "URL"])
async def test_200_that_send_a_head_for_ever_cost_little_memory(what: str, fresh_stack: Stack) -> None:
    stack = fresh_stack
    stack.add_edge()
    edge = stack.edges[0]
    assert edge is not None
    before = most = kib(edge.popen.pid) / 1024
    begin, piece = {
        "headers": (HEAD, b"x: " + b"y" * 1000 + b"\r\n"),
        "one header": (HEAD + b"x: ", b"y" * 1000),
        "URL": (b"GET /", b"y" * 1000),
    }[what]

    async def send() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", stack.ports[0])
        try:
            writer.write(begin)
            with contextlib.suppress(OSError):
                while True:
                    writer.write(piece * 64)
                    await writer.drain()
                    await asyncio.sleep(0)
        finally:
            writer.transport.abort()

    senders = [asyncio.create_task(send()) for _ in range(SENDERS)]
    try:
        async with asyncio.timeout(40):
            while not all(sender.done() for sender in senders):
                most = max(most, kib(edge.popen.pid) / 1024)
                await asyncio.sleep(0.05)
    finally:
        for sender in senders:
            sender.cancel()
    await asyncio.gather(*senders)
    print(f"{what}: {before:.0f} MiB before, {most:.0f} at most")
    assert most - before < RSS_MIB_MAX
    async with Client(stack.url) as client:
        await client.create()
