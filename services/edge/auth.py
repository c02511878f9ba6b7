"""Who is asking: by a static key, or by a token (JWT) of an identity provider. Without either, everyone is `local`, and
only this machine can ask.
"""

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from starlette.requests import Request
from tapeline import limits
from tapeline.settings import ConfigError, Settings

from . import host
from .problem import Problem

if TYPE_CHECKING:
    from .bearer import Tokens

KEYS: Final = "TAPELINE_API_KEYS"
SECRET: Final = "TAPELINE_JWT_SECRET"
JWKS_URL: Final = "TAPELINE_JWKS_URL"
AUDIENCE: Final = "TAPELINE_JWT_AUDIENCE"
ISSUER: Final = "TAPELINE_JWT_ISSUER"
LOCAL: Final = "local"

_CHALLENGE: Final = 'Bearer realm="tapeline"'


@dataclass(frozen=True)
class Caller:
    """Who is asking, and until when (seconds since the epoch) that is known; None: for as long as the key is there."""

    user: str
    expires_at: float | None = None


class Auth:
    """Names the caller of a request by what its `Authorization` bears."""

    def __init__(self, keys: Mapping[str, str], tokens: "Tokens | None" = None) -> None:
        self._keys = [(user, key.encode()) for user, key in keys.items()]
        self._tokens = tokens

    @classmethod
    def configured(cls, settings: Settings) -> "Auth":
        """From `TAPELINE_API_KEYS` and `TAPELINE_JWT_…`. Raises `ConfigError`; never shows a key."""
        return cls(static_keys(settings), _tokens(settings))

    @property
    def open(self) -> bool:
        """Nobody is asked for a key."""
        return not self._keys and self._tokens is None

    async def keep(self) -> None:
        """Keeps what tokens are checked with up to date, for ever."""
        if self._tokens is not None:
            await self._tokens.keep()

    def check_host(self, request: Request) -> None:
        """Raises `Problem` 403 where a page whose name was made to mean this machine uses a browser to ask."""
        if self.open and not host.is_loopback(host.called(request)):
            raise Problem(403, "host_refused", "Without keys this edge answers to localhost only.")

    async def caller(self, request: Request) -> Caller:
        """Who is asking. Raises `Problem` 401, 403 and 503."""
        self.check_host(request)
        if self.open:
            return Caller(LOCAL)
        match request.headers.getlist("authorization"):
            case [one]:
                scheme, _, given = one.partition(" ")
            case _:  # of two, a proxy may have looked at the other
                scheme = given = ""
        if scheme.lower() != "bearer" or not (given := given.strip()):
            detail = "Send one `Authorization: Bearer <key>` with a key or a token of this deployment."
            raise Problem(401, "unauthorized", detail, {"WWW-Authenticate": _CHALLENGE})
        for user, key in self._keys:
            if hmac.compare_digest(given.encode(), key):
                return Caller(user)
        if self._tokens is None:
            raise refused("This is not a key of this deployment.")
        return await self._tokens.caller(given)


def refused(detail: str) -> Problem:
    """What was given is no proof of anything."""
    return Problem(401, "unauthorized", detail, {"WWW-Authenticate": f'{_CHALLENGE}, error="invalid_token"'})


def static_keys(settings: Settings) -> dict[str, str]:
    """Users' keys, from `TAPELINE_API_KEYS` (`user=key,user2=key2`). Raises `ConfigError`."""
    keys: dict[str, str] = {}
    for pair in settings.several(KEYS):
        user, _, key = pair.partition("=")
        if not user or len(key) < 8 or user in keys:
            raise ConfigError(f"{KEYS} must be user=key,user2=key2 with distinct users and keys of 8 characters up")
        keys[user] = key
    return keys


def secret(settings: Settings, name: str) -> bytes:
    """A secret that signs; empty where none is set. Raises `ConfigError`."""
    value = settings.text(name).encode()
    if value and len(value) < limits.SECRET_BYTES_MIN:
        raise ConfigError(f"{name} must have {limits.SECRET_BYTES_MIN} bytes or more; `openssl rand -hex 32` makes one")
    return value


def _tokens(settings: Settings) -> "Tokens | None":
    shared, url = secret(settings, SECRET), settings.text(JWKS_URL)
    audience, issuer = settings.text(AUDIENCE), settings.text(ISSUER)
    if shared and url:
        raise ConfigError(f"{SECRET} and {JWKS_URL} are both set; tokens are checked with one of them")
    if not shared and not url:
        if audience or issuer:
            raise ConfigError(f"{AUDIENCE} and {ISSUER} mean nothing without {SECRET} or {JWKS_URL}")
        return None
    if not audience:
        raise ConfigError(f"{AUDIENCE} is not set; without it a token made for another service would do here")
    from .bearer import Tokens  # a third of an edge's start, and many take keys only

    return Tokens.configured(shared, url, audience, issuer)
