"""Too much of everything HTTP has: headers, paths, bodies, requests; and what is no HTTP at all.

Whatever is refused may be refused or cut off, but in bounded time and memory. `unharmed` measures both.
"""

import asyncio
import json
import re
import ssl
from typing import Final

import pytest
from tapeline import limits

from tests import PATIENT_S
from tests.client import Client, at_once, log_of
from tests.hardening.attacker import LAST, answers, get, post, said, statuses, wire
from tests.hardening.vitals import GROWTH_BYTES_MAX, Vitals, open_streams, streams_are
from tests.stack import Stack, until

MB: Final = 1_000_000
CUT_S: Final = 3.0  # within which an edge hangs up on what it has refused
REFUSED: Final = (400, 413, 414, 431)
FLOOD: Final = 300
FLOOD_TOGETHER: Final = 20
HI: Final = b'{"content": "long 3"}'

# Heads

HEADS: Final = {
    "a header of 1 MB": get("/healthz", "X: " + "x" * MB),
    "a header's name of 1 MB": get("/healthz", "x" * MB + ": x"),
    "10,000 headers": get("/healthz", *(f"X-{number}: x" for number in range(10_000))),
    "10,000 times the same header": get("/healthz", *["Cookie: x"] * 10_000),
    "1 MB of query": get("/healthz?" + "x" * MB),
    "1 MB of path": get("/" + "x" * MB),
    "1 MB of slashes": get("/" * MB),
    "1 MB of escapes": get("/" + "%2e%2e%2f" * (MB // 9)),
    "100,000 parameters": get("/v1/conversations?" + "&".join(["limit=1"] * 100_000)),
    "1 MB of a method": b"G" * MB + b" / HTTP/1.1\r\n\r\n",
    "1 MB of spaces": b"GET" + b" " * MB + b"/ HTTP/1.1\r\n\r\n",
    "1 MB of empty lines": b"\r\n" * (MB // 2) + get(),
    "a bearer of 1 MB": get("/v1/conversations/x", "Authorization: Bearer " + "x" * MB),
    "a Host of 1 MB": get("/v1/conversations").replace(b"localhost", b"x" * MB),
    "a Last-Event-ID of 1 MB": get("/v1/conversations/x/events", "Last-Event-ID: " + "9" * MB),
    "a key of 1 MB": post("/v1/conversations/x/messages", HI, "Idempotency-Key: " + "x" * MB),
}


@pytest.mark.parametrize("what", HEADS)
async def test_a_head_of_a_megabyte(what: str, stack: Stack, guarded: str) -> None:
    """Would be kept whole while it is parsed, by every connection that likes."""
    for url in (stack.url, guarded):
        found = await said(url, HEADS[what] + LAST)
        print([answer.status for answer in found])
        assert [answer.status for answer in found] in ([414], [431], [400])
        assert len(found[0].body) < 4_000, "what was sent is not sent back"


@pytest.mark.parametrize("what", ["a header", "headers", "a path"])
async def test_a_head_without_an_end(what: str, stack: Stack) -> None:
    """Would be collected for ever: there is always one more header."""
    begin, more = {
        "a header": (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ", b"x" * 65_536),
        "headers": (b"GET / HTTP/1.1\r\nHost: localhost\r\n", b"X: x\r\n" * 10_000),
        "a path": (b"GET /", b"x" * 65_536),
    }[what]
    async with wire(stack.url) as attacker:
        reading = asyncio.create_task(attacker.rest())
        await attacker.send(begin)
        for _ in range(16 * MB // len(more)):
            if reading.done():
                break
            await attacker.send(more)
        await asyncio.wait([reading], timeout=CUT_S)
        assert reading.done(), "16 MB of a head were taken"
        assert {answer.status for answer in answers(reading.result())} <= set(REFUSED)


# Bodies


async def test_a_body_of_100_mb(stack: Stack, client: Client) -> None:
    """Would be in memory before anybody asks how much it is."""
    conversation = await client.create()
    path = f"/v1/conversations/{conversation}/messages"
    body = b"x" * (100 * MB)
    assert await statuses(stack.url, post(path, body, "Connection: close")) in ([413], [])
    chunks = b"10000\r\n" + b"x" * 65_536 + b"\r\n"
    assert await statuses(stack.url, chunked(path, "Connection: close"), *[chunks] * 1_500) in ([413], [])
    assert len(await log_of(stack.nats.url, conversation)) == 1


async def test_a_body_that_nobody_reads(stack: Stack, guarded: str) -> None:
    """Would be collected for a path that takes none, or before it is known who sends it."""
    body = b"x" * (50 * MB)
    for url, path in ((stack.url, "/healthz"), (stack.url, "/nothing"), (guarded, "/v1/conversations")):
        found = await statuses(url, post(path, body, "Connection: close"))
        assert found in ([401], [404], [405], [413], [])


async def test_a_body_in_chunks_of_one_byte(stack: Stack, client: Client) -> None:
    """Would cost a task switch and an object for each byte."""
    conversation = await client.create()
    path = f"/v1/conversations/{conversation}/messages"
    content = b'{"content": "%s"}' % (b"x" * 100_000)
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in content) + b"0\r\n\r\n"
    assert await statuses(stack.url, chunked(path, "Connection: close"), chunks) == [202]
    extended = b"".join(b"1;%s=y\r\n%c\r\n" % (b"x" * 1_000, byte) for byte in content[:20_000]) + b"0\r\n\r\n"
    found = await statuses(stack.url, chunked(path, "Connection: close"), extended)
    assert found in ([400], [413], [422], [])
    run = (await client.snapshot(conversation))["runs"][0]["run"]
    await client.run(conversation, run)
    assert [run] == [one["run"] for one in (await client.snapshot(conversation))["runs"]]
    await log_of(stack.nats.url, conversation)


def chunked(path: str, *headers: str) -> bytes:
    """The head of a POST in chunks."""
    head = post(path, b"", "Transfer-Encoding: chunked", *headers)
    return head.replace(b"Content-Length: 0\r\n", b"")


async def test_a_trailer_of_a_megabyte(stack: Stack, client: Client) -> None:
    """Would be collected after all that has a bound."""
    conversation = await client.create()
    path = f"/v1/conversations/{conversation}/messages"
    trailer = b"0\r\n" + b"".join(b"X-%d: x\r\n" % number for number in range(100_000)) + b"\r\n"
    body = b"%x\r\n%s\r\n" % (len(HI), HI)
    found = await statuses(stack.url, chunked(path, "Connection: close"), body, trailer)
    assert found == [431]
    assert len(await log_of(stack.nats.url, conversation)) == 1


async def test_an_expectation_that_is_never_met(stack: Stack, client: Client) -> None:
    """Would hold the connection and what is on it for ever, or take a body that was refused for the next request."""
    conversation = await client.create()
    path = f"/v1/conversations/{conversation}/messages"
    head, _, body = post(path, HI, "Expect: 100-continue", "Connection: close").partition(b"\r\n\r\n")
    async with wire(stack.url) as attacker:
        await attacker.send(head + b"\r\n\r\n")
        assert await attacker.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await attacker.send(body)
        [answer] = answers(await attacker.rest())
        assert answer.status == 202
    for head in (
        post("/v1/conversations/x/messages", b"", "Expect: 100-continue").replace(b"Length: 0", b"Length: 9000000"),
        get("/healthz", "Expect: 100-continue", "Content-Length: 9000000"),
        get("/healthz", "Expect: the-unexpected"),
    ):
        async with wire(stack.url) as attacker:
            await attacker.send(head)
            assert b"HTTP/1.1 " in await attacker.until(b"\r\n\r\n")
    await client.run(conversation, json.loads(answer.body)["run"])
    await log_of(stack.nats.url, conversation)


# Smuggling: two readers that disagree on where a request ends

SMUGGLED: Final = b"DELETE /v1/conversations/%s HTTP/1.1\r\nHost: localhost\r\nX: "
SHAPES: Final = {
    "a length and chunks": b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n",
    "chunks and a length": b"Transfer-Encoding: chunked\r\nContent-Length: %d\r\n",
    "two lengths": b"Content-Length: 5\r\nContent-Length: %d\r\n",
    "two lengths in one": b"Content-Length: 5, %d\r\n",
    "the same length twice": b"Content-Length: 5\r\nContent-Length: 5\r\nX-Length: %d\r\n",
    "a length with a sign": b"Content-Length: +%d\r\n",
    "a length below nought": b"Content-Length: -%d\r\n",
    "a length in hex": b"Content-Length: 0x%x\r\n",
    "a length with a space": b"Content-Length: %d 5\r\n",
    "a length of 40 digits": b"Content-Length: 1000000000000000000000000000000000000%03d\r\n",
    "a length with a space before the colon": b"Content-Length : %d\r\n",
    "a folded length": b"X: y\r\n Content-Length: %d\r\nContent-Length: 5\r\n",
    "chunked with a vertical tab": b"Transfer-Encoding: \x0bchunked\r\nContent-Length: %d\r\n",
    "chunked twice": b"Transfer-Encoding: chunked, chunked\r\nX-Length: %d\r\n",
    "chunked, but not last": b"Transfer-Encoding: chunked, identity\r\nX-Length: %d\r\n",
    "chunked by another name": b"Transfer-Encoding: xchunked\r\nX-Length: %d\r\n",
    "identity": b"Transfer-Encoding: identity\r\nContent-Length: %d\r\n",
    "folded chunked": b"Transfer-Encoding:\r\n chunked\r\nContent-Length: %d\r\n",
    "chunked in two lines": b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\nContent-Length: %d\r\n",
    "a bare LF": b"X: y\nTransfer-Encoding: chunked\r\nContent-Length: %d\r\n",
    "a bare CR": b"X: y\rTransfer-Encoding: chunked\r\nContent-Length: %d\r\n",
    "a NUL in a name": b"Content-Length\0: 5\r\nContent-Length: %d\r\n",
}


@pytest.mark.parametrize("what", SHAPES)
async def test_a_request_smuggled_behind_another(what: str, stack: Stack, client: Client) -> None:
    """Would let one user's body be the next user's request, where a proxy sees its end elsewhere."""
    conversation = await client.create()
    smuggled = SMUGGLED % conversation.encode()
    body = b"0\r\n\r\n" + smuggled
    head = b"POST /nothing HTTP/1.1\r\nHost: localhost\r\n" + SHAPES[what] % len(body) + b"\r\n"
    found = await statuses(stack.url, head + body, LAST)
    assert found in ([400], []), "a shape on which two readers can disagree has to be refused, and the connection ended"
    assert (await client.http.get(f"/v1/conversations/{conversation}")).status_code == 200


CHUNKS: Final = {
    "no number": b"x\r\n",
    "a number beyond 64 bits": b"fffffffffffffffffff\r\nx\r\n",
    "below nought": b"-1\r\nx\r\n",
    "with 0x": b"0x5\r\nhello\r\n",
    "a bare LF": b"5\nhello\n0\n\n",
    "shorter than it is": b"2\r\nhello\r\n0\r\n\r\n",
    "longer than it is": b"7\r\nhello\r\n0\r\n\r\n",
    "an extension that ends the line": b"5;x=\n\r\nhello\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("what", CHUNKS)
async def test_a_chunk_that_is_none(what: str, stack: Stack, client: Client) -> None:
    """Would put the end of the body where another reader does not see it."""
    conversation = await client.create()
    path = f"/v1/conversations/{conversation}/messages"
    assert await statuses(stack.url, chunked(path) + CHUNKS[what], LAST) in ([400], [])
    assert len(await log_of(stack.nats.url, conversation)) == 1


@pytest.mark.parametrize("length", [len(HI) - 1, len(HI) + 1, len(HI) + 1_000], ids=["short", "long", "longer"])
async def test_a_length_that_is_not_so(length: int, stack: Stack, client: Client) -> None:
    """Would leave the rest for the next request, or the next request in the body."""
    conversation = await client.create()
    path = f"/v1/conversations/{conversation}/messages"
    request = post(path, HI).replace(b"Length: %d" % len(HI), b"Length: %d" % length)
    async with wire(stack.url) as attacker:
        await attacker.send(request + LAST)
        attacker.half_close()
        found = [answer.status for answer in answers(await attacker.rest())]
    assert found in ([400, 400], [400], []), "never a 202, and never what follows as a request of its own"
    assert len(await log_of(stack.nats.url, conversation)) == 1


# Requests


async def test_a_thousand_requests_at_once_on_one_connection(stack: Stack) -> None:
    """Would be begun all together, or answered out of order."""
    for asked, expected in (
        (get() * 999 + LAST, [200] * 1_000),
        ((get("/v1/conversations/x") + get()) * 100 + LAST, [404, 200] * 100 + [200]),
    ):
        found = await statuses(stack.url, asked)
        if found != expected:  # it may have had enough of them, but not answer another's
            assert found[-1] in (400, 429)
            assert found[:-1] == expected[: len(found) - 1]


async def test_a_hundred_thousand_requests_by_one_who_reads_no_answer(stack: Stack) -> None:
    """Would pile up requests and answers."""
    edge = stack.edges[0]
    assert edge is not None
    before = Vitals.of(edge)
    async with wire(stack.url, receive_bytes=4_096) as attacker:
        sending = asyncio.create_task(attacker.send(get("/page/page.css", "X: " + "x" * 400) * 100_000))
        done, _ = await asyncio.wait([sending], timeout=CUT_S)
        is_cut = attacker.reader.at_eof() or attacker.writer.is_closing()
        assert not done or is_cut, "the edge has read 50 MB, though nobody takes what it answers"
        sending.cancel()
        assert Vitals.of(edge).rss_bytes - before.rss_bytes < GROWTH_BYTES_MAX


async def test_a_request_behind_a_stream_hides_nobody(stack: Stack, client: Client) -> None:
    """Would hide from the stream that its reader has gone: held until the next event, it would end in a failure."""
    edge = stack.edges[0]
    assert edge is not None
    before = len(edge.output())
    conversation = await client.create()
    async with wire(stack.url) as attacker:
        await attacker.send(get(f"/v1/conversations/{conversation}/events"))
        await attacker.until(b"event: conversation\n")
        assert await open_streams(client) == 1
        await attacker.send(get() * 10)
        attacker.reset()
    await streams_are(client, 0)
    assert "Traceback" not in edge.output()[before:]


# What is no HTTP/1.1

HELLO: Final = bytes.fromhex("16030100f8010000f40303") + bytes(range(32)) + b"\0" * 200
OTHERS: Final = {
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0",
    "TLS": HELLO,
    "SSH": b"SSH-2.0-OpenSSH_9.9\r\n",
    "SMTP": b"EHLO evil.example\r\n",
    "HTTP/0.9": b"GET /v1/conversations\r\n\r\n",
    "HTTP/9.9": b"GET /healthz HTTP/9.9\r\nHost: localhost\r\n\r\n",
    "a response": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "PROXY protocol": b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n" + get(),
    "PROXY protocol 2": b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + b"\0" * 12 + get(),
    "NATS": b'CONNECT {"verbose":false}\r\nPUB tape.0.x.fact.input 2\r\n{}\r\n',
    "NULs": b"\0" * 100_000,
    "CONNECT": b"CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example:443\r\n\r\n",
    "TRACE": b"TRACE / HTTP/1.1\r\nHost: localhost\r\nMax-Forwards: 0\r\nConnection: close\r\n\r\n",
    "a method nobody has": b"HACK / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "no path": b"GET * HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    "a path without a slash": b"GET healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


@pytest.mark.parametrize("what", OTHERS)
async def test_what_is_no_http(what: str, stack: Stack) -> None:
    """Would be held as a connection that may still become something, or be read as a request it is not."""
    found = await said(stack.url, OTHERS[what])
    assert found
    assert all(answer.status >= 400 and b"evil" not in answer.body for answer in found)


async def test_a_flood_of_what_is_no_http_does_not_flood_the_log(stack: Stack) -> None:
    """Would fill a disk, or hide in the log what somebody has to see."""
    edge = stack.edges[0]
    assert edge is not None
    start = len(edge.output())
    upgrade = get("/healthz", "Connection: close, Upgrade", "Upgrade: websocket")
    for request, status in ((OTHERS["SMTP"], 400), (HEADS["10,000 headers"], 431), (upgrade, 200)):
        found = await at_once(FLOOD_TOGETHER, (statuses(stack.url, request) for _ in range(FLOOD)))
        assert found.count([status]) > FLOOD / 2  # the others were cut off in mid-answer

    def lines() -> list[str]:
        return edge.output()[start:].splitlines()

    def counted() -> int:
        more = [re.search(r"refused (\d+) more", line) for line in lines()]
        return sum(int(one[1]) if one else 1 for one in more)

    await until("all are counted", lambda: counted() >= 2 * FLOOD)
    assert all("refused" in line for line in lines())
    assert len(lines()) < FLOOD


async def test_a_url_for_a_proxy(stack: Stack) -> None:
    """Would have the edge fetch what is elsewhere. It answers for itself."""
    proxied = b"GET http://evil.example/healthz HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
    [answer] = await said(stack.url, proxied)
    [own] = await said(stack.url, get("/healthz", "Connection: close"))
    assert answer.body == own.body


async def test_a_tls_client_at_the_plain_port(stack: Stack) -> None:
    """Would wait for a handshake that never comes."""
    context = ssl.create_default_context()
    with pytest.raises((ssl.SSLError, ConnectionError)):
        async with asyncio.timeout(PATIENT_S):
            await asyncio.open_connection("127.0.0.1", stack.ports[0], ssl=context, server_hostname="localhost")


@pytest.mark.parametrize("protocol", ["websocket", "h2c", "evil"])
async def test_an_upgrade_to_what_nobody_speaks(protocol: str, stack: Stack) -> None:
    """Would turn the connection over to a protocol that nobody has bounded."""
    upgrade = get(
        "/v1/conversations/x/events",
        "Connection: Upgrade, HTTP2-Settings",
        f"Upgrade: {protocol}",
        "HTTP2-Settings: AAMAAABkAAQAAP__",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version: 13",
    )
    async with wire(stack.url) as attacker:
        await attacker.send(upgrade)
        assert await attacker.until(b"\r\n\r\n")
        await attacker.send(b"\x81\x85\0\0\0\0hello" * 100_000)
        attacker.half_close()
        rest = await attacker.rest()
    assert b"101" not in rest[:20]


async def test_http_1_0(stack: Stack, client: Client) -> None:
    """Would be answered in chunks, which HTTP/1.0 does not know, or held open."""
    conversation, run = await client.answered("long 3")
    for path in ("/healthz", f"/v1/conversations/{conversation}", f"/v1/conversations/{conversation}/events?run={run}"):
        request = f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode()
        async with wire(stack.url) as attacker:
            await attacker.send(request)
            raw = await attacker.rest()
        head, _, body = raw.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert b"event: done\n" in body or json.loads(body)
        assert b"connection: close" in head.lower()


async def test_a_body_limit_is_the_same_in_every_coding(stack: Stack, client: Client) -> None:
    """Would be one limit for who says the length, and none for who does not."""
    path = f"/v1/conversations/{await client.create()}/messages"
    body = HI + b" " * (limits.BODY_BYTES_MAX - len(HI) + 1)
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    assert await statuses(stack.url, post(path, body, "Connection: close")) == [413]
    assert await statuses(stack.url, chunked(path, "Connection: close"), chunks) == [413]
    assert await statuses(stack.url, post(path, body[:-1], "Connection: close")) == [202]
