"""What is not yours, guessed: cursors, ids, runs, keys, tickets. A wrong guess tells nothing and costs nothing."""

import asyncio
import base64
import json
import os
import random
from typing import Any, Final

import jwt
import pytest
from tapeline import subjects
from tapeline.tape import Deployment

from tests.client import Client, at_once, log_of, problem
from tests.hardening.attacker import answers, get, wire
from tests.hardening.vitals import Vitals
from tests.stack import Stack

GUESSES: Final = 3_000
GUESS_BYTES_MAX: Final = 2_000  # of memory for each guess, whatever was guessed
PIPELINED: Final = 10
SECRET_WORD: Final = "the password is swordfish"


@pytest.fixture(autouse=True)
def seeded() -> random.Random:
    """What TAPELINE_TEST_SEED repeats."""
    seed = int(os.environ.get("TAPELINE_TEST_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"TAPELINE_TEST_SEED={seed}")
    return random.Random(seed)


async def secret(ann: Client) -> tuple[str, str]:
    """A conversation of ann's that nobody else may know of, and its run."""
    conversation, run = await ann.answered(f"long 3, {SECRET_WORD}")
    return conversation, run


async def test_a_strangers_sequence_as_a_cursor(stack: Stack, ann: Client, bob: Client) -> None:
    """Would begin bob's stream in the midst of ann's events: both are numbered in one stream of the tape."""
    hers = await ann.create()
    his = next(name for number in range(1_000) if is_beside(hers, name := f"{hers}-{number}"))
    await bob.create(id=his)
    said = (await ann.post(hers, SECRET_WORD)).run
    await ann.run(hers, said)
    run = (await bob.post(his, "long 3")).run
    await bob.run(his, run)
    own = {record.seq for record in await log_of(stack.nats.url, his)}
    for record in (await log_of(stack.nats.url, hers))[::5]:
        assert record.seq < max(own)
        for view in ("full", "compact"):
            async with bob.events(his, cursor=record.seq, view=view) as stream:
                assert {one.id for one in await stream.take(1)} <= own
            async with bob.events(his, after=record.seq, view=view, run=run) as stream:
                assert {one.id for one in await stream.rest()} <= own
            assert {json.loads(line)["id"] for line in await bob.lines(his, after=record.seq, view=view)} <= own
        problem(await bob.get_events(hers, str(record.seq)), 404, "not_found")


def is_beside(one: str, other: str) -> bool:
    """Whether both conversations are in the same stream of the tape."""
    shards = Deployment().shards
    return subjects.shard(one, shards) == subjects.shard(other, shards)


CURSORS: Final = (
    *("9223372036854775808", "18446744073709551616", "-1", "+1", "1.0", "1e3", "0x10", "0b1", "1_000", "1,000"),
    *("١", "１", "²", "Ⅳ", " 1", "1;2", "1 2", "null", "NaN", "Infinity", "'1'", "1%00", "9" * 5_000, "1\u200b"),
)


async def test_a_cursor_that_is_no_number(client: Client) -> None:
    """Would be read as another, or as none: events twice, or none of some."""
    conversation, run = await client.answered("long 3")
    for cursor in CURSORS:
        for query in ({}, {"run": run}, {"view": "compact"}):
            response = await client.get_events(conversation, None, None, after=cursor, **query)
            assert response.status_code in (400, 414, 431), cursor[:20]
        if cursor == cursor.strip():
            response = await client.http.get(
                f"/v1/conversations/{conversation}/events", headers=[(b"Last-Event-ID", cursor.encode())]
            )
            assert response.status_code in (400, 431), cursor[:20]
    problem(await client.get_events(conversation, after="9223372036854775807"), 410, "cursor_ahead")
    for cursor in ("0", "00000000000000000", "000"):
        async with client.events(conversation, run=run, after=cursor) as stream:
            assert (await stream.rest())[-1].event == "done"


async def test_two_cursors(client: Client) -> None:
    """Would be one to the edge and another to a cache before it."""
    conversation, run = await client.answered("long 3")
    path = f"/v1/conversations/{conversation}/events?run={run}"
    first, second = (b"Last-Event-ID", b"1"), (b"Last-Event-ID", b"999999999")
    problem(await client.http.get(path, headers=[second]), 410, "cursor_ahead")
    one = await client.http.get(path, headers=[first])
    two = await client.http.get(f"{path}&after=999999999", headers=[first, second])
    assert one.status_code == two.status_code == 200
    assert one.content == two.content, "the first of them counts, as everywhere"


async def test_thousands_of_ids_guessed(stack: Stack, guarded: str, ann: Client, seeded: random.Random) -> None:
    """Would find one, by its answer or what it costs; or leave something behind for each that there is not."""
    conversation, run = await secret(ann)
    edge = stack.edges[1]
    assert edge is not None
    names = [conversation, *(seeded.randbytes(12).hex() for _ in range(GUESSES))]
    seeded.shuffle(names)
    paths = [path for name in names for path in (f"/v1/conversations/{name}", f"/v1/conversations/{name}/events")]
    key = "Authorization: Bearer key-of-bob-1"
    bodies: set[bytes] = set()

    async def guess(some: list[str]) -> None:
        async with wire(guarded) as attacker:
            for start in range(0, len(some), PIPELINED):
                few = some[start : start + PIPELINED]
                await attacker.send(b"".join(get(path, key) for path in few))
                for _ in few:
                    head = await attacker.until(b"\r\n\r\n")
                    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                    [answer] = answers(head + await attacker.reader.readexactly(length))
                    assert answer.status == 404
                    bodies.add(answer.body)

    await at_once(8, (guess(paths[start::8][:100]) for start in range(8)))  # what is made once is made now
    before = Vitals.of(edge)
    await at_once(8, (guess(paths[start::8]) for start in range(8)))
    growth = Vitals.of(edge).rss_bytes - before.rss_bytes
    print(f"{len(paths)} guesses, {growth / len(paths):.0f} bytes each")
    assert len(bodies) == 1
    assert growth < GUESS_BYTES_MAX * len(paths)
    for one in (f"{conversation}/runs/{run}/stop", f"{conversation}/ticket", f"{conversation}/messages"):
        async with Client(guarded, "key-of-bob-1") as bob:
            response = await bob.http.post(f"/v1/conversations/{one}", json={"content": "x"} if "mess" in one else {})
            assert response.content in bodies


async def test_another_conversations_run(stack: Stack, ann: Client, bob: Client) -> None:
    """Would be read or stopped by way of a conversation that one may use."""
    hers = await ann.create()
    run = (await ann.post(hers, "long 2000")).run
    his, _ = await bob.answered("long 3")
    problem(await bob.stop(his, run), 404, "unknown_run")
    problem(await bob.get_events(his, run=run), 404, "unknown_run")
    problem(await bob.stop(hers, run), 404, "not_found")
    problem(await bob.decide(his, run, f"{run}-1-0", approved=True), 404, "unknown_run")
    problem(await bob.decide(hers, run, f"{run}-1-0", approved=True), 404, "not_found")
    mine = await ann.create()
    problem(await ann.stop(mine, run), 404, "unknown_run")
    problem(await ann.get_events(mine, run=run), 404, "unknown_run")
    assert (await ann.stop(hers, run)).status_code == 202
    await ann.run(hers, run)
    for conversation in (hers, his):
        facts = [record for record in await log_of(stack.nats.url, conversation) if b'"type":"stop"' in record.data]
        assert len(facts) == (conversation == hers)


async def test_anothers_idempotency_key(ann: Client, bob: Client) -> None:
    """Would answer with another's run: keys are what people call things, so they are guessed."""
    hers, his = await ann.create(), await bob.create()
    runs = {(await ann.post(hers, "long 3", "1")).run, (await bob.post(his, "long 3", "1")).run}
    assert len(runs) == 2
    problem(await bob.send(hers, "long 3", "1"), 404, "not_found")


KEYS: Final = (
    *(
        "key-of-ann-",
        "key-of-ann-11",
        "KEY-OF-ANN-1",
        "key-of-ann-1,key-of-bob-1",
        "ann=key-of-ann-1",
        "ann",
        "k" * 8_000,
    ),
    *(
        "key-of-ann-1\u00a0",
        "\u200bkey-of-ann-1",
        "кey-of-ann-1",
        "%6bey-of-ann-1",
        "é",
        "null",
        "=",
    ),
)


async def test_keys_guessed(guarded: str) -> None:
    """Would let one in by a prefix, by another's spelling, or by how long the answer takes."""
    async with Client(guarded) as stranger:
        seen = set()
        for key in KEYS:
            response = await stranger.http.get(
                "/v1/conversations", headers=[(b"Authorization", f"Bearer {key}".encode())]
            )
            assert response.status_code in (400, 401, 431), key[:20]
            if response.status_code == 401:
                seen.add(response.content)
        assert len(seen) == 1, "every wrong key is wrong alike"
        for headers in (
            [(b"Authorization", b"Bearer key-of-ann-1"), (b"Authorization", b"Bearer key-of-bob-1")],
            [(b"Authorization", b"Basic a2V5LW9mLWFubi0x")],
            [(b"Cookie", b"Authorization=Bearer key-of-ann-1")],
            [(b"X-Forwarded-User", b"ann"), (b"X-Original-URL", b"/healthz"), (b"X-HTTP-Method-Override", b"GET")],
        ):
            problem(await stranger.http.get("/v1/conversations", headers=headers), 401, "unauthorized")
        for path in ("?key=key-of-ann-1", "?access_token=key-of-ann-1", "?ticket=key-of-ann-1"):
            problem(await stranger.http.get(f"/v1/conversations{path}"), 401, "unauthorized")


async def test_tickets_forged(ann: Client, bob: Client) -> None:
    """Would open what its bearer may not read, or open it for ever."""
    hers, _ = await secret(ann)
    his = await bob.create()
    ticket = (await bob.http.post(f"/v1/conversations/{his}/ticket")).json()["ticket"]
    header, payload, signature = ticket.split(".")
    claims = json.loads(base64.urlsafe_b64decode(payload + "=="))
    forged: dict[str, Any] = {
        "sub": claims | {"sub": "ann"},
        "conversation": claims | {"conversation": hers},
        "both": claims | {"sub": "ann", "conversation": hers},
        "exp": claims | {"exp": claims["exp"] + 10**9},
        "no exp": {key: value for key, value in claims.items() if key != "exp"},
        "until": claims | {"until": None},
        "aud": claims | {"aud": "x"},
    }
    tickets = [
        ticket[:-1],
        ticket + ".x",
        f"{header}.{payload}.",
        f"{header}.{payload}",
        "..",
        "x",
        "",
        "é",
    ]
    for some in forged.values():
        encoded = base64.urlsafe_b64encode(json.dumps(some).encode()).rstrip(b"=").decode()
        none = base64.urlsafe_b64encode(b'{"alg":"none","typ":"JWT"}').rstrip(b"=").decode()
        tickets += [f"{header}.{encoded}.{signature}", f"{none}.{encoded}.", f"{none}.{encoded}.{signature}"]
        tickets += [jwt.encode(some, "key-of-bob-1" * 4, "HS256"), jwt.encode(some, "x" * 64, "HS512")]
    async with Client(str(ann.http.base_url)) as stranger:
        for one in tickets:
            for conversation in (hers, his):
                answer = await stranger.get_events(conversation, ticket=one)
                problem(answer, 401, "unauthorized")
        problem(await stranger.get_events(hers, ticket=ticket), 401, "unauthorized")
        async with asyncio.timeout(10), stranger.events(his, ticket=ticket) as stream:
            assert [one.event for one in await stream.take(1)] == ["conversation"], "the ticket itself is good"


async def test_anothers_list_guessed(ann: Client, bob: Client) -> None:
    """Would page into another's list: places in it are small numbers."""
    hers, _ = await secret(ann)
    for before in (0, 1, 2, 50, 1_000, 2**62, 2**63 - 1):
        response = await bob.http.get("/v1/conversations", params={"before": before, "limit": 100})
        assert response.status_code == 200
        assert hers not in response.text
