"""Who is asking. Static keys for now; without any, everyone is `local`, and only this machine can ask."""

import hmac
import ipaddress
import re
from collections.abc import Mapping
from typing import Final

from starlette.requests import Request
from tapeline.settings import ConfigError, Settings

from .problem import Problem

KEYS: Final = "TAPELINE_API_KEYS"
LOCAL: Final = "local"

_HOST: Final = re.compile(r"(?P<name>[^:\[\]]+|\[[^\[\]]+\])(:[0-9]*)?")


class Auth:
    """Names the user of a request by its bearer key."""

    def __init__(self, keys: Mapping[str, str]) -> None:
        self._keys = [(user, key.encode()) for user, key in keys.items()]

    @classmethod
    def configured(cls, settings: Settings) -> "Auth":
        """From `TAPELINE_API_KEYS` (`user=key,user2=key2`). Raises `ConfigError`; never shows a key."""
        keys: dict[str, str] = {}
        for pair in filter(None, (pair.strip() for pair in settings.text(KEYS).split(","))):
            user, _, key = pair.partition("=")
            if not user or len(key) < 8 or user in keys:
                raise ConfigError(f"{KEYS} must be user=key,user2=key2 with distinct users and keys of 8 characters up")
            keys[user] = key
        return cls(keys)

    @property
    def open(self) -> bool:
        """Nobody is asked for a key."""
        return not self._keys

    def user(self, request: Request) -> str:
        """Who is asking. Raises `Problem` 401, and 403 where a foreign web page would use a browser to ask."""
        if self.open:
            if not is_loopback(_host(request)):
                raise Problem(403, "host_refused", "Without keys this edge answers to localhost only.")
            return LOCAL
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            key = given.strip().encode()
            for user, known in self._keys:
                if hmac.compare_digest(key, known):
                    return user
        headers = {"WWW-Authenticate": 'Bearer realm="tapeline"'}
        raise Problem(401, "unauthorized", "Send `Authorization: Bearer <key>` with a key of this deployment.", headers)


def _host(request: Request) -> str:
    """The name this edge was called by; empty where that makes no sense, for which Starlette would put our own."""
    match = _HOST.fullmatch(request.headers.get("host", ""))
    return match["name"].lower() if match else ""


def is_loopback(host: str) -> bool:
    """Whether only this machine can be meant by `host`, a name or an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
