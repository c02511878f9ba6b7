"""Hosts and origins: which are this machine, which other sites' pages may use this edge, and whose word on a client's
address it takes.
"""

import ipaddress
import re
from typing import Final

from starlette.requests import Request
from tapeline.settings import ConfigError, Settings

ORIGINS: Final = "TAPELINE_CORS_ORIGINS"
PROXIES: Final = "TAPELINE_PROXIES"

_HOST: Final = re.compile(r"(?P<name>[^:\[\]]+|\[[^\[\]]+\])(:[0-9]*)?")
_ORIGIN: Final = re.compile(r"(?!https:.*:443$|http:.*:80$)https?://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")
"""In lower case and without the scheme's own port: as browsers send it, since it is compared as it is."""


def called(request: Request) -> str:
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


def allowed_origins(settings: Settings) -> list[str]:
    """From `TAPELINE_CORS_ORIGINS`: whose pages may use this edge, each as a browser names it. Raises `ConfigError`."""
    listed = settings.several(ORIGINS)
    for origin in listed:
        if not _ORIGIN.fullmatch(origin):
            raise ConfigError(f"{ORIGINS} has {origin!r}; name each origin, as in https://chat.example.com")
    return listed


def proxies(settings: Settings) -> list[str]:
    """From `TAPELINE_PROXIES`: the addresses and networks whose `X-Forwarded-For` is believed. None where it is not
    set, not even this machine: any program here could claim to ask for another. Raises `ConfigError`.
    """
    listed = settings.several(PROXIES)
    for one in listed:
        try:
            ipaddress.ip_network(one)
        except ValueError as error:
            raise ConfigError(
                f"{PROXIES} has {one!r}; name addresses and networks, as in 10.0.0.1,10.1.0.0/16"
            ) from error
    return listed
