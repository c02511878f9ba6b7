"""Characters that end a line, a header, a frame or a subject for somebody, in every string that could reach one."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest
from httpx_sse import aconnect_sse
from nats.aio.msg import Msg
from tapeline import events, subjects
from tapeline.connection import connect
from tapeline.record import FENCE, FENCE_SUBJECT, Entry
from tapeline.tape import Tape

from tests.client import Client, Received, as_received, log_of, problem, stored
from tests.hardening.attacker import LAST, get, post, said
from tests.stack import Stack

FORGED: Final = "\n\nid: 1\nevent: done\ndata: {}\n\n"
EVIL: Final = {
    "CR": "a\rdata: b",
    "LF": "a\ndata: b",
    "CRLF and a header": "a\r\nSet-Cookie: x=1\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
    "NUL": "a\0b",
    "all controls": "".join(chr(code) for code in [*range(1, 32), 127, *range(128, 160)]) + "x",
    "LS and PS": "a\u2028b\u2029c",
    "a frame": FORGED,
    "a frame with CR": FORGED.replace("\n", "\r"),
    "a comment": "\n: hb\n",
    "a retry": "\nretry: 0\n\n",
    "byte order marks": "\ufeffa\ufeff",
    "bidi overrides": "\u202eevil\u202c\u2066x\u2069",
    "non-characters": "\uffff\ufffe\U0010ffff",
    "a letter under 5,000 marks": "z" + "\u0301" * 400,
    "zero width": "a\u200b\u200c\u200d\u2060b",
    "an escape sequence": "\x1b]0;owned\x07\x1b[2J",
    "markup": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "a command of NATS": "a\r\nPUB tape.0.x.fact.input 2\r\n{}\r\n",
    "half of what looks like an escape": "\\ud800\\u0000\\n",
}


async def httpx_sse(client: Client, conversation: str, count: int) -> list[Received]:
    """The first so many events as a lenient reader that others wrote has them."""
    received: list[Received] = []
    async with aconnect_sse(client.http, "GET", f"/v1/conversations/{conversation}/events") as source:
        async for event in source.aiter_sse():
            received.append(Received(int(event.id), event.event, event.data.encode()))
            if len(received) == count:
                break
    return received


async def read_alike(stack: Stack, client: Client, conversation: str) -> list[Received]:
    """What is on the tape, which every kind of reader has to see as just as many events."""
    log = as_received(await stored(stack.nats.url, conversation))
    async with client.events(conversation) as stream:
        strict = await stream.take(len(log))
    assert strict == log
    assert await httpx_sse(client, conversation, len(log)) == log
    lines = [json.loads(line) for line in await client.lines(conversation)]
    assert [(line["id"], line["type"]) for line in lines] == [(one.id, one.event) for one in log]
    return log


@pytest.mark.parametrize("what", EVIL)
async def test_a_user_who_writes_frames(what: str, stack: Stack, client: Client) -> None:
    """Would end the frame early in some reader, and begin one of his own."""
    evil = EVIL[what]
    about: dict[str, Any] = {"title": evil, "system": evil, "metadata": {evil: [evil]}, "tools": [evil[:64]]}
    conversation = await client.create(**about)
    run = (await client.post(conversation, f"long 2000 {evil}")).run
    path = f"/v1/conversations/{conversation}"
    assert (await client.http.post(f"{path}/runs/{run}/stop", json={"reason": evil})).status_code == 202
    await client.run(conversation, run)
    response = await client.http.patch(path, json={"title": f"renamed {evil}"})
    assert (response.status_code, response.json()["title"]) == (200, f"renamed {evil}")

    log = await read_alike(stack, client, conversation)
    assert [one.event for one in log].count("message") == 1
    snapshot = await client.snapshot(conversation)
    assert {key: snapshot[key] for key in about} == {**about, "title": f"renamed {evil}"}
    assert snapshot["runs"][0]["message"]["content"] == f"long 2000 {evil}"
    listed = (await client.http.get("/v1/conversations", params={"limit": 100})).json()["conversations"]
    assert f"renamed {evil}" in [one["title"] for one in listed if one["id"] == conversation]
    await log_of(stack.nats.url, conversation)


async def test_a_model_and_a_tool_that_write_frames(stack: Stack, client: Client) -> None:
    """Would speak to the reader in the edge's name: who controls a web page controls what a tool returns."""
    conversation = await client.create()
    tape = await Tape.open(stack.nats.url, "test")
    try:
        last = await tape.last(conversation)
        for number, evil in enumerate(EVIL.values()):
            step: dict[str, Any] = {"run": "evil", "ts": number, "step": 1, "attempt": 1}
            call: dict[str, Any] = {"run": "evil", "ts": number, "call": evil, "tool": evil}
            for kind, event in (
                (subjects.MODEL_DELTA, events.Token(**step, text=evil)),
                (subjects.MODEL_DELTA, events.Thinking(**step, text=evil)),
                (subjects.MODEL_DELTA, events.ToolInput(**step, call=evil, tool=evil, text=evil)),
                (subjects.TOOL_DELTA, events.ToolProgress(**call, message=evil)),
                (subjects.TOOL, events.ToolResult(**call, outcome="ok", content={evil: [evil]}, message=evil)),
                (subjects.MODEL, events.Answer(**step, finish=evil, text=evil, usage={evil: 1})),
                (subjects.MODEL, events.Error(**step, code=evil, message=evil)),
            ):
                last = await tape.append(conversation, Entry(kind, events.encode(event)), last)
    finally:
        await tape.close()
    log = await read_alike(stack, client, conversation)
    assert len(log) == 1 + 7 * len(EVIL)
    assert (await client.snapshot(conversation))["runs"] == []


WRITTEN: Final = {
    "a frame between the fields": b'{\n\n"type":"token"\n\nid: 1\n\n}',
    "line breaks where JSON allows them": b'{"type":"token",\n"run":"x",\r\n"ts":1,\r"text":"y"}',
    "a type that is a field": b'{"type":"x\\n\\nevent: done\\ndata: {}\\n\\n","run":"x","ts":1}',
    "a type of 100 kB": b'{"type":"%s","run":"x","ts":1}' % (b"x" * 100_000),
    "a type with a space": b'{"type":" ","run":"x","ts":1}',
    "an empty type": b'{"type":"","run":"x","ts":1}',
    "no JSON": b"\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
    "nothing": b"",
    "NULs": b"\0" * 100,
    "a byte order mark": b'\xef\xbb\xbf{"type":"token","run":"x","ts":1}',
    "not UTF-8": b'{"type":"token","run":"\xff\xfe","ts":1}',
    "very deep": b'{"type":"token","run":"x","ts":1,"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a number for a run": b'{"type":"token","run":1,"ts":1}',
    "a time beyond all clocks": b'{"type":"token","run":"x","ts":1e300,"text":"y"}',
}


async def test_a_writer_that_knows_no_json(stack: Stack, client: Client) -> None:
    """Would end the stream of every reader, again at every reconnect: what is on the tape stays there."""
    conversation = await client.create()
    tape = await Tape.open(stack.nats.url, "test")
    try:
        last = await tape.last(conversation)
        for data in WRITTEN.values():
            last = await tape.append(conversation, Entry(subjects.MODEL_DELTA, data), last)
    finally:
        await tape.close()
    async with client.events(conversation) as stream:
        received = await stream.take(1 + len(WRITTEN))
    assert [one.id for one in received] == [record.seq for record in await stored(stack.nats.url, conversation)]
    assert not {one.event for one in received} & {"done", "error", "deleted", "message"}
    assert [one.id for one in await httpx_sse(client, conversation, len(received))] == [one.id for one in received]
    lines = [json.loads(line) for line in await client.lines(conversation)]
    assert [line["id"] for line in lines] == [one.id for one in received]
    assert (await client.run(conversation, (await client.post(conversation, "long 3")).run))[-1].event == "done"


SERVERS: Final[dict[str, dict[str, str]]] = {
    "the end of a read": {"Status": "204"},
    "the end of a read, and more": {"Status": "204", "Nats-Num-Pending": "1"},
    "a read that found nothing": {"Status": "404", "Description": "Message Not Found"},
    "a batch": {"Nats-Batch-Sequence": "2"},
    "a batch that is none": {"Nats-Batch-Sequence": "x"},
    "a batch of too many digits": {"Nats-Batch-Sequence": "9" * 5_000},
    "another place": {"Nats-Sequence": "1", "Nats-Last-Sequence": "7", "Nats-Subject": "tape.0.x.fact.input"},
    "another time": {"Nats-Time-Stamp": "never"},
    "another stream": {"Nats-Stream": "x", "Nats-Num-Pending": "x"},
}


async def test_a_worker_that_writes_the_servers_headers(stack: Stack, client: Client) -> None:
    """Would end every read at his event, or send it back to the beginning for ever: a page that ends, a predecessor
    that was never there, which is what a conversation looks like that was purged and begun again.
    """
    conversation, run = await client.answered("long 3")
    last = (await client.snapshot(conversation))["last_event_id"]
    written = [{"type": "curiosity", "run": run, "ts": number, "what": what} for number, what in enumerate(SERVERS)]
    true_prev: list[int | None] = [None] * len(written)
    tape = await Tape.open(stack.nats.url_for("tools"), "test")
    try:
        subject, chain = tape.subject(conversation, subjects.TOOL_DELTA), tape.subject(conversation)

        async def write(event: dict[str, Any], headers: dict[str, str]) -> int:
            stored: int = json.loads(
                (await tape.nc.request(subject, json.dumps(event).encode(), headers=headers)).data
            )["seq"]
            return stored

        async with client.events(conversation, last) as live:
            for event, headers in zip(written, SERVERS.values(), strict=True):
                await write(event, headers)
            posted = await client.post(conversation, "long 3")  # so that the newest is not on the worker's own subject
            await client.run(conversation, posted.run)
            before = await tape.last(conversation)
            mine = await tape.last(conversation, subjects.TOOL_DELTA)
            fences = {
                "over its own subject": {FENCE: str(mine)},
                "said twice": {FENCE: str(before + 1), f"{FENCE} ": "0", FENCE_SUBJECT: chain},
                "of many digits": {FENCE: "0" * 5_000 + str(before + 2), FENCE_SUBJECT: chain},
            }
            for number, (what, headers) in enumerate(fences.items(), start=1):
                written.append({"type": "curiosity", "run": run, "ts": number, "what": what})
                assert await write(written[-1], headers) == before + number
            true_prev += [None, before + 1, None]
            while len([one for one in live.received if one.event == "curiosity"]) < len(written):
                assert await live.more()
    finally:
        await tape.close()
    log = await read_alike(stack, client, conversation)
    assert [json.loads(one.data) for one in log if one.event == "curiosity"] == written
    assert live.received == [one for one in log if one.id > last]
    lines = [json.loads(line) for line in await client.lines(conversation)]
    assert [line["prev"] for line in lines if line["type"] == "curiosity"] == true_prev
    async with client.events(conversation, pace=1000) as replayed:
        assert await replayed.rest() == log
    snapshot = await client.snapshot(conversation)
    assert [one["run"] for one in snapshot["runs"]] == [run, posted.run]
    assert (await client.run(conversation, (await client.post(conversation, "long 3")).run))[-1].event == "done"
    assert (await client.http.patch(f"/v1/conversations/{conversation}", json={"title": "still"})).status_code == 200


# Names in a path

MARK: Final = "zz9evil"
NAMES: Final = (
    *("*", ">", "%3E", "%2A", f"{MARK}.>", f"{MARK}.*", f".{MARK}", f"{MARK}.", "%2E%2E", "..", ".", f"$JS.API.{MARK}"),
    *(f"{MARK}%0d%0aSet-Cookie:%20x=1", f"{MARK}%0a", f"{MARK}%0d", f"{MARK}%00", f"{MARK}%20x", f"{MARK}%09", "%20"),
    *(f"{MARK}%250d%250a", f"{MARK}%252e%252e", f"{MARK}%25", f"{MARK}%zz", f"{MARK}%u0041", f"{MARK}%", "%%%"),
    *(f"{MARK}%c0%ae%c0%ae", f"{MARK}%e0%80%af", f"{MARK}%c0%80", f"{MARK}%ed%a0%80", f"{MARK}%f4%90%80%80"),
    *(f"{MARK}%ef%bb%bf", f"{MARK}%e2%80%a8", f"{MARK}%e2%80%ae", f"{MARK}%c2%85", f"{MARK}%ef%bc%8e", f"{MARK}%d9%a3"),
    *(f"{MARK}%2f..%2f..", f"{MARK}%5c..%5c", f"{MARK};x=1", f"{MARK}+x", f"{MARK}~", f"{MARK}@x", f"{MARK}:80"),
    *(f"{MARK}{'x' * 5_000}", f"{MARK}%c3%a9", "é", "\u202e", "ﬁ"),
)


@asynccontextmanager
async def overheard(stack: Stack) -> AsyncIterator[list[bytes]]:
    """Whatever anybody says to NATS while open: subjects, headers and payloads."""
    heard: list[bytes] = []

    async def take(message: Msg) -> None:
        heard.append(f"{message.subject} {message.reply} {message.headers}".encode() + message.data)

    nc = await connect(stack.nats.url, "overhear")
    try:
        await nc.subscribe(">", cb=take)
        await nc.flush()
        yield heard
        await nc.flush()
    finally:
        await nc.close()


async def test_a_name_that_is_a_subject_or_a_header(stack: Stack, client: Client) -> None:
    """Would read, write or purge other conversations: `>` is all of them."""
    conversation = await client.create()
    requests = []
    for name in NAMES:
        one = f"/v1/conversations/{name}"
        requests += [
            get(one),
            get(f"{one}/events"),
            get(f"{one}/events?run=x&after=1"),
            post(f"{one}/messages", b'{"content": "hi"}'),
            post(f"{one}/ticket", b"{}"),
            post(f"{one}/runs/x/stop", b"{}"),
            post(f"{one}/runs/{name}/stop", b"{}"),
            get(one).replace(b"GET", b"DELETE", 1),
            post(one, b'{"title": "x"}').replace(b"POST", b"PATCH", 1),
        ]
    async with overheard(stack) as heard:
        for request in requests:
            *first, last = await said(stack.url, request + LAST)
            assert [answer.status for answer in first] in ([404], [405], []), request
            assert last.status in (200, 400), request  # 400: not even a request, and the connection is over
            assert {b"set-cookie"}.isdisjoint(header for answer in (*first, last) for header in answer.headers)
        assert (await client.snapshot(conversation))["id"] == conversation
    assert any(conversation.encode() in one for one in heard), "it heard nothing"
    assert not [one for one in heard if MARK.encode() in one]


async def test_a_run_that_is_a_subject_or_a_header(stack: Stack, client: Client) -> None:
    """Would set or cancel another run's timer, whose subject ends in the run."""
    conversation, run = await client.answered("long 3")
    async with overheard(stack) as heard:
        for name in NAMES:
            path = f"/v1/conversations/{conversation}"
            for request in (post(f"{path}/runs/{name}/stop", b"{}"), get(f"{path}/events?run={name}")):
                *first, last = await said(stack.url, request + LAST)
                assert [answer.status for answer in first] in ([404], []), request
                assert last.status in (200, 400), request
    assert not [one for one in heard if MARK.encode() in one]
    assert len(await log_of(stack.nats.url, conversation)) == len(await client.run(conversation, run)) + 1


# Headers and queries


def header(name: str, value: bytes) -> bytes:
    """A GET of a conversation's events with this header, whatever is in it."""
    return f"GET /v1/conversations/x/events HTTP/1.1\r\nHost: localhost\r\n{name}: ".encode() + value + b"\r\n\r\n"


HEADERS: Final = ("Host", "Last-Event-ID", "Idempotency-Key", "Authorization", "Origin", "Accept", "traceparent")
VALUES: Final = (
    *(b"a\rb", b"a\nb", b"a\0b", b"a\r\n b", b"a\r\n\tb", b"\x7f", b"\x1b[2J", b"\xff\xfe", b"\xe2\x80\xa8", b" ", b""),
    *(b"a\r\nSet-Cookie: x=1", b"\xef\xbb\xbf1", b"1\xc2\xa0", b"%0d%0a", b"=?utf-8?q?=0d=0a?=", b"()" * 1_000),
)


@pytest.mark.parametrize("name", HEADERS)
async def test_a_header_that_goes_on(name: str, stack: Stack, guarded: str) -> None:
    """Would come back as a header of the answer's, or be read as another one than a proxy has checked."""
    for url in (stack.url, guarded):
        for value in VALUES:
            for answer in await said(url, header(name, value) + LAST):
                assert answer.status < 500
                assert b"set-cookie" not in answer.headers
                assert b"\\u0000" not in answer.body


async def test_a_query_that_goes_on(stack: Stack, client: Client) -> None:
    """Would be taken for a cursor, a view or a pace that it is not, or come back in a header."""
    conversation = await client.create()
    path = f"/v1/conversations/{conversation}/events"
    for name in ("after", "view", "pace", "ticket"):
        for value in ("%0d%0a", "1%0a", "%00", "%ff", "%d9%a3", "1%0d%0aSet-Cookie:%20x=1", "\u2028", "%e2%80%a8", "+"):
            for answer in await said(stack.url, get(f"{path}?{name}={value}") + LAST):
                assert answer.status in (200, 400, 401), (name, value)
                assert answer.status != 200 or answer.body == b'{"status":"ok"}', "a stream was opened"


async def test_trace_context_that_carries_headers_of_nats(stack: Stack, client: Client) -> None:
    """Would be written beside the fence on the tape: what a caller says of its trace travels in NATS headers."""
    conversation = await client.create()
    evil = "k=%0d%0aNats-Rollup:%20all,x=%0aNats-TTL:%201s,y=\tz,Nats-Schedule=1"
    path = f"/v1/conversations/{conversation}/messages"
    for name in ("baggage", "tracestate", "traceparent"):
        headers = (f"{name}: {evil}", "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
        [answer] = await said(stack.url, post(path, b'{"content": "long 3"}', *headers, "Connection: close"))
        assert answer.status in (202, 400)
        if answer.status == 202:
            await client.run(conversation, json.loads(answer.body)["run"])
    records = await log_of(stack.nats.url, conversation)
    assert len(records) > 3
    names = {name.lower() for record in records for name in record.headers}
    assert not names & {"nats-rollup", "nats-ttl", "nats-schedule"} - ttl(records)
    assert all("\r" not in value and "\n" not in value for record in records for value in record.headers.values())


def ttl(records: list[Any]) -> set[str]:
    """The header by which deltas expire, which is ours where only deltas have it."""
    return {"nats-ttl"} if not any(record.is_fact and "Nats-TTL" in record.headers for record in records) else set()


async def test_a_baggage_of_megabytes(stack: Stack, client: Client) -> None:
    """Would be stored with every event that the request caused, and sent on to every service."""
    conversation = await client.create()
    evil = ",".join(f"key{number}={'x' * 100}" for number in range(500))
    path = f"/v1/conversations/{conversation}/messages"
    answers_ = await said(stack.url, post(path, b'{"content": "long 3"}', f"baggage: {evil}", "Connection: close"))
    if answers_[0].status == 202:
        await client.run(conversation, json.loads(answers_[0].body)["run"])
    for record in await log_of(stack.nats.url, conversation):
        assert sum(len(name) + len(value) for name, value in record.headers.items()) < 10_000


async def test_a_model_that_is_a_url_or_a_path(stack: Stack, client: Client) -> None:
    """Would make inference call where the user says, or load what he names."""
    for model in (
        "nope:x",
        "openai:x",
        "http://127.0.0.1:1/",
        "../../etc/passwd",
        "test:test",
        "a" * 200,
        ":",
        "@",
        "//",
    ):
        conversation = await client.create(model=model)
        posted = await client.post(conversation, "hi")
        [*_, last] = await client.run(conversation, posted.run)
        assert last.event == "error", model
        assert "Traceback" not in last.data.decode()
        await log_of(stack.nats.url, conversation)
    for model in ("demo\n", "demo\r\nx: y", "demo\0", "dемо", "demo x"):
        problem(await client.http.post("/v1/conversations", json={"model": model}), 422, "invalid")
