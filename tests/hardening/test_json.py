"""JSON made to hurt whoever decodes it, or whoever has to read it from the tape afterwards."""

import gzip
import json
from typing import Any, Final

import msgspec
import pytest
from tapeline import limits

from tests.client import Client, log_of, problem
from tests.hardening.attacker import post, said
from tests.stack import Stack

JSON: Final = {"Content-Type": "application/json"}
HI: Final = '{"content": "hi"}'

BOMBS: Final = {
    "100,000 arrays": b'{"content": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "100,000 objects": b'{"content": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
    "100,000 arrays nobody asked for": b'{"content": "hi", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "arrays that never close": b"[" * 900_000,
    "a number beyond all doubles": b'{"content": 1e999999}',
    "100,000 digits": b'{"content": ' + b"9" * 100_000 + b"}",
    "100,000 digits behind the point": b'{"content": 0.' + b"9" * 100_000 + b"}",
    "a number where text belongs": b'{"content": 1}',
    "NaN": b'{"content": NaN}',
    "Infinity": b'{"content": -Infinity}',
    "a lone high surrogate": b'{"content": "\\ud83d"}',
    "a lone low surrogate": b'{"content": "\\ude00 x"}',
    "surrogates the wrong way round": b'{"content": "\\ude00\\ud83d"}',
    "a surrogate in UTF-8": b'{"content": "\xed\xa0\x80"}',
    "overlong UTF-8": b'{"content": "\xc0\xaf"}',
    "beyond Unicode": b'{"content": "\xf4\x90\x80\x80"}',
    "a raw NUL": b'{"content": "a\x00b"}',
    "a raw line break": b'{"content": "a\nb"}',
    "UTF-16": HI.encode("utf-16"),
    "UTF-16 without a mark": HI.encode("utf-16-le"),
    "UTF-32": HI.encode("utf-32"),
    "UTF-7": b"+AHsAIgBjAG8AbgB0AGUAbgB0ACIAOgAiAGgAaQAiAH0-",
    "latin-1": '{"content": "é"}'.encode("latin-1"),
    "a byte order mark": b"\xef\xbb\xbf" + HI.encode(),
    "gzip that grows a thousandfold": gzip.compress(b'{"content": "' + b"x" * 50_000_000 + b'"}', 9),
    "an unknown key of 500 kB": b'{"content": "hi", "' + b"k" * 500_000 + b'": 1}',
    "100,000 keys": b'{"content": "hi",' + b",".join(b'"k%d":1' % n for n in range(60_000)) + b"}",
    "comments": b'{"content": "hi" /* x */}',
    "a trailing comma": b'{"content": "hi",}',
    "__proto__": b'{"content": "hi", "__proto__": {"on_busy": "interrupt"}}',
}


@pytest.mark.parametrize("what", BOMBS)
async def test_a_bomb_for_the_decoder(what: str, stack: Stack, client: Client) -> None:
    """Would cost memory or the stack, or be read as something else than was checked."""
    conversation = await client.create()
    path = f"/v1/conversations/{conversation}/messages"
    [answer] = await said(stack.url, post(path, BOMBS[what], "Connection: close"))
    assert answer.status in (400, 415, 422)
    assert len(answer.body) < 1_000, "what was sent is not sent back"
    assert [record.event().ts for record in await log_of(stack.nats.url, conversation)]
    assert len(await log_of(stack.nats.url, conversation)) == 1


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "gzip, gzip, gzip"])
async def test_a_compressed_bomb(coding: str, stack: Stack, client: Client) -> None:
    """Would be unpacked to a thousand times its size."""
    bomb = gzip.compress(b'{"content": "' + b"x" * 50_000_000 + b'"}', 9)
    path = f"/v1/conversations/{await client.create()}/messages"
    [answer] = await said(stack.url, post(path, bomb, f"Content-Encoding: {coding}", "Connection: close"))
    assert answer.status in (400, 415)


async def test_a_megabyte_of_escapes(stack: Stack, client: Client) -> None:
    """Would be a sixth of itself when it is checked, and six times that on the tape and for every reader."""
    conversation = await client.create()
    body = b'{"content": "%s"}' % (b"\\u0001" * 166_000)
    response = await client.http.post(f"/v1/conversations/{conversation}/messages", content=body, headers=JSON)
    assert response.status_code == 202, response.text
    received = await client.run(conversation, response.json()["run"])
    assert json.loads(received[0].data)["content"] == "\x01" * 166_000
    assert received[-1].event == "done"
    await log_of(stack.nats.url, conversation)
    problem(
        await client.http.post(
            f"/v1/conversations/{conversation}/messages", content=body + b" " * limits.BODY_BYTES_MAX, headers=JSON
        ),
        413,
        "too_large",
    )


async def test_a_key_twice(stack: Stack, client: Client) -> None:
    """Would be one thing to who checks it and another to who stores it."""
    conversation = await client.create()
    body = b'{"content": "long 3", "content": "long 4"}'
    response = await client.http.post(f"/v1/conversations/{conversation}/messages", content=body, headers=JSON)
    run = response.json()["run"]
    [message, *_, done] = await client.run(conversation, run)
    assert json.loads(message.data)["content"] == "long 4"
    assert done.event == "done"
    await log_of(stack.nats.url, conversation)


def nested(levels: int, opening: bytes = b"[", closing: bytes = b"]") -> bytes:
    """Metadata nested so many levels deep."""
    inner = b"1" if closing == b"}" else b""
    return b'{"metadata": {"a": %s%s%s}}' % (opening * (levels - 1), inner, closing * (levels - 1))


DEEPER: Final = (limits.JSON_DEPTH_MAX + 1, 500, 900, 985, 990, 995, 1_000, 10_000)


@pytest.mark.parametrize("levels", DEEPER)
@pytest.mark.parametrize("brackets", [(b"[", b"]"), (b'{"a":', b"}")], ids=["arrays", "objects"])
async def test_metadata_too_deep_for_some_reader(levels: int, brackets: tuple[bytes, bytes], client: Client) -> None:
    """Would pass the edge's decoder, and stay unreadable for every one with less of its stack left."""
    if len(body := nested(levels, *brackets)) > limits.METADATA_BYTES_MAX:
        body = nested(2_000, *brackets)
    response = await client.http.post("/v1/conversations", content=body, headers=JSON)
    assert response.status_code in (400, 422)
    problem(response, response.status_code, "bad_json" if response.status_code == 400 else "invalid")


async def test_metadata_as_deep_as_it_may_be(stack: Stack, client: Client) -> None:
    """Would be taken, and break the snapshot, the fold or the page afterwards."""
    body = nested(limits.JSON_DEPTH_MAX)
    response = await client.http.post("/v1/conversations", content=body, headers=JSON)
    assert response.status_code == 201, response.text
    conversation = response.json()["id"]
    posted = await client.post(conversation, "long 3")
    assert (await client.run(conversation, posted.run))[-1].event == "done"
    snapshot = await client.http.get(f"/v1/conversations/{conversation}")
    assert json.loads(snapshot.content)["metadata"] == json.loads(body)["metadata"]
    await log_of(stack.nats.url, conversation)


NUMBERS: Final = {
    "beyond 64 bits": b"18446744073709551616",
    "below 64 bits": b"-9223372036854775809",
    "4,000 digits": b"9" * 4_000,
    "the largest double": b"1.7976931348623157e308",
    "next to nothing": b"5e-324",
    "minus nought": b"-0.0",
}


@pytest.mark.parametrize("what", NUMBERS)
async def test_a_number_at_the_edge_of_what_a_machine_can_hold(what: str, stack: Stack, client: Client) -> None:
    """Would be taken by the edge, and be out of range for the next decoder."""
    body = b'{"metadata": {"a": %s}}' % NUMBERS[what]
    response = await client.http.post("/v1/conversations", content=body, headers=JSON)
    assert response.status_code == 201, response.text
    conversation = response.json()["id"]
    posted = await client.post(conversation, "long 3")
    assert (await client.run(conversation, posted.run))[-1].event == "done"
    snapshot: dict[str, Any] = msgspec.json.decode((await client.http.get(f"/v1/conversations/{conversation}")).content)
    assert snapshot["metadata"] == msgspec.json.decode(body)["metadata"]
    await log_of(stack.nats.url, conversation)


@pytest.mark.parametrize("number", [b"9" * 10_000, b"1e999999", b"-1e999999"], ids=["10,000 digits", "1e", "-1e"])
async def test_a_number_beyond_what_a_machine_can_hold(number: bytes, client: Client) -> None:
    """Would take the square of its digits to read, or become infinite, which no JSON can say."""
    body = b'{"metadata": {"a": %s}}' % number
    response = await client.http.post("/v1/conversations", content=body, headers=JSON)
    assert response.status_code in (400, 422), response.text
