"""Who is who, and for how long: tokens of a real issuer, its keys over real HTTP, tickets, pages of other origins. Each
test is named for what it keeps out, or lets in.
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import os
import random
import re
import statistics
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from playwright.async_api import Error as PlaywrightError
from playwright.async_api import async_playwright, expect
from tapeline import events, limits, subjects
from tapeline.record import Entry
from tapeline.settings import ConfigError
from tapeline.tape import Tape

from services.edge import jwks
from services.edge.auth import Caller
from services.edge.problem import Problem
from services.edge.ticket import Tickets
from tests import ROOT
from tests.browser import CHROMIUM_FLAGS, chromium
from tests.client import SSE, Client, at_once, log_of, problem, types
from tests.stack import POLL_S, Stack, until
from tests.test_client import NODE
from tests.test_page import ANSWER_MS

SECRET: Final = "0123456789abcdef0123456789abcdef"
AUDIENCE: Final = "tapeline-test"
ISSUER: Final = "https://login.example"
ANNS: Final = "key-of-ann-1"
ORIGIN: Final = "https://chat.example:8443"
LIFE_S: Final = 3.0  # of a token that is to expire in the course of a test
SETTLED_S: Final = 30.0
SAMPLE_S: Final = 40.0
RSA: Final = rsa.generate_private_key(65537, 2048)
OTHER_RSA: Final = rsa.generate_private_key(65537, 2048)
EC: Final = ec.generate_private_key(ec.SECP256R1())


# What signs


def claims(**changed: Any) -> dict[str, Any]:
    """A good token's; None takes one away."""
    good = {"sub": "bob", "aud": AUDIENCE, "iss": ISSUER, "exp": int(time.time()) + 600}
    return {name: value for name, value in (good | changed).items() if value is not None}


def hs256(key: str = SECRET, **changed: Any) -> str:
    return jwt.encode(claims(**changed), key, "HS256")


def rs256(key: RSAPrivateKey = RSA, kid: str | None = "rsa-1", **changed: Any) -> str:
    return jwt.encode(claims(**changed), key, "RS256", headers={"kid": kid} if kid else None)


def es256(**changed: Any) -> str:
    return jwt.encode(claims(**changed), EC, "ES256", headers={"kid": "ec-1"})


def by_hand(header: dict[str, Any] | str, body: dict[str, Any] | str, key: bytes | None) -> str:
    """A token that no library would make: signed with HMAC whatever its header says, or not at all."""
    parts = [part if isinstance(part, str) else json.dumps(part) for part in (header, body)]
    signed = b".".join(_segment(part.encode()) for part in parts)
    signature = _segment(hmac.digest(key, signed, hashlib.sha256)) if key is not None else b""
    return (signed + b"." + signature).decode()


def _segment(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def jwk(key: Any, kid: str | None, **more: Any) -> dict[str, Any]:
    """The public half, as a provider publishes it."""
    algorithm = jwt.algorithms.RSAAlgorithm if isinstance(key, RSAPrivateKey) else jwt.algorithms.ECAlgorithm
    about = {"use": "sig"} | ({} if kid is None else {"kid": kid}) | more
    return algorithm.to_jwk(key.public_key(), as_dict=True) | about


PUBLISHED: Final = [jwk(RSA, "rsa-1"), jwk(EC, "ec-1")]


class Provider:
    """An identity provider's key set over HTTP; what it answers, and how long that takes, can be changed."""

    def __init__(self) -> None:
        self.publish(PUBLISHED)
        self.status = 200
        self.headers: dict[str, str] = {}
        self.asked = 0
        self.answering = threading.Event()
        self.answering.set()
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                provider.asked += 1
                provider.answering.wait(30)
                self.send_response(provider.status)
                for name, value in provider.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(provider.body)))
                self.end_headers()
                self.wfile.write(provider.body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False  # so that closing waits for each to close its socket
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/keys"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def publish(self, keys: list[dict[str, Any]]) -> None:
        self.body = json.dumps({"keys": keys}).encode()

    def close(self) -> None:
        if not self._thread.is_alive():
            return
        self.answering.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def provider() -> Iterator[Provider]:
    provider = Provider()
    yield provider
    provider.close()


TOKENS: Final = {"TAPELINE_JWT_AUDIENCE": AUDIENCE, "TAPELINE_JWT_ISSUER": ISSUER, "TAPELINE_HEARTBEAT_S": "1"}


@pytest.fixture(scope="module")
def shared(stack: Stack) -> str:
    """The URL of an edge that takes tokens signed with a shared secret, and Ann's key; and pages of `ORIGIN`."""
    env = {"TAPELINE_JWT_SECRET": SECRET, "TAPELINE_API_KEYS": f"ann={ANNS}", "TAPELINE_CORS_ORIGINS": ORIGIN}
    return stack.edge_url(stack.add_edge({**TOKENS, **env}))


@pytest.fixture(scope="module")
def published(stack: Stack) -> Iterator[str]:
    """The URL of an edge that takes tokens signed with a key that a provider publishes."""
    provider = Provider()
    yield stack.edge_url(stack.add_edge({**TOKENS, "TAPELINE_JWKS_URL": provider.url}))
    provider.close()


def no_secret_in_the_logs(stack: Stack, *tokens: str) -> None:
    logs = stack.logs()
    assert [token for token in (SECRET, ANNS, *tokens) if token in logs] == []


# Who comes in


async def test_a_token_names_its_user(stack: Stack, shared: str, published: str) -> None:
    for url, token in (
        (shared, hs256()),
        (shared, hs256(aud=["other", AUDIENCE])),
        (shared, hs256(nbf=int(time.time()) + int(limits.TOKEN_LEEWAY_S) - 2)),
        (shared, hs256(exp=int(time.time() - limits.TOKEN_LEEWAY_S) + 5)),
        (published, rs256()),
        (published, rs256(kid=None)),
        (published, es256()),
    ):
        async with Client(url, token) as bob:
            assert (await bob.snapshot(await bob.create()))["owner"] == "bob"
        no_secret_in_the_logs(stack, token)


@pytest.mark.parametrize("user", ["zoë", "auth0|5f7c8ec7c33c6c004bbafe82", "a b", "*", "a.b>", "x" * 255], ids=str)
async def test_any_printable_name_is_a_user(user: str, shared: str) -> None:
    async with Client(shared, hs256(sub=user)) as client:
        conversation, run = await client.answered("long 5")
        assert (await client.snapshot(conversation))["owner"] == user
        assert types(await client.run(conversation, run, 0))[-1] == "done"


async def test_keys_and_tokens_work_side_by_side(shared: str) -> None:
    async with Client(shared, ANNS) as by_key, Client(shared, hs256(sub="ann")) as by_token:
        assert (await by_token.snapshot(await by_key.create()))["owner"] == "ann"


# Tokens are made when they are tried: one made when the tests are collected may have expired by then.

Bad = tuple[str, str]
"""A token, and a word of the reason that its refusal gives."""
NONE: Final = {"alg": "none", "typ": "JWT"}
DEEP: Final = '{"alg":"HS256","x":' + "[" * 3_000 + "]" * 3_000 + "}"


def bad_for_both() -> dict[str, Bad]:
    return {
        "a key of nobody": ("key-of-nobody", ""),
        "dots": ("..", ""),
        "a header only": ("eyJhbGciOiJIUzI1NiJ9", ""),
        "unsigned": (by_hand(NONE, claims(), None), ""),
        "unsigned, in capitals": (by_hand({"alg": "NONE"}, claims(), None), ""),
        "unsigned, though signed": (by_hand(NONE, claims(), SECRET.encode()), ""),
        "no algorithm": (by_hand({}, claims(), SECRET.encode()), ""),
        "an algorithm that is a list": (by_hand({"alg": ["HS256"]}, claims(), SECRET.encode()), ""),
        "another HMAC": (jwt.encode(claims(), SECRET * 2, "HS512"), ""),
        "header no object": (by_hand("[]", claims(), SECRET.encode()), ""),
        "very deep": (by_hand(DEEP, claims(), SECRET.encode()), ""),
        "not base64": ("!!.!!.!!", ""),
        "huge": (hs256(x="x" * 10_000), "characters at most"),
        "just too long": ("x" * (limits.TOKEN_CHARS_MAX + 1), "characters at most"),
    }


def bad_hs256() -> dict[str, Bad]:
    return {
        **bad_for_both(),
        "of another secret": (hs256("f" * 32), "signature"),
        "changed": (hs256()[:-2] + ("AA" if not hs256().endswith("AA") else "BB"), ""),
        "of the secret's SHA": (hs256(hashlib.sha256(SECRET.encode()).hexdigest()), "signature"),
        "signed with the key of a provider": (rs256(), ""),
        "expired": (hs256(exp=int(time.time() - limits.TOKEN_LEEWAY_S) - 1), "expired"),
        "expired, of another secret": (hs256("f" * 32, exp=1), "signature"),
        "not valid yet": (hs256(nbf=int(time.time()) + 600), "not valid yet"),
        "issued in the future": (hs256(iat=int(time.time()) + 600), "not valid yet"),
        "for another audience": (hs256(aud="other"), "audience"),
        "for no audience": (hs256(aud=None), "claim"),
        "of another issuer": (hs256(iss="https://evil.example"), "issuer"),
        "of no issuer": (hs256(iss=None), "claim"),
        "without an end": (hs256(exp=None), "claim"),
        "with an end that is no number": (by_hand({"alg": "HS256"}, claims(exp="soon"), SECRET.encode()), ""),
        "with no end of an end": (by_hand({"alg": "HS256"}, claims(exp=float("inf")), SECRET.encode()), ""),
        "without a user": (hs256(sub=None), "claim"),
        "of an empty user": (hs256(sub=""), "`sub`"),
        "of a user with a line break": (hs256(sub="bob\n"), "`sub`"),
        "of half a character": (by_hand({"alg": "HS256"}, claims(sub="\ud800"), SECRET.encode()), "`sub`"),
        "of a user too long": (hs256(sub="x" * (limits.USER_CHARS_MAX + 1)), "`sub`"),
        "of a user that is a number": (by_hand({"alg": "HS256"}, claims(sub=7), SECRET.encode()), ""),
        "claims no object": (by_hand({"alg": "HS256"}, "[]", SECRET.encode()), ""),
        "demanding what is not known": (
            by_hand({"alg": "HS256", "crit": ["x"], "x": 1}, claims(), SECRET.encode()),
            "",
        ),
    }


_public = RSA.public_key()
_pem: Final = _public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
_der: Final = _public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
_jwk: Final = json.dumps(PUBLISHED[0]).encode()


def bad_published() -> dict[str, Bad]:
    return {
        **bad_for_both(),
        **{
            f"HMAC with the public key as {form}": (by_hand({"alg": "HS256", "kid": "rsa-1"}, claims(), key), "")
            for form, key in {"PEM": _pem, "PEM without its end": _pem.strip(), "DER": _der, "JWK": _jwk}.items()
        },
        "HMAC that calls itself RS256": (by_hand({"alg": "RS256", "kid": "rsa-1"}, claims(), _pem), ""),
        "of an unknown key": (rs256(OTHER_RSA, "rsa-2"), ""),
        "of another key under a known name": (rs256(OTHER_RSA), "signature"),
        "that brings its own key": (
            jwt.encode(claims(), OTHER_RSA, "RS256", headers={"jwk": jwk(OTHER_RSA, "mine"), "kid": "mine"}),
            "",
        ),
        "RSA with the name of an EC key": (rs256(kid="ec-1"), ""),
        "another RSA algorithm": (jwt.encode(claims(), RSA, "RS512", headers={"kid": "rsa-1"}), ""),
        "another padding": (jwt.encode(claims(), RSA, "PS256", headers={"kid": "rsa-1"}), ""),
        "a key's name that is a number": (by_hand({"alg": "RS256", "kid": 7}, claims(), b"x"), ""),
        "a key's name that is a list": (by_hand({"alg": "RS256", "kid": ["rsa-1"]}, claims(), b"x"), ""),
        "expired": (rs256(exp=1), "expired"),
        "for another audience": (es256(aud="other"), "audience"),
        "of another issuer": (es256(iss="https://evil.example"), "issuer"),
        "without an end": (rs256(exp=None), "claim"),
        "without a user": (rs256(sub=None), "claim"),
    }


async def refuse(url: str, token: str, word: str) -> None:
    async with Client(url) as client:
        response = await client.http.post("/v1/conversations", json={}, headers={"Authorization": f"Bearer {token}"})
    body = problem(response, 401, "unauthorized")
    assert word in body["detail"]
    assert response.headers["www-authenticate"].startswith("Bearer ")
    assert 'error="invalid_token"' in response.headers["www-authenticate"]
    assert token not in response.text + str(response.headers)


@pytest.mark.parametrize("what", bad_hs256())
async def test_a_bad_token_is_refused_where_a_secret_is_shared(what: str, stack: Stack, shared: str) -> None:
    token, word = bad_hs256()[what]
    await refuse(shared, token, word)
    if len(token) > 20:
        no_secret_in_the_logs(stack, token)


@pytest.mark.parametrize("what", bad_published())
async def test_a_bad_token_is_refused_where_keys_are_published(what: str, stack: Stack, published: str) -> None:
    token, word = bad_published()[what]
    await refuse(published, token, word)
    if len(token) > 20:
        no_secret_in_the_logs(stack, token)


async def test_of_two_headers_none_is_believed(shared: str) -> None:
    """What checked the request before us may have looked at the other one."""
    good, bad = ("Authorization", f"Bearer {hs256()}"), ("Authorization", f"Bearer {hs256('f' * 32)}")
    async with Client(shared) as client:
        for headers in ([good, bad], [bad, good], [good, good]):
            problem(await client.http.post("/v1/conversations", json={}, headers=headers), 401, "unauthorized")


# A provider's keys


@pytest.fixture
def learning(stack: Stack, provider: Provider) -> Iterator[str]:
    """The URL of an edge that takes what `provider` publishes."""
    number = stack.add_edge({**TOKENS, "TAPELINE_JWKS_URL": provider.url})
    yield stack.edge_url(number)
    stack.kill_edge(number)


@pytest.fixture
def at_will(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys may be fetched as often as a test likes."""
    monkeypatch.setattr(limits, "JWKS_AGAIN_S", 0.0)


async def test_a_rotated_key_is_found_and_the_old_one_forgotten(learning: str, provider: Provider) -> None:
    async with Client(learning, rs256()) as before, Client(learning, rs256(OTHER_RSA, "rsa-2")) as after:
        assert (await before.http.post("/v1/conversations", json={})).status_code == 201
        provider.publish([jwk(OTHER_RSA, "rsa-2")])
        async with asyncio.timeout(limits.JWKS_AGAIN_S + SETTLED_S):
            while (response := await after.http.post("/v1/conversations", json={})).status_code != 201:
                problem(response, 401, "unauthorized")
                await asyncio.sleep(POLL_S)
        problem(await before.http.post("/v1/conversations", json={}), 401, "unauthorized")


async def test_a_flood_of_unknown_keys_is_no_flood_for_the_provider(learning: str, provider: Provider) -> None:
    began = time.monotonic()
    async with Client(learning) as client:

        async def knock(number: int) -> None:
            headers = {"Authorization": f"Bearer {rs256(OTHER_RSA, f'unknown-{number}')}"}
            problem(await client.http.get("/v1/conversations/c", headers=headers), 401, "unauthorized")

        await at_once(20, (knock(number) for number in range(300)))
    assert 1 <= provider.asked <= 2 + (time.monotonic() - began) / limits.JWKS_AGAIN_S


async def test_before_the_provider_has_been_heard_nobody_is_called_a_stranger(stack: Stack) -> None:
    """A client that is told 401 throws a good token away. Once there are keys, they stay."""
    provider = Provider()
    provider.status = 500
    number = stack.add_edge({**TOKENS, "TAPELINE_JWKS_URL": provider.url})
    try:
        async with Client(stack.edge_url(number), es256()) as client:
            response = await client.http.post("/v1/conversations", json={})
            problem(response, 503, "unavailable")
            assert int(response.headers["retry-after"]) >= 1
            provider.status = 200
            async with asyncio.timeout(limits.JWKS_AGAIN_S + SETTLED_S):
                while (await client.http.post("/v1/conversations", json={})).status_code != 201:
                    await asyncio.sleep(POLL_S)
            provider.close()
            headers = {"Authorization": f"Bearer {rs256(OTHER_RSA, 'rsa-2')}"}
            problem(await client.http.get("/v1/conversations/c", headers=headers), 401, "unauthorized")
            await client.create()
    finally:
        provider.close()
        stack.kill_edge(number)


async def test_a_provider_that_hangs_holds_up_nobody_whose_key_is_known(learning: str, provider: Provider) -> None:
    async with Client(learning, es256()) as known, Client(learning, rs256(OTHER_RSA, "rsa-2")) as unknown:
        await known.create()
        async with asyncio.timeout(SETTLED_S):  # until it may be asked again
            provider.answering.clear()
            asked = provider.asked
            waiting = asyncio.create_task(unknown.http.get("/v1/conversations/c"))
            while provider.asked == asked:
                if waiting.done():
                    problem(waiting.result(), 401, "unauthorized")
                    waiting = asyncio.create_task(unknown.http.get("/v1/conversations/c"))
                await asyncio.sleep(POLL_S)
        await known.create()
        assert (await known.http.get("/healthz")).status_code == 200
        assert not waiting.done(), "whose key is known has waited until the provider was given up"
        async with asyncio.timeout(limits.JWKS_TIMEOUT_S + SETTLED_S):
            problem(await waiting, 401, "unauthorized")


NONSENSE: Final = {
    "no JSON": b"<html>",
    "no set": b"[]",
    "null": b"null",
    "keys no list": b'{"keys": {}}',
    "empty": b'{"keys": []}',
    "very deep": b'{"keys": ' + b"[" * 100_000,
    "too much": b'{"keys": [%s]}' % (b" " * limits.JWKS_BYTES_MAX),
    "a shared secret": json.dumps({"keys": [{"kty": "oct", "kid": "rsa-1", "k": "c2VjcmV0"}]}).encode(),
}


@pytest.mark.parametrize("what", NONSENSE)
async def test_the_last_good_keys_outlive_nonsense(what: str, provider: Provider, at_will: None) -> None:
    keys = jwks.KeySet(provider.url)
    assert await keys.key("rsa-1", "RS256") is not None
    provider.body = NONSENSE[what]
    assert await keys.key("unknown", "RS256") is None
    assert provider.asked == 2
    assert await keys.key("rsa-1", "RS256") is not None


async def test_a_redirection_is_not_followed(provider: Provider, at_will: None) -> None:
    """It could lead to where anyone can put in keys of his own."""
    provider.status = 302
    provider.headers["Location"] = provider.url
    with pytest.raises(Problem):
        await jwks.KeySet(provider.url).key("rsa-1", "RS256")
    assert provider.asked == 1


async def test_a_provider_that_drips_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes in time, and the whole never does."""
    monkeypatch.setattr(limits, "JWKS_TIMEOUT_S", 2.0)  # a client's first TLS context takes a part of it
    hung_up = asyncio.Event()

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        with contextlib.suppress(ConnectionError):  # hanging up on unread bytes is a reset
            while not reader.at_eof():
                writer.write(b" ")
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.05):
                        await reader.read()
        writer.transport.abort()
        hung_up.set()

    server = await asyncio.start_server(drip, "127.0.0.1", 0)
    async with asyncio.timeout(SETTLED_S):  # the whole would take 50 s
        with pytest.raises(Problem):
            await jwks.KeySet(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/").key("a", "RS256")
    async with asyncio.timeout(SETTLED_S):
        await hung_up.wait()
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize(
    "url",
    ["https://a:x/", "https://a:99999/", "https://a:0/", "https:///jwks", "http://[::1/", "http://a/", "ftp://a/"],
)
def test_what_is_no_address_of_keys_is_refused_at_the_start(url: str) -> None:
    with pytest.raises(ConfigError, match="TAPELINE_JWKS_URL must be"):
        jwks.KeySet(url)


async def test_whatever_goes_wrong_the_keys_are_asked_for_again(
    provider: Provider, at_will: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that ended would say so to nobody, and a key that was withdrawn be taken for ever."""
    monkeypatch.setattr(limits, "JWKS_REFRESH_S", 0.01)
    keys = jwks.KeySet(provider.url)
    keys._url = "https://\x01/"
    keeping = asyncio.create_task(keys.keep())
    with pytest.raises(Problem):
        await keys.key("rsa-1", "RS256")
    keys._url = provider.url
    await until("it is asked again", lambda: provider.asked > 0)
    assert not keeping.done()
    keeping.cancel()


UNUSABLE: Final = {
    "private": json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(RSA)) | {"kid": "a"},
    "for encryption": jwk(RSA, "a", use="enc"),
    "for another algorithm": jwk(RSA, "a", alg="PS256"),
    "on another curve": jwk(ec.generate_private_key(ec.SECP384R1()), "a"),
    "too short": jwk(rsa.generate_private_key(65537, 1024), "a"),
    "with a name that is a list": jwk(RSA, "a") | {"kid": ["a"]},
    "of a type that is a list": {"kty": ["RSA"], "kid": "a"},
    "without a modulus": {"kty": "RSA", "kid": "a", "e": "AQAB"},
    "no object": "key",
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_a_key_that_is_no_use_is_passed_over(what: str) -> None:
    assert list(jwks.parse(json.dumps({"keys": [UNUSABLE[what], *PUBLISHED]}).encode())) == [
        ("rsa-1", "RS256"),
        ("ec-1", "ES256"),
    ]
    with pytest.raises(ValueError):
        jwks.parse(json.dumps({"keys": [UNUSABLE[what]]}).encode())


# How long


def expiring() -> str:
    return hs256(exp=int(time.time() - limits.TOKEN_LEEWAY_S + LIFE_S) + 1)


def is_over(token: str) -> bool:
    """Whether an edge of this machine may take it no longer."""
    claims = jwt.decode(token, options={"verify_signature": False})
    return time.time() >= float(claims["exp"]) + limits.TOKEN_LEEWAY_S


async def test_a_quiet_stream_ends_when_its_token_expires(shared: str) -> None:
    token = expiring()
    async with Client(shared, hs256()) as bob, Client(shared, token) as briefly:
        conversation = await bob.create()
        async with briefly.events(conversation) as stream, bob.events(conversation) as lasting:
            reading = asyncio.create_task(stream.rest())
            beats = late = 0
            while not reading.done():
                beats += 1
                late += is_over(token)
                await lasting.heartbeats(beats)
            assert types(await reading) == ["conversation"]
            assert stream.ended
            assert is_over(token)
            assert late <= 3, "it went on for heartbeats after its end"
            await lasting.heartbeats(beats + 1)
        problem(await briefly.get_events(conversation, "1"), 401, "unauthorized")


@pytest.mark.parametrize("how", ["GET", "POST"])
async def test_a_busy_stream_ends_between_events_when_its_token_expires(how: str, stack: Stack, shared: str) -> None:
    async with Client(shared, hs256()) as bob, Client(shared, expiring()) as briefly:
        conversation = await bob.create()
        path = f"/v1/conversations/{conversation}"
        if how == "GET":
            run = (await bob.post(conversation, "long 2000")).run
            opened = briefly.events(conversation, run=run)
        else:
            opened = briefly.stream("POST", f"{path}/messages", json={"content": "long 2000"}, headers=SSE)
        async with opened as stream:
            received = await stream.rest()
        run = json.loads(received[-1].data)["run"]
        assert "token" in types(received)
        assert "done" not in types(received), "the run was over before the token, so this was no test"
        assert (await bob.stop(conversation, run)).status_code == 202
        rest = await bob.run(conversation, run, received[-1].id)
        whole = await bob.run(conversation, run, 0)
    assert [one for one in received if one.event != "conversation"] + rest == whole
    await log_of(stack.nats.url, conversation)


# Tickets


async def ticket_of(client: Client, conversation: str) -> str:
    response = await client.http.post(f"/v1/conversations/{conversation}/ticket")
    assert response.status_code == 201, response.text
    assert response.headers["cache-control"] == "no-store"
    answer = response.json()
    assert set(answer) == {"ticket", "expires_ts", "events_url"}
    assert answer["events_url"] == f"/v1/conversations/{conversation}/events?ticket={answer['ticket']}"
    assert 0 < answer["expires_ts"] - time.time() * 1000 <= limits.TICKET_S * 1000
    ticket: str = answer["ticket"]
    return ticket


@pytest.mark.parametrize("by", ["key", "token", "nothing"])
async def test_a_ticket_opens_the_events_of_its_conversation(by: str, stack: Stack, shared: str) -> None:
    url = stack.url if by == "nothing" else shared
    credential = {"key": ANNS, "token": hs256(), "nothing": ""}[by]
    async with Client(url, credential) as owner, Client(url) as bare:
        conversation, run = await owner.answered("long 5")
        ticket = await ticket_of(owner, conversation)
        assert len(ticket) < 1_000
        async with bare.events(conversation, ticket=ticket) as stream:
            received = await stream.until("done")
        async with bare.events(conversation, received[1].id, run=run, ticket=ticket) as stream:
            assert await stream.rest() == received[2:]
        assert len(await bare.lines(conversation, ticket=ticket)) == len(received)
    no_secret_in_the_logs(stack, ticket)


async def test_a_ticket_of_one_edge_is_good_at_another(stack: Stack, shared: str) -> None:
    """The secret of its own, the token's, and the keys': whatever all of them have."""
    for env in (
        {"TAPELINE_API_KEYS": f"bob={'k' * 8},ann={ANNS}"},
        {"TAPELINE_API_KEYS": f"ann={ANNS}", "TAPELINE_TICKET_SECRET": "t" * 32},
    ):
        one, other = stack.add_edge(env), stack.add_edge(env)
        async with Client(stack.edge_url(one), ANNS) as ann, Client(stack.edge_url(other)) as bare:
            conversation = await ann.create()
            async with bare.events(conversation, ticket=await ticket_of(ann, conversation)) as stream:
                assert types(await stream.take(1)) == ["conversation"]
            async with Client(shared) as elsewhere:
                ticket = await ticket_of(ann, conversation)
                problem(await elsewhere.get_events(conversation, ticket=ticket), 401, "unauthorized")
        for number in (one, other):
            stack.kill_edge(number)


async def test_a_ticket_does_nothing_else(stack: Stack, shared: str) -> None:
    async with Client(shared, hs256()) as bob, Client(shared) as bare:
        conversation, run = await bob.answered("long 5")
        ticket, other = await ticket_of(bob, conversation), await bob.create()
        path = f"/v1/conversations/{conversation}"
        for method, url in (
            ("GET", f"/v1/conversations/{other}/events"),
            ("GET", "/v1/conversations/unknown/events"),
            ("GET", path),
            ("POST", f"{path}/ticket"),
            ("POST", f"{path}/messages"),
            ("POST", f"{path}/runs/{run}/stop"),
            ("POST", f"{path}/runs/{run}/calls/{run}-1-0/approval"),
            ("POST", "/v1/conversations"),
        ):
            response = await bare.http.request(method, url, params={"ticket": ticket}, json={"content": "hi"})
            problem(response, 401, "unauthorized")
        for credential in (ticket, f"{ticket}x"):  # not the bearer's either
            headers = {"Authorization": f"Bearer {credential}"}
            problem(await bare.http.get(path, headers=headers), 401, "unauthorized")
            problem(await bare.http.get(f"{path}/events", headers=headers), 401, "unauthorized")


async def test_what_is_no_ticket_is_refused(shared: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bearer token or a key in a URL least of all. A good header does not make up for it."""
    async with Client(shared, hs256()) as bob:
        conversation = await bob.create()
        ours: dict[str, Any] = {"aud": "tapeline:events", "sub": "bob", "conversation": conversation, "until": None}
        ours["exp"] = int(time.time()) + 60
        monkeypatch.setattr(limits, "TICKET_S", -1.0)
        expired, _ = Tickets(SECRET.encode()).issue(Caller("bob"), conversation)
        assert "expired" in problem(await bob.get_events(conversation, ticket=expired), 401, "unauthorized")["detail"]
        for ticket in (
            "",
            "x",
            "é",
            hs256(),
            ANNS,
            hs256(**ours),
            jwt.encode(ours, "f" * 32, "HS256"),
            by_hand(NONE, ours, None),
            "x" * (limits.TOKEN_CHARS_MAX + 1),
        ):
            response = await bob.get_events(conversation, ticket=ticket)
            problem(response, 401, "unauthorized")
            assert len(ticket) < 2 or ticket not in response.text


async def test_a_ticket_for_a_strangers_conversation_is_not_made(shared: str) -> None:
    async with Client(shared, ANNS) as ann, Client(shared, hs256()) as bob:
        hers = await bob.http.post(f"/v1/conversations/{await ann.create()}/ticket")
        nobodys = await bob.http.post("/v1/conversations/unknown/ticket")
        assert problem(hers, 404, "not_found") == problem(nobodys, 404, "not_found")


WATCHING: Final = """
const [edge, token, conversation, run] = process.argv.slice(2);
const freshToken = async () => token;
let tickets = 0;
const plain = fetch;
globalThis.fetch = (...asked) => (tickets++, plain(...asked));
let text = "";
process.on("exit", () => console.log(JSON.stringify({ text, tickets })));
watch(conversation, run, (event) => (text += event.text));
"""


async def test_the_sample_of_the_documentation_shows_a_run_and_comes_to_an_end(shared: str, tmp_path: Path) -> None:
    """It is what people copy; one that asked for tickets for ever would do so in every tab. Node ends when it has."""
    page = (ROOT / "docs" / "api.md").read_text()
    sample = re.findall(r"^```js\n(function watch.*?)^```$", page, re.MULTILINE | re.DOTALL)
    script = tmp_path / "sample.mjs"
    script.write_text("\n".join([*sample, WATCHING]))
    token = hs256()
    async with Client(shared, token) as client:
        conversation, run = await client.ask("long 30")
        process = await asyncio.create_subprocess_exec(
            *(NODE, "--experimental-eventsource", "--no-warnings", script, shared, token, conversation, run),
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(SAMPLE_S):
                printed, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
        received = await client.run(conversation, run)
    said = "".join(json.loads(one.data)["text"] for one in received if one.event == "token")
    assert json.loads(printed) == {"text": said, "tickets": 1}


async def test_a_stream_by_ticket_ends_with_the_token_it_was_made_with(shared: str) -> None:
    token = expiring()
    async with Client(shared, token) as briefly, Client(shared) as bare:
        conversation = await briefly.create()
        ticket = await ticket_of(briefly, conversation)
        async with asyncio.timeout(LIFE_S + SETTLED_S), bare.events(conversation, ticket=ticket) as stream:
            assert types(await stream.rest()) == ["conversation"]
        assert is_over(token)
        problem(await bare.get_events(conversation, ticket=ticket), 401, "unauthorized")


async def test_without_a_secret_there_are_no_tickets_and_it_says_what_to_set(published: str) -> None:
    async with Client(published, es256()) as bob:
        conversation = await bob.create()
        response = await bob.http.post(f"/v1/conversations/{conversation}/ticket")
        assert "TAPELINE_TICKET_SECRET" in problem(response, 501, "tickets_off")["detail"]
        problem(await bob.get_events(conversation, ticket="x"), 401, "unauthorized")


async def test_a_ticket_does_not_let_a_page_of_another_name_in(stack: Stack) -> None:
    async with Client(stack.url) as client:
        conversation = await client.create()
        ticket = await ticket_of(client, conversation)
        path = f"/v1/conversations/{conversation}/events"
        response = await client.http.get(path, params={"ticket": ticket}, headers={"Host": "evil.example"})
        problem(response, 403, "host_refused")


# Pages of other origins


FETCHES: Final = [{}, {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}]


@pytest.mark.parametrize("site", FETCHES, ids=str)
async def test_a_page_of_an_allowed_origin_may_ask(site: dict[str, str], shared: str) -> None:
    headers = {"Origin": ORIGIN, **site}
    async with Client(shared, hs256()) as bob:
        for method in ("GET", "POST", "PATCH", "DELETE"):
            asks = {
                **headers,
                "Access-Control-Request-Method": method,
                "Access-Control-Request-Headers": "authorization,content-type,idempotency-key,last-event-id",
            }
            response = await bob.http.options("/v1/conversations/c/messages", headers=asks)
            assert response.status_code == 200
            assert response.headers["access-control-allow-origin"] == ORIGIN
            assert "access-control-allow-credentials" not in response.headers
        response = await bob.http.post("/v1/conversations", json={}, headers=headers)
        assert response.status_code == 201
        exposed = response.headers["access-control-expose-headers"]
        assert {name.strip() for name in exposed.split(",")} == {"Date", "ETag", "Location", "Retry-After"}
        for url in (response.json()["url"], "/v1/conversations/unknown"):
            response = await bob.http.get(url, headers=headers)
            assert response.headers["access-control-allow-origin"] == ORIGIN
            assert "origin" in response.headers["vary"].lower()


STRANGERS: Final = [
    "https://evil.example",
    "http://chat.example:8443",
    "https://chat.example",
    "https://chat.example:8443.evil.example",
    "https://CHAT.example:8443",
    "null",
    "",
    "*",
]


@pytest.mark.parametrize("origin", STRANGERS)
async def test_a_page_of_another_origin_may_not(origin: str, shared: str) -> None:
    headers = {"Origin": origin}
    async with Client(shared, hs256()) as bob:
        asks = {**headers, "Access-Control-Request-Method": "POST"}
        response = await bob.http.options("/v1/conversations", headers=asks)
        assert response.status_code == 400
        assert "access-control-allow-origin" not in response.headers
        for site in FETCHES[1:]:
            response = await bob.http.post("/v1/conversations", json={}, headers={**headers, **site})
            problem(response, 403, "cross_site")
            assert "access-control-allow-origin" not in response.headers
        response = await bob.http.get("/v1/conversations/unknown", headers=headers)
        assert "access-control-allow-origin" not in response.headers


async def test_where_no_origin_is_allowed_none_is(stack: Stack) -> None:
    async with Client(stack.url) as client:
        for headers in ({"Origin": ORIGIN}, {"Origin": "null"}, {}):
            response = await client.http.post("/v1/conversations", json={}, headers={**headers, **FETCHES[2]})
            problem(response, 403, "cross_site")
            asks = {**headers, "Access-Control-Request-Method": "POST"}
            assert (await client.http.options("/v1/conversations", headers=asks)).status_code == 405


# A stranger's conversation looks like none

LONG: Final = 5_000  # facts in it
PAIRS: Final = 300


async def long_conversation(stack: Stack, conversation: str) -> None:
    """Many facts, which cost a reader much more time than the owner's name."""
    tape = await Tape.open(stack.nats.url, "test")
    try:
        last = await tape.last(conversation)
        for number in range(LONG):
            message = events.Message(run=f"r{number}", ts=number, content="x" * 500, by="ann")
            last = await tape.append(conversation, Entry(subjects.MODEL, events.encode(message)), last)
    finally:
        await tape.close()


def told_apart(some: list[float], others: list[float]) -> float:
    """How often the best guess by time is right, for the threshold that suits these very samples best: 0.5 is chance.

    It looks at ranks alone, so one slow answer, or a hundred, count no more than others.
    """

    def share(times: list[float], most: float) -> float:
        return sum(one <= most for one in times) / len(times)

    return 0.5 + max(abs(share(some, at) - share(others, at)) for at in some + others) / 2


CALLS: Final[list[tuple[str, str, Any]]] = [
    ("GET", "", None),
    ("GET", "/events", None),
    ("POST", "/messages", {"content": "hi"}),
    ("POST", "/runs/r/stop", None),
    ("POST", "/runs/r/calls/c/approval", {"approved": True}),
    ("POST", "/ticket", None),
]


async def test_time_does_not_tell_a_strangers_conversation_from_none(stack: Stack, shared: str) -> None:
    """In each pair the order is drawn by lot. So, if time tells nothing, the two samples are exchangeable whatever else
    this machine does meanwhile, and with 300 of each a guess that is right in 65 % has a probability below 1e-10 (of
    Kolmogorov and Smirnov: 2·exp(-300·0.3²)). Without the owner's check it was right in 90 %.
    """
    seed = int(os.environ.get("TAPELINE_TEST_SEED", "0")) or random.randrange(1 << 32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    async with Client(shared, ANNS) as ann, Client(shared, hs256()) as bob:
        hers, nobodys = await ann.create(system="x" * 50_000), "f" * 24
        await long_conversation(stack, hers)
        began = time.perf_counter()
        assert (await ann.http.get(f"/v1/conversations/{hers}/events?run=r")).status_code == 404
        print(f"with its owner's key it takes {(time.perf_counter() - began) * 1e3:.0f} ms")
        times: dict[str, list[float]] = {hers: [], nobodys: []}
        answers: dict[str, set[tuple[bytes, str]]] = {hers: set(), nobodys: set()}
        for number in range(PAIRS + 5):
            method, path, body = CALLS[number % len(CALLS)]
            for conversation in draw.sample([hers, nobodys], 2):
                began = time.perf_counter()
                response = await bob.http.request(method, f"/v1/conversations/{conversation}{path}", json=body)
                if number >= 5:  # the first warm things up
                    times[conversation].append(time.perf_counter() - began)
                problem(response, 404, "not_found")
                headers = {name: value for name, value in response.headers.items() if name != "date"}
                answers[conversation].add((response.content, str(sorted(headers.items()))))
    assert answers[hers] == answers[nobodys]
    assert len(answers[hers]) == 1
    right = told_apart(times[hers], times[nobodys])
    medians = [statistics.median(one) * 1e3 for one in times.values()]
    print(f"medians {medians[0]:.2f} and {medians[1]:.2f} ms; told apart in {right:.0%}")
    assert right < 0.65, f"seed {seed}: medians {medians} ms"
    assert min(times[hers] + times[nobodys]) >= limits.NOT_FOUND_GRID_S


# In a browser


async def test_a_page_of_an_allowed_origin_streams_with_a_plain_event_source(stack: Stack, provider: Provider) -> None:
    """The page comes from another port, so from another origin; another edge does not allow it."""
    provider.body = b"<!doctype html><title>elsewhere</title>"
    provider.headers["Content-Type"] = "text/html"
    origin = provider.url.removesuffix("/keys")
    env = {**TOKENS, "TAPELINE_JWT_SECRET": SECRET}
    allows = stack.add_edge({**env, "TAPELINE_CORS_ORIGINS": f"https://unused.example,{origin}"})
    refuses = stack.add_edge(env)
    script = """async ([edge, token, content]) => {
        const headers = { Authorization: `Bearer ${token}`, "Content-Type": "application/json" };
        const ask = async (path, body = {}, more = {}) => {
            const response = await fetch(edge + path, {
                method: "POST", headers: { ...headers, ...more }, body: JSON.stringify(body),
            });
            if (!response.ok) throw new Error(await response.text());
            return response;
        };
        const { url } = await (await ask("/v1/conversations")).json();
        const { run } = await (await ask(`${url}/messages`, { content }, { "Idempotency-Key": "one" })).json();
        const { events_url } = await (await ask(`${url}/ticket`)).json();
        const seen = await new Promise((resolve, reject) => {
            const source = new EventSource(`${edge}${events_url}&run=${run}`);
            const ids = [], at = [];
            for (const type of ["message", "step", "thinking", "token", "answer", "done"]) {
                source.addEventListener(type, (event) => {
                    ids.push(Number(event.lastEventId));
                    at.push(performance.now());
                    if (type === "done") resolve({ ids, ms: at.at(-1) - at[0] });
                });
            }
            source.onerror = () => source.readyState === EventSource.CLOSED && reject(new Error("refused"));
        });
        const again = await fetch(`${edge}${url}/events?run=${run}`, {
            headers: { ...headers, "Last-Event-ID": String(seen.ids[1]) },
        });
        return { ...seen, again: (await again.text()).match(/^id: \\d+$/gm).length };
    }"""
    path = chromium()
    try:
        async with async_playwright() as playwright:
            browser = await playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
            page = await browser.new_page()
            await page.goto(provider.url)
            seen = await page.evaluate(script, [stack.edge_url(allows), hs256(), "long 200"])
            with pytest.raises(PlaywrightError, match="Failed to fetch"):
                await page.evaluate(script, [stack.edge_url(refuses), hs256(), "long 200"])
            with pytest.raises(PlaywrightError, match="unauthorized"):
                await page.evaluate(script, [stack.edge_url(allows), hs256("f" * 32), "long 200"])
            await browser.close()
    finally:
        stack.kill_edge(allows)
        stack.kill_edge(refuses)
    assert len(seen["ids"]) > 100
    assert seen["ids"] == sorted(set(seen["ids"]))
    assert seen["ms"] > 200, "it came at once, so it was not streamed"
    assert seen["again"] == len(seen["ids"]) - 2


async def test_the_page_takes_a_token_for_a_key(shared: str) -> None:
    path = chromium()
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        page = await browser.new_page()
        await page.goto(shared)
        await page.get_by_role("textbox", name="Key").fill(hs256())
        await page.keyboard.press("Enter")
        await page.get_by_label("Message").fill("long 5")
        await page.keyboard.press("Enter")
        await expect(page.locator(".timings:visible")).to_have_count(1, timeout=ANSWER_MS)
        await browser.close()
