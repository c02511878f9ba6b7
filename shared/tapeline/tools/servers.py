"""The file that names MCP servers, `{"mcpServers": {name: …}}` as every MCP client has it, and what we add to it.

Pure but for the one read; needs no MCP library. Whatever is wrong is a `ConfigError` that says where.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import msgspec

from tapeline import limits
from tapeline.settings import ConfigError

_VARIABLE: Final = re.compile(r"\$\{([^}]*)\}?")
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

T = TypeVar("T")


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One server, and how its tools are offered."""

    type: Literal["stdio", "http", "streamable-http"] | None = None
    """What other clients want to be told; here `command` or `url` says it."""
    command: str | None = None
    """The program that speaks MCP on its standard input and output."""
    args: list[str] = []
    env: dict[str, str] = {}
    """Beside the few variables that every server gets; nothing else of our environment reaches it."""
    cwd: str | None = None
    url: str | None = None
    """Where a server speaks streamable HTTP."""
    headers: dict[str, str] = {}
    prefix: str | None = None
    """Goes before each tool's name; by default the server's name and `_`."""
    timeout_s: float = limits.TOOL_TIMEOUT_S_DEFAULT
    """Of each call."""
    tools: list[str] | None = None
    """Of the server's tools only these. This and the lists below have the names that the server gives them."""
    needs_approval: bool | list[str] = False
    """Each call of these tools, or of all, must be approved by a person."""
    idempotent: bool | list[str] | None = None
    """These tools, or all, may be run again after a crash; by default those whose annotations say so."""
    max_concurrency: int = limits.TOOL_CALLS_PER_WORKER
    """Calls of each tool at a time."""


def load(path: str, environ: Mapping[str, str]) -> dict[str, ServerConfig]:
    """The servers in a file, by name, in its order. Raises `ConfigError`."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    return parse(data, path, environ)


def parse(data: bytes, path: str, environ: Mapping[str, str]) -> dict[str, ServerConfig]:
    """The same of what such a file says."""
    try:
        named = _File.decode(data).mcpServers
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not named:
        raise ConfigError(f"{path} names no servers in mcpServers")
    return {name: _server(f"{path}: server {name!r}", name, known, environ) for name, known in named.items()}


class _Named(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    mcpServers: dict[str, dict[str, Any]]  # noqa: N815 - everybody's name for it


_File: Final = msgspec.json.Decoder(_Named)


def _server(where: str, name: str, known: dict[str, Any], environ: Mapping[str, str]) -> ServerConfig:
    try:
        config = msgspec.convert(_filled(known, where, environ), ServerConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from error
    if (config.command is None) == (config.url is None):
        raise ConfigError(f"{where} needs either a command or a url")
    if config.command is None and (config.args or config.env or config.cwd):
        raise ConfigError(f"{where} has a url, so args, env and cwd mean nothing")
    if config.url is None and config.headers:
        raise ConfigError(f"{where} has a command, so headers mean nothing")
    if config.type and (config.type == "stdio") != (config.url is None):
        raise ConfigError(f"{where} is of type {config.type}, which has a {'command' if config.url else 'url'}")
    if config.url is not None and not config.url.startswith(("http://", "https://")):
        raise ConfigError(f"{where}: its url must begin with http:// or https://")
    if not 0 < config.timeout_s <= limits.TOOL_TIMEOUT_S_MAX:
        raise ConfigError(f"{where}: timeout_s is {config.timeout_s:g}, not within {limits.TOOL_TIMEOUT_S_MAX:.0f} s")
    if config.max_concurrency < 1:
        raise ConfigError(f"{where}: max_concurrency is {config.max_concurrency}, and 1 is the least")
    return config if config.prefix is not None else msgspec.structs.replace(config, prefix=f"{name}_")


def _filled(value: T, where: str, environ: Mapping[str, str]) -> T:
    """`value` with `${NAME}` in its strings taken from the environment, so that secrets stay out of the file."""

    def variable(found: re.Match[str]) -> str:
        name = found[1]
        if not _NAME.fullmatch(name) or not found[0].endswith("}"):
            raise ConfigError(f"{where}: {found[0]!r} is not of the form ${{NAME}}")
        if name not in environ:
            raise ConfigError(f"{where}: {name} is not set in the environment")
        return environ[name]

    filled: Any = value
    if isinstance(value, str):
        filled = _VARIABLE.sub(variable, value)
    elif isinstance(value, list):
        filled = [_filled(one, where, environ) for one in value]
    elif isinstance(value, dict):
        filled = {key: _filled(one, where, environ) for key, one in value.items()}
    result: T = filled
    return result
