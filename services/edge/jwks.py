"""An identity provider's public keys (RFC 7517): fetched, kept, and asked for again when a token names an unknown one.

However many unknown keys are named, there is one fetch in `JWKS_AGAIN_S`. While the provider is away, or answers
nonsense, its last good set stays.
"""

import asyncio
import json
import logging
import math
import time
from typing import Any, Final
from urllib.parse import urlsplit

import jwt
from tapeline import limits
from tapeline.connection import reason
from tapeline.settings import ConfigError

from .host import is_loopback
from .problem import Problem

log = logging.getLogger(__name__)

ALGORITHMS: Final = {("RSA", None): "RS256", ("EC", "P-256"): "ES256"}
"""By a key's type and curve. What a key is decides how it is used; a token only names the key."""

Keys = dict[tuple[str | None, str], Any]  # what `cryptography` makes of a key, by its `kid` and algorithm


class KeySet:
    """The keys at one URL."""

    def __init__(self, url: str) -> None:
        """Raises `ConfigError` where anyone on the way could put in keys of his own, or there is no such place."""
        try:
            parts = urlsplit(url)
            is_place = bool(parts.hostname) and parts.port != 0  # which raises where it is no port at all
            is_private = parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or ""))
        except ValueError:
            is_place = is_private = False
        if not is_place or not is_private:
            raise ConfigError("TAPELINE_JWKS_URL must be an https:// address; http:// only on this machine")
        self._url = url
        self._keys: Keys = {}
        self._asked_at = -math.inf
        self._turn = asyncio.Lock()

    async def keep(self) -> None:
        """Fetches the set again and again, for ever: a key that was withdrawn is soon refused."""
        while True:
            await self._refresh()
            await asyncio.sleep(limits.JWKS_REFRESH_S)

    async def key(self, kid: str | None, algorithm: str) -> Any:
        """The key of that name for that algorithm; None where the provider has none.

        Raises `Problem` 503 where it has never been heard of: the token may be good.
        """
        if self._find(kid, algorithm) is None:
            await self._refresh()
        if not self._keys:
            detail = "The keys of the identity provider cannot be had right now."
            raise Problem(503, "unavailable", detail, {"Retry-After": str(math.ceil(limits.JWKS_AGAIN_S))})
        return self._find(kid, algorithm)

    def _find(self, kid: str | None, algorithm: str) -> Any:
        if kid is not None:
            return self._keys.get((kid, algorithm))
        fitting = [key for (_, other), key in self._keys.items() if other == algorithm]
        return fitting[0] if len(fitting) == 1 else None

    async def _refresh(self) -> None:
        """Fetches the set, unless that was done just now; who asks meanwhile waits for it."""
        async with self._turn:
            if time.monotonic() - self._asked_at < limits.JWKS_AGAIN_S:
                return
            try:
                self._keys = parse(await self._fetch())
            except (OSError, TimeoutError, ValueError) as error:
                log.warning("the keys of the identity provider could not be fetched: %s", reason(error))
            except Exception:  # `keep` goes on for as long as the edge does
                log.exception("the keys of the identity provider could not be fetched")
            self._asked_at = time.monotonic()

    async def _fetch(self) -> bytes:
        """Raises `ValueError` where the answer is no set, `OSError` and `TimeoutError` where none comes."""
        import httpx2  # a sixth of an edge's start, and most edges trust no provider

        body = b""
        try:
            async with (
                asyncio.timeout(limits.JWKS_TIMEOUT_S),  # all of it: httpx2's own is for each read
                httpx2.AsyncClient(timeout=limits.JWKS_TIMEOUT_S) as client,
                client.stream("GET", self._url, headers={"Accept-Encoding": "identity"}) as response,
            ):
                if response.status_code != 200:  # a redirection too: it could leave https
                    raise ValueError(f"status {response.status_code}")
                async for chunk in response.aiter_raw():
                    body += chunk
                    if len(body) > limits.JWKS_BYTES_MAX:
                        raise ValueError(f"more than {limits.JWKS_BYTES_MAX} bytes")
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise OSError(reason(error)) from error
        return body


def parse(body: bytes) -> Keys:
    """The usable keys of a set; the others are passed over. Raises `ValueError` where there are none."""
    try:
        entries = json.loads(body)["keys"]
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError("not a key set") from error
    keys = dict(filter(None, map(_usable, entries if isinstance(entries, list) else [])))
    if not keys:
        raise ValueError("no usable key in the set")
    return keys


def _usable(entry: object) -> tuple[tuple[str | None, str], Any] | None:
    if not isinstance(entry, dict) or "d" in entry:  # a private key in public is nobody's any more
        return None
    kid = entry.get("kid")
    try:
        algorithm = ALGORITHMS.get((entry.get("kty", ""), entry.get("crv")))
        if not algorithm or entry.get("alg", algorithm) != algorithm or entry.get("use", "sig") != "sig":
            return None
        key = jwt.PyJWK(entry, algorithm).key
    except (jwt.PyJWTError, TypeError, ValueError):
        return None
    if not isinstance(kid, str | None) or (algorithm == "RS256" and key.key_size < limits.RSA_BITS_MIN):
        return None
    return (kid, algorithm), key
