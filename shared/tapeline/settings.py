"""Settings from the environment, and how a service's process begins and ends.

A setting that is missing or wrong, or a part that cannot be reached, is one clear line and exit code 78
(`EX_CONFIG`), never a traceback: whoever started the process should mend it rather than start it again.
"""

import asyncio
import importlib.util
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from .connection import Refused, Unavailable, servers

EX_CONFIG: Final = 78
EX_SOFTWARE: Final = 70
NATS_URL: Final = "TAPELINE_NATS_URL"


class ConfigError(Exception):
    """The environment asks for what cannot be. The message says what to do."""


class Broken(Exception):
    """This process cannot go on, and a fresh one can. The message says why."""


class Settings:
    """`TAPELINE_*` variables, read when asked for."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ

    @property
    def nats_url(self) -> str:
        url = self.text(NATS_URL)
        if not servers(url):
            raise ConfigError(
                f"{NATS_URL} is not set; `scripts/up` starts a NATS of its own, a single service needs to be told"
            )
        return url

    def text(self, name: str, default: str = "") -> str:
        return self.environ.get(name, "").strip() or default

    def several(self, name: str) -> list[str]:
        """What is listed, separated by commas."""
        return [one.strip() for one in self.text(name).split(",") if one.strip()]

    def number(self, name: str, default: int, *, least: int, most: int | None = None) -> int:
        """A whole number within bounds. Raises `ConfigError`."""
        text = self.text(name)
        if not text:
            return default
        if not text.isascii() or not text.isdigit() or int(text) < least or (most is not None and int(text) > most):
            upto = f" to {most}" if most is not None else " or more"
            raise ConfigError(f"{name} is {text!r}; it must be a whole number, {least}{upto}")
        return int(text)


def run(service: str, main: Callable[[Settings], Awaitable[None]]) -> None:
    """Runs a service to its end. Exits with 78 and one line on a configuration error, with 70 where `Broken`."""
    environment = Settings(os.environ)

    async def started() -> None:
        await main(environment)

    try:
        _log(environment.text("TAPELINE_LOG", "INFO").upper())
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(started())
    except (ConfigError, Refused, Unavailable) as error:
        print(f"{service}: {error}", file=sys.stderr)
        sys.exit(EX_CONFIG)
    except Broken as error:
        print(f"{service}: {error}", file=sys.stderr)
        sys.exit(EX_SOFTWARE)
    except KeyboardInterrupt:
        sys.exit(130)


def _log(level: str) -> None:
    levels = logging.getLevelNamesMapping()
    if level not in levels:
        raise ConfigError(f"TAPELINE_LOG is {level!r}; it must be one of {', '.join(levels)}")
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("nats").setLevel(logging.WARNING)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it is installed: every token costs several turns of the loop. Else Python's own."""
    if importlib.util.find_spec("uvloop") is None:
        return None
    import uvloop

    return uvloop.new_event_loop
