"""What an edge says to requests that are wrong, too much, too early, twice at once or not theirs: each its own clear
answer, and nothing on the tape that should not be there.
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Final

import httpx
import pytest
from starlette.types import Receive, Scope, Send
from tapeline import audit, limits, subjects
from tapeline.connection import api
from tapeline.events import UNDECODABLE
from tapeline.record import Entry, Record
from tapeline.settings import EX_CONFIG
from tapeline.tape import Stale, Tape

from services.edge.refusal import Refusals
from services.edge.server import Server
from services.edge.stream import CONNECTION
from tests import PATIENT_S, ROOT
from tests.client import SSE, Client, Received, as_received, at_once, log_of, problem, stored, types
from tests.stack import POLL_S, Process, Stack, free_port, until

JSON: Final = {"Content-Type": "application/json"}
BODY_BYTES: Final = 10 << 20
ANNS: Final = "key-of-ann-1"
BOBS: Final = "key-of-bob-1"
CONTROLS: Final = "a\r\nb\nc\rd\0e\u0085f\u2028g\u2029\x0bh\x1b\ufeff\n\nid: 1\ndata: forged\n\n"
"""Whatever some reader takes for the end of a line, and what looks like a frame of its own."""


async def facts_of(stack: Stack, conversation: str) -> list[str]:
    """The types of the conversation's facts."""
    records = [record for record in await log_of(stack.nats.url, conversation) if record.is_fact]
    return types(as_received(records))


# Bodies

BAD_MESSAGES: Final = {
    "nothing": (b"", 400, "bad_json"),
    "not JSON": (b"{content: hi}", 400, "bad_json"),
    "cut off": (b'{"content": "hi', 400, "bad_json"),
    "two of them": (b'{"content": "hi"}{"content": "ho"}', 400, "bad_json"),
    "not UTF-8": (b'{"content": "\xff\xfe"}', 400, "bad_json"),
    "half a surrogate pair": (b'{"content": "\\ud800"}', 400, "bad_json"),
    "no object": (b'["hi"]', 422, "invalid"),
    "null": (b"null", 422, "invalid"),
    "no content": (b"{}", 422, "invalid"),
    "empty content": (b'{"content": ""}', 422, "invalid"),
    "blank content": (b'{"content": " \\n\\t "}', 422, "invalid"),
    "content a number": (b'{"content": 7}', 422, "invalid"),
    "content null": (b'{"content": null}', 422, "invalid"),
    "content a list": (b'{"content": ["hi"]}', 422, "invalid"),
    "unknown field": (b'{"content": "hi", "contnet": "ho"}', 422, "invalid"),
    "unknown on_busy": (b'{"content": "hi", "on_busy": "wait"}', 422, "invalid"),
    "model with a line break": (b'{"content": "hi", "model": "demo\\n"}', 422, "invalid"),
    "content too long": (b'{"content": "%s"}' % (b"x" * (limits.CONTENT_CHARS_MAX + 1)), 422, "invalid"),
    "very deep": (b'{"content": ' + b"[" * 100_000, 422, "invalid"),
}

BAD_CONVERSATIONS: Final = {
    "not JSON": (b"title=x", 400, "bad_json"),
    "title a number": (b'{"title": 1}', 422, "invalid"),
    "title too long": (b'{"title": "%s"}' % (b"x" * (limits.TITLE_CHARS_MAX + 1)), 422, "invalid"),
    "unknown field": (b'{"titel": "x"}', 422, "invalid"),
    "metadata a list": (b'{"metadata": []}', 422, "invalid"),
    "metadata too much": (b'{"metadata": {"a": "%s"}}' % (b"x" * limits.METADATA_BYTES_MAX), 422, "invalid"),
    "metadata not a number": (b'{"metadata": {"a": NaN}}', 400, "bad_json"),
    "metadata very deep": (b'{"metadata": {"a": %s%s}}' % (b"[" * 5_000, b"]" * 5_000), 400, "bad_json"),
    "id empty": (b'{"id": ""}', 422, "invalid"),
    "id too long": (b'{"id": "%s"}' % (b"x" * (limits.CONVERSATION_ID_CHARS_MAX + 1)), 422, "invalid"),
    "id of two tokens": (b'{"id": "a.b"}', 422, "invalid"),
    "id a wildcard": (b'{"id": "*"}', 422, "invalid"),
    "id a wildcard for all": (b'{"id": ">"}', 422, "invalid"),
    "id with a space": (b'{"id": "a b"}', 422, "invalid"),
    "id that ends a line of NATS": (b'{"id": "a\\n"}', 422, "invalid"),
    "id with a command of NATS": (b'{"id": "a\\r\\nPUB x 0\\r\\n"}', 422, "invalid"),
    "model with a line break": (b'{"model": "demo\\n"}', 422, "invalid"),
}


@pytest.mark.parametrize("what", BAD_MESSAGES)
async def test_a_bad_message_is_refused_and_leaves_nothing(what: str, stack: Stack, client: Client) -> None:
    body, status, code = BAD_MESSAGES[what]
    conversation = await client.create()
    response = await client.http.post(f"/v1/conversations/{conversation}/messages", content=body, headers=JSON)
    problem(response, status, code)
    assert await facts_of(stack, conversation) == ["conversation"]


@pytest.mark.parametrize("what", BAD_CONVERSATIONS)
async def test_a_bad_conversation_is_refused(what: str, client: Client) -> None:
    body, status, code = BAD_CONVERSATIONS[what]
    problem(await client.http.post("/v1/conversations", content=body, headers=JSON), status, code)


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", "application/json2", ""])
async def test_only_json_is_taken_as_any_page_may_send_the_rest(media_type: str, client: Client) -> None:
    headers = {"Content-Type": media_type} if media_type else {}
    response = await client.http.post("/v1/conversations", content=b"{}", headers=headers)
    problem(response, 415, "unsupported_media_type")


async def test_10_mib_are_refused_and_the_client_gets_to_know(stack: Stack, client: Client) -> None:
    conversation = await client.create()
    path = f"/v1/conversations/{conversation}/messages"
    body = b'{"content": "%s"}' % (b"x" * BODY_BYTES)
    problem(await client.http.post(path, content=body, headers=JSON), 413, "too_large")

    async def in_pieces() -> Any:
        for start in range(0, len(body), 1 << 16):
            yield body[start : start + (1 << 16)]

    problem(await client.http.post(path, content=in_pieces(), headers=JSON), 413, "too_large")
    assert await facts_of(stack, conversation) == ["conversation"]


@pytest.mark.parametrize("headers", [b"Content-Length: %d\r\n" % BODY_BYTES, b"Transfer-Encoding: chunked\r\n"])
async def test_10_mib_are_refused_to_a_client_that_sends_before_it_reads(headers: bytes, stack: Stack) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", stack.ports[0])
    try:
        async with asyncio.timeout(PATIENT_S):
            writer.write(b"POST /v1/conversations HTTP/1.1\r\nHost: localhost\r\n")
            writer.write(b"Content-Type: application/json\r\n" + headers + b"\r\n")
            chunked = b"chunked" in headers
            writer.write((b"%x\r\n" % BODY_BYTES if chunked else b"") + b"x" * BODY_BYTES)
            writer.write(b"\r\n0\r\n\r\n" if chunked else b"")
            await writer.drain()
            head = await reader.readuntil(b"\r\n\r\n")
    finally:
        writer.transport.abort()  # it may have more to send, which nobody wants
    assert head.startswith(b"HTTP/1.1 413 ")
    assert b"content-type: application/problem+json\r\n" in head


# Names

IMPOSSIBLE: Final = {
    "a wildcard": "*",
    "a wildcard for all": "%3E",
    "two tokens": "a.b",
    "dots": "%2e%2e",
    "10 kB": "x" * 10_240,
    "CRLF": "a%0d%0aX-Forged:%20yes",
    "a line break at the end": "a%0a",
    "NUL": "a%00b",
    "a space": "a%20b",
    "not UTF-8": "%ff%fe",
    "not ASCII": "%c3%a9",
    "a subject of NATS": "$JS.API.STREAM.DELETE.TAPE_0",
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
async def test_a_conversation_that_cannot_exist_is_one_that_does_not(what: str, client: Client) -> None:
    unknown = problem(await client.http.get("/v1/conversations/unknown"), 404, "not_found")
    path = f"/v1/conversations/{IMPOSSIBLE[what]}"
    for response in (
        await client.http.get(path),
        await client.http.get(f"{path}/events", headers=SSE),
        await client.http.post(f"{path}/messages", json={"content": "hi"}),
        await client.http.post(f"{path}/runs/r/stop"),
    ):
        assert problem(response, 404, "not_found") == unknown
        assert "x-forged" not in response.headers


async def test_an_unknown_run_is_said_so(client: Client) -> None:
    conversation = await client.create()
    for run in ("nope", "*", "%0d%0a", "x" * 10_240):
        problem(await client.stop(conversation, run), 404, "unknown_run")
    for run in ("", "nope", "*", "\r\n"):
        problem(await client.get_events(conversation, run=run), 404, "unknown_run")


async def test_an_unknown_view_is_said_so(client: Client) -> None:
    problem(await client.get_events(await client.create(), view="brief"), 400, "bad_view")


async def test_a_path_that_is_not_there_and_a_method_that_is_not(client: Client) -> None:
    for path in ("/v1", "/v1/", "/v2/conversations", "/v1/conversations/", "/page/../app.py", "/page/%2e%2e/app.py"):
        problem(await client.http.get(path), 404, "no_such_path")
    conversation = await client.create()
    for method, path in (
        ("PUT", "/v1/conversations"),
        ("PUT", f"/v1/conversations/{conversation}"),
        ("GET", f"/v1/conversations/{conversation}/messages"),
        ("POST", f"/v1/conversations/{conversation}/events"),
        ("POST", "/healthz"),
    ):
        response = await client.http.request(method, path)
        problem(response, 405, "method_not_allowed")
        assert method not in response.headers["allow"]


async def test_asking_for_the_headers_of_a_stream_does_not_hang_the_connection(client: Client) -> None:
    response = await client.http.head(f"/v1/conversations/{await client.create()}/events")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert (await client.http.get("/healthz")).status_code == 200


# Cursors

MALFORMED: Final = ("", "-1", "+1", "1.0", "1e3", "0x10", "abc", "1 ", "9" * 40, str(2**63), "٣", "²")


@pytest.mark.parametrize("cursor", MALFORMED)
async def test_a_malformed_cursor_is_refused(cursor: str, client: Client) -> None:
    """Never read as another one, or as none: that would repeat or skip events without a word."""
    conversation = await client.create()
    problem(await client.get_events(conversation, after=cursor), 400, "bad_cursor")
    if cursor == cursor.strip():  # spaces around it are not part of a header's value
        path = f"/v1/conversations/{conversation}/events"
        response = await client.http.get(path, headers=[(b"Last-Event-ID", cursor.encode())])
        problem(response, 400, "bad_cursor")


@pytest.mark.parametrize("ahead", [1, 1_000_000, 2**62])
async def test_a_cursor_ahead_of_the_log_is_gone_and_told_where_to_begin(ahead: int, client: Client) -> None:
    conversation = await client.create()
    last = (await client.snapshot(conversation))["last_event_id"]
    for response in (
        await client.get_events(conversation, str(last + ahead)),
        await client.get_events(conversation, after=last + ahead),
    ):
        body = problem(response, 410, "cursor_ahead")
        assert body["earliest"] == 0
        assert body["snapshot"] == f"/v1/conversations/{conversation}"


# The same message twice


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "é", "a\tb"])
async def test_a_bad_idempotency_key_is_refused(key: str, stack: Stack, client: Client) -> None:
    conversation = await client.create()
    response = await client.http.post(
        f"/v1/conversations/{conversation}/messages",
        json={"content": "hi"},
        headers=[(b"Idempotency-Key", key.encode())],
    )
    problem(response, 400, "bad_idempotency_key")
    assert await facts_of(stack, conversation) == ["conversation"]


async def test_the_same_key_is_the_same_run_on_any_edge_at_any_time(
    stack: Stack, clients: tuple[Client, Client]
) -> None:
    conversation = await clients[0].create()
    first = await clients[0].post(conversation, "long 20", "key")
    again = await clients[1].post(conversation, "long 20", "key")
    await clients[0].run(conversation, first.run)
    assert first == again == await clients[1].post(conversation, "long 20", "key")
    assert (await facts_of(stack, conversation)).count("message") == 1


async def test_the_same_key_at_the_same_instant_on_two_edges_is_one_run(
    stack: Stack, clients: tuple[Client, Client]
) -> None:
    async def race() -> str:
        conversation = await clients[0].create()
        posted = await at_once(4, (clients[turn % 2].post(conversation, "long 5", "key") for turn in range(4)))
        assert len(set(posted)) == 1
        await clients[0].run(conversation, posted[0].run)
        return conversation

    for conversation in await at_once(5, (race() for _ in range(10))):
        assert (await facts_of(stack, conversation)).count("message") == 1


async def test_the_same_key_in_another_conversation_is_another_run(client: Client) -> None:
    one, other = await client.create(), await client.create()
    assert (await client.post(one, "long 5", "key")).run != (await client.post(other, "long 5", "key")).run


async def test_the_same_key_for_another_message_is_refused(client: Client) -> None:
    conversation = await client.create()
    await client.post(conversation, "long 5", "key")
    problem(await client.send(conversation, "long 6", "key"), 422, "idempotency_mismatch")


async def test_an_id_can_be_taken_once_by_one(stack: Stack, clients: tuple[Client, Client]) -> None:
    for number in range(20):
        name = f"taken-{number}"
        responses = await at_once(
            4, (clients[turn % 2].http.post("/v1/conversations", json={"id": name}) for turn in range(4))
        )
        assert sorted(response.status_code for response in responses) == [201, 409, 409, 409]
        problem(next(response for response in responses if response.status_code == 409), 409, "exists")
        assert await facts_of(stack, name) == ["conversation"]


# A conversation that is busy


async def test_a_busy_conversation_refuses_and_names_the_run(stack: Stack, client: Client) -> None:
    conversation = await client.create()
    active = (await client.post(conversation, "long 100")).run
    assert problem(await client.send(conversation, "and this"), 409, "busy")["run"] == active
    await client.run(conversation, active)
    assert (await client.send(conversation, "long 5")).status_code == 202


async def test_of_two_messages_at_the_same_instant_on_two_edges_one_wins(
    stack: Stack, clients: tuple[Client, Client]
) -> None:
    async def race() -> str:
        conversation = await clients[0].create()
        responses = await at_once(2, (client.send(conversation, "long 5") for client in clients))
        won, lost = sorted(responses, key=lambda response: response.status_code)
        assert won.status_code == 202
        run = won.json()["run"]
        assert problem(lost, 409, "busy")["run"] == run
        await clients[0].run(conversation, run)
        return conversation

    for conversation in await at_once(5, (race() for _ in range(20))):
        assert (await facts_of(stack, conversation)).count("message") == 1


async def test_a_queued_message_waits_for_its_turn(stack: Stack, client: Client) -> None:
    conversation = await client.create()
    first = (await client.post(conversation, "long 60")).run
    queued = [(await client.post(conversation, f"long {n}", on_busy="queue")).run for n in (5, 6)]
    for run in (first, *queued):
        assert (await client.run(conversation, run))[-1].event == "done"
    records = [record for record in await log_of(stack.nats.url, conversation) if record.kind == subjects.MODEL]
    turns = [(json.loads(record.data)["run"], json.loads(record.data)["type"]) for record in records]
    assert turns == [(run, what) for run in (first, *queued) for what in ("step", "answer", "done")]


async def test_an_interrupting_message_stops_the_run_and_takes_its_turn(stack: Stack, client: Client) -> None:
    conversation = await client.create()
    first = (await client.post(conversation, "long 2000")).run
    async with client.events(conversation, run=first) as stream:
        await stream.until("token")
        second = (await client.post(conversation, "long 5", on_busy="interrupt")).run
        received = await stream.rest()
    assert types(received)[-1] == "done"
    assert json.loads(received[-1].data)["reason"] == "stopped"
    assert json.loads((await client.run(conversation, second))[-1].data)["reason"] == "stop"
    facts = await facts_of(stack, conversation)
    assert facts[facts.index("stop") + 1] == "message", "the stop and the message are one decision"


# Stop


async def test_stop_before_the_first_token(stack: Stack, clients: tuple[Client, Client]) -> None:
    conversation, run = await clients[0].ask("long 2000")
    assert (await clients[1].stop(conversation, run)).status_code == 202
    await ended_stopped(stack, clients[0], conversation, run)


async def test_stop_in_mid_answer_twice_and_after_the_end(stack: Stack, clients: tuple[Client, Client]) -> None:
    conversation, run = await clients[0].ask("long 2000")
    async with clients[0].events(conversation, run=run) as stream:
        await stream.until("token")
        stops = await at_once(4, (clients[turn % 2].stop(conversation, run) for turn in range(4)))
        assert {response.status_code for response in stops} == {202}
        received = await stream.rest()
    log = await ended_stopped(stack, clients[0], conversation, run)
    assert received == log
    assert (await clients[1].stop(conversation, run)).status_code == 202
    assert await ended_stopped(stack, clients[0], conversation, run) == log
    answer = json.loads(next(one for one in log if one.event == "answer").data)
    assert answer["finish"] == "stopped"
    assert len(answer["text"].split()) < 2000


async def test_a_stop_may_say_why_and_a_bad_one_is_refused(stack: Stack, client: Client) -> None:
    conversation, run = await client.ask("long 2000")
    path = f"/v1/conversations/{conversation}/runs/{run}/stop"
    problem(await client.http.post(path, content=b"{", headers=JSON), 400, "bad_json")
    problem(await client.http.post(path, json={"why": "enough"}), 422, "invalid")
    problem(await client.http.post(path, content=b"reason=enough"), 415, "unsupported_media_type")
    assert (await client.http.post(path, json={"reason": CONTROLS})).status_code == 202
    log = await ended_stopped(stack, client, conversation, run)
    assert json.loads(next(one for one in log if one.event == "stop").data)["reason"] == CONTROLS


async def ended_stopped(stack: Stack, client: Client, conversation: str, run: str) -> list[Received]:
    """The run's log, which has to have ended by one stop."""
    received = await client.run(conversation, run)
    assert json.loads(received[-1].data)["reason"] == "stopped"
    log = as_received(await log_of(stack.nats.url, conversation), run)
    assert received == log
    assert types(log).count("stop") == 1
    return log


# Who may ask


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:80",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "evil_1.example",
        "127.0.0.1@evil.example",
        "evil.example@localhost",
        "evil.example:abc",
        "evil.example:99999",
        "[",
        "0.0.0.0",
        "192.168.0.1",
        "a b",
        "",
    ],
)
async def test_without_keys_a_page_of_another_name_gets_nothing(host: str, stack: Stack, client: Client) -> None:
    """A name that an attacker makes resolve to this machine would let his page in."""
    conversation = await client.create(title="mine")
    path = f"/v1/conversations/{conversation}"
    for method, url in (("GET", path), ("GET", f"{path}/events"), ("POST", "/v1/conversations")):
        response = await client.http.request(method, url, headers={"Host": host}, json={})
        problem(response, 403, "host_refused")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8080", "127.0.0.1:1", "127.8.8.8", "[::1]", "[::1]:8080"])
async def test_without_keys_this_machine_may_ask(host: str, client: Client) -> None:
    response = await client.http.post("/v1/conversations", headers={"Host": host}, json={})
    assert response.status_code == 201


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
async def test_a_page_of_another_site_may_not_act(site: str, stack: Stack, client: Client) -> None:
    conversation, run = await client.answered("long 5")
    for path in ("", f"/{conversation}/messages", f"/{conversation}/runs/{run}/stop"):
        url = f"/v1/conversations{path}"
        response = await client.http.post(url, headers={"Sec-Fetch-Site": site}, json={"content": "hi"})
        problem(response, 403, "cross_site")
    assert (await facts_of(stack, conversation)).count("message") == 1


@pytest.fixture(scope="module")
def guarded(stack: Stack) -> Iterator[str]:
    """The URL of an edge of the same system that knows its users."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    env = stack.env_for("edge") | {"TAPELINE_PORT": str(port), "TAPELINE_API_KEYS": f"ann={ANNS},bob={BOBS}"}

    def ready() -> bool:
        try:
            return httpx.get(f"{url}/readyz").status_code == 200
        except httpx.TransportError:
            return False

    edge = Process("services.edge", env, stack.folder / "guarded.log", ready)
    yield url
    edge.end()


@pytest.mark.parametrize("given", [None, "", "Bearer", "Bearer wrong-key-1", f"Basic {ANNS}", ANNS, f"Bearer {ANNS}x"])
async def test_without_a_key_of_this_deployment_nothing_is_said(given: str | None, guarded: str) -> None:
    async with Client(guarded, ANNS) as ann, Client(guarded) as stranger:
        conversation = await ann.create()
        headers = {} if given is None else {"Authorization": given}
        for method, path in (
            ("POST", "/v1/conversations"),
            ("GET", f"/v1/conversations/{conversation}"),
            ("GET", "/v1/conversations/unknown"),
            ("GET", f"/v1/conversations/{conversation}/events"),
            ("POST", f"/v1/conversations/{conversation}/messages"),
            ("POST", f"/v1/conversations/{conversation}/runs/r/stop"),
        ):
            response = await stranger.http.request(method, path, headers=headers)
            problem(response, 401, "unauthorized")
            assert response.headers["www-authenticate"].startswith("Bearer")


async def test_another_users_conversation_is_as_one_that_does_not_exist(stack: Stack, guarded: str) -> None:
    async with Client(guarded, ANNS) as ann, Client(guarded, BOBS) as bob:
        conversation, run = await ann.answered("long 5")
        name = f"/v1/conversations/{conversation}"
        for method, path, body in (
            ("GET", "", None),
            ("GET", "/events", None),
            ("GET", f"/events?run={run}", None),
            ("GET", "/events?after=1000000", None),
            ("POST", "/messages", {"content": "hi"}),
            ("POST", f"/runs/{run}/stop", {}),
        ):
            hers = await bob.http.request(method, f"{name}{path}", json=body)
            nobodys = await bob.http.request(method, f"/v1/conversations/unknown{path}", json=body)
            assert problem(hers, 404, "not_found") == nobodys.json()
            assert dict(hers.headers) | {"date": ""} == dict(nobodys.headers) | {"date": ""}
        assert (await facts_of(stack, conversation)).count("message") == 1
        assert (await ann.snapshot(conversation))["owner"] == "ann"


async def test_the_same_key_of_two_users_is_two_runs(guarded: str) -> None:
    async with Client(guarded, ANNS) as ann, Client(guarded, BOBS) as bob:
        anns = await ann.post(await ann.create(), "long 5", "key")
        bobs = await bob.post(await bob.create(), "long 5", "key")
        assert anns.run != bobs.run


@pytest.mark.parametrize(
    "settings",
    [
        {"TAPELINE_HOST": "0.0.0.0"},
        {"TAPELINE_HOST": "::"},
        {"TAPELINE_HOST": "0.0.0.0", "TAPELINE_API_KEYS": "ann=short"},
        {"TAPELINE_HOST": "0.0.0.0", "TAPELINE_API_KEYS": "secret-without-a-user"},
        {"TAPELINE_JWT_SECRET": "secret-too-short", "TAPELINE_JWT_AUDIENCE": "a"},
        {"TAPELINE_JWT_SECRET": "s" * 32},
        {"TAPELINE_JWT_SECRET": "s" * 32, "TAPELINE_JWKS_URL": "https://a.example", "TAPELINE_JWT_AUDIENCE": "a"},
        {"TAPELINE_JWKS_URL": "http://login.example/keys", "TAPELINE_JWT_AUDIENCE": "a"},
        {"TAPELINE_JWKS_URL": "file:///keys", "TAPELINE_JWT_AUDIENCE": "a"},
        {"TAPELINE_JWKS_URL": "https://[", "TAPELINE_JWT_AUDIENCE": "a"},
        {"TAPELINE_JWT_AUDIENCE": "a"},
        {"TAPELINE_TICKET_SECRET": "secret-too-short"},
        {"TAPELINE_CORS_ORIGINS": "*"},
        {"TAPELINE_CORS_ORIGINS": "https://a.example,null"},
        {"TAPELINE_CORS_ORIGINS": "chat.example"},
        {"TAPELINE_CORS_ORIGINS": "https://chat.example/"},
        {"TAPELINE_CORS_ORIGINS": "https://chat.example:443"},
        {"TAPELINE_CORS_ORIGINS": "https://*.example"},
        {"TAPELINE_PORT": "http"},
        {"TAPELINE_HEARTBEAT_S": "0"},
        {"TAPELINE_NATS_URL": ""},
    ],
    ids=str,
)
def test_an_edge_that_would_be_open_or_is_told_nonsense_does_not_start(settings: dict[str, str], stack: Stack) -> None:
    env = stack.env_for("edge") | {"TAPELINE_PORT": "0", **settings}
    ended = subprocess.run(
        [sys.executable, "-m", "services.edge"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENT_S
    )
    assert ended.returncode == EX_CONFIG
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith("edge: TAPELINE_")
    assert "secret" not in line


# What would break a frame


async def test_line_breaks_and_forged_frames_come_back_as_they_were(stack: Stack, client: Client) -> None:
    metadata = {CONTROLS: [CONTROLS, {"a": CONTROLS}]}
    conversation = await client.create(title=CONTROLS, system=CONTROLS, metadata=metadata)
    run = (await client.post(conversation, f"long 5 {CONTROLS}")).run
    async with client.events(conversation) as stream:
        received = await stream.until("done")
    assert received == as_received(await log_of(stack.nats.url, conversation))
    about, message = (json.loads(one.data) for one in received[:2])
    assert (about["title"], about["system"], about["metadata"]) == (CONTROLS, CONTROLS, metadata)
    assert message["content"] == f"long 5 {CONTROLS}"
    snapshot = await client.snapshot(conversation)
    assert (snapshot["title"], snapshot["metadata"]) == (CONTROLS, metadata)
    assert snapshot["messages"][0] == {
        "role": "user",
        "content": f"long 5 {CONTROLS}",
        "run": run,
        "ts": message["ts"],
    }
    lines = [json.loads(line) for line in await client.lines(conversation)]
    assert [line["id"] for line in lines] == [one.id for one in received]


PRETTY: Final = json.dumps({"type": "bow", "run": "x", "ts": 1, "depth": [1, 2]}, indent=2)
FOREIGN: Final = {
    "pretty-printed": (PRETTY.encode(), "bow"),
    "pretty-printed with CRLF": (PRETTY.replace("\n", "\r\n").encode(), "bow"),
    "pretty-printed with CR": (PRETTY.replace("\n", "\r").encode(), "bow"),
    "of an unknown type": (b'{"type":"applause","run":"x","ts":1,"hands":2}', "applause"),
    "of a type that forges a field": (b'{"type":"a\\nid: 9","run":"x","ts":1}', "unknown"),
    "of an empty type": (b'{"type":"","run":"x","ts":1}', "unknown"),
    "without a type": (b'{"run":"x"}', UNDECODABLE),
    "no object": (b"[1,2]", UNDECODABLE),
    "no JSON": (b"hello\r\n\r\nid: 1\r\ndata: forged\r\n\r\n", UNDECODABLE),
    "no text": (b"\xff\xfe\0\n\n\r\x80", UNDECODABLE),
    "an answer at half a millisecond": (b'{"type":"answer","run":"x","step":1,"attempt":1,"ts":1.5}', UNDECODABLE),
    "an end, and very deep": (b'{"type":"done","a":%s%s,"ts":1}' % (b"[" * 20_000, b"]" * 20_000), UNDECODABLE),
    "no text in a field that nobody knows": (b'{"type":"bow","run":"x","ts":1,"a":"\xff"}', UNDECODABLE),
    "with a place of its own": (b'{"type":"bow","run":"x","ts":1,"id":1,"prev":0}', "bow"),
    "with a place of its own, escaped": (b'{"type":"bow","run":"x","ts":1,"\\u0069d":1,"pr\\u0065v":0}', "bow"),
    "empty": (b"", UNDECODABLE),
}


@pytest.mark.parametrize("kind", [subjects.MODEL, subjects.MODEL_DELTA, subjects.INPUT, subjects.TOOL])
async def test_what_another_writer_puts_on_the_tape_stops_nobody(
    kind: str, stack: Stack, clients: tuple[Client, Client]
) -> None:
    conversation, run = await clients[0].answered("long 5")
    async with clients[0].events(conversation) as live:
        await live.until("done")
        await append(stack, conversation, kind, [data for data, _ in FOREIGN.values()])
        if kind in (subjects.INPUT, subjects.TOOL):  # these wake inference, which has to put them aside
            unreadable = [data for data, name in FOREIGN.values() if name == UNDECODABLE and b"bow" not in data]
            await buried(stack, conversation, kind, unreadable)
        posted = await clients[0].post(conversation, "long 6")
        async with clients[0].events(conversation, run=posted.run) as following:
            after = await following.rest()
        received = await live.take(len(await stored(stack.nats.url, conversation)))

    records = await stored(stack.nats.url, conversation)
    assert [one.id for one in received] == [record.seq for record in records]
    foreign = [(one, record) for one, record in zip(received, records, strict=True) if is_foreign(record)]
    assert types(one for one, _ in foreign) == [name for _, name in FOREIGN.values()]
    for one, record in foreign:
        if one.event == UNDECODABLE:  # nothing in which a reader who is less strict could find an event
            assert json.loads(one.data) == {"type": UNDECODABLE, "kind": kind}
        else:
            assert one.data == record.data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    assert after[-1].event == "done"
    async with clients[1].events(conversation) as replayed:
        assert await replayed.take(len(received)) == received
    lines = [json.loads(line) for line in await clients[1].lines(conversation)]
    assert [line["id"] for line in lines] == [one.id for one in received]
    assert [line["prev"] for line in lines] == [record.prev for record in records]
    placed = [data for data, _ in FOREIGN.values() if json_of(data).keys() & {"id", "prev"}]
    assert [line["event"] for line in lines if line["type"] == "misplaced"] == [json.loads(data) for data in placed]
    snapshot = await clients[1].snapshot(conversation)
    assert [one["run"] for one in snapshot["runs"]] == [run, posted.run]
    assert snapshot["last_event_id"] == received[-1].id


def json_of(data: bytes) -> dict[str, Any]:
    """The object that it is; empty where it is none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


async def buried(stack: Stack, conversation: str, kind: str, expected: list[bytes]) -> None:
    """Waits until inference is done with all that woke it, these being dead letters."""
    tape = await Tape.open(stack.nats.url, "test")
    consumer = f"CONSUMER.INFO.{subjects.stream(tape.shard(conversation))}.{subjects.TRIGGERS}"
    subject = tape.subject(conversation, kind)
    try:
        async with asyncio.timeout(PATIENT_S):
            while (info := await api(tape.nc, consumer))["num_pending"] or info["num_ack_pending"]:
                await asyncio.sleep(POLL_S)
        letters = await tape.stored(subjects.DEAD, subjects.dead("inference"))
    finally:
        await tape.close()
    assert sorted(one.data for one in letters if one.headers["Tapeline-Subject"] == subject) == sorted(expected)


def is_foreign(record: Record) -> bool:
    return record.data in [data for data, _ in FOREIGN.values()]


@pytest.mark.parametrize("kind", [subjects.TOOL, subjects.TOOL_DELTA])
async def test_what_a_tool_worker_has_no_right_to_write_is_nothing_but_a_curiosity(
    kind: str, stack: Stack, client: Client
) -> None:
    """NATS lets it write to its own subjects only; what type of event it writes there, NATS does not know."""
    conversation = await client.create()
    run = (await client.post(conversation, "long 200")).run
    async with client.events(conversation) as reader:
        await reader.until("token")
        common = {"run": run, "ts": 1, "step": 1, "attempt": 1, "by": "x"}
        forged = [
            {"type": "token", "text": "forged", **common},
            {"type": "answer", "text": "forged", "thinking": "", "finish": "stop", "deltas": 0, "sha256": "", **common},
            {"type": "done", "reason": "stop", "usage": {}, "duration_ms": 1, "facts": 1, **common},
            {"type": "error", "code": "x", "message": "forged", "retryable": False, "duration_ms": 1, **common},
            {"type": "stop", **common},
            {"type": "deleted", **common},
            {"type": "message", "content": "forged", **(common | {"run": "forged"})},
        ]
        await append(stack, conversation, kind, [json.dumps(one).encode() for one in forged], role="tools")
        received = await reader.until("done")
    misplaced = [json.loads(one.data) for one in received if one.event == "misplaced"]
    assert [one["event"] for one in misplaced] == forged
    assert {one["kind"] for one in misplaced} == {kind}
    assert types(received).count("token") > 100, "the answer went on"
    (snapshot,) = (await client.snapshot(conversation))["runs"]
    assert (snapshot["run"], snapshot["reason"], snapshot["stopped"]) == (run, "stop", False)
    assert "forged" not in json.dumps(snapshot)
    lines = [json.loads(line) for line in await client.lines(conversation)]
    assert [line["event"] for line in lines if line["type"] == "misplaced"] == forged
    found = audit.violations(await stored(stack.nats.url, conversation))
    assert [line.split(" ", 1)[1] for line in found] == [
        f"is a {one['type']}, which nobody may write to {kind}" for one in forged
    ]


async def append(stack: Stack, conversation: str, kind: str, events: list[bytes], role: str | None = None) -> None:
    """Another writer's events, each fenced as it should be."""
    tape = await Tape.open(stack.nats.url_for(role) if role else stack.nats.url, "test")
    try:
        last = await tape.last(conversation)
        for data in events:
            while True:
                try:
                    last = await tape.append(conversation, Entry(kind, data), last)
                    break
                except Stale as stale:
                    last = stale.last
    finally:
        await tape.close()


# Connections


async def test_an_answer_that_is_late_to_end_leaves_the_next_one_whole() -> None:
    """A file that is sent is closed after that, when its reader may be at the next one on the same connection."""
    second_has_begun, first_has_ended = asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, _: Receive, send: Send) -> None:
        is_first = scope["path"] == "/first"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        if not is_first:
            second_has_begun.set()
            await first_has_ended.wait()
        await send({"type": "http.response.body", "body": b"whole"})
        if is_first:
            await second_has_begun.wait()
        scope[CONNECTION].returned(scope)
        if is_first:
            first_has_ended.set()

    port = free_port()
    server = Server(app, "127.0.0.1", port, [], Refusals(), lambda: None)
    serving = asyncio.create_task(server.serve())
    await until("serving", lambda: server.started)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
        assert [(await http.get(path)).text for path in ("/first", "/second")] == ["whole", "whole"]
    server.should_exit = True
    await serving
