"""The HTTP server: uvicorn, its settings, and how it ends."""

import asyncio
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType

import uvicorn
from starlette.types import ASGIApp
from tapeline import limits


class Server(uvicorn.Server):
    """Uvicorn waits for open responses when it is asked to end, so these are told first, by `drain`.

    Only what `proxies` say of a client's address is believed.
    """

    def __init__(self, app: ASGIApp, host: str, port: int, proxies: Sequence[str], drain: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                http=_protocol(),
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=bool(proxies),
                forwarded_allow_ips=list(proxies),
                timeout_keep_alive=75,
                timeout_graceful_shutdown=int(limits.DRAIN_S),
            )
        )
        self._loop = asyncio.get_running_loop()
        self._drain = drain

    def handle_exit(self, sig: int, _: FrameType | None) -> None:
        """Not ready, no new stream, and the open ones end. A second Ctrl-C does not wait for that.

        Uvicorn's own would raise the signal again in the end, which kills the process before it has cleaned up.
        """
        self._loop.call_soon_threadsafe(self._drain)
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def _protocol() -> type[asyncio.Protocol] | str:
    if sys.platform == "win32":
        return "h11"  # there is no httptools; it bounds what it takes by itself, but not the time
    from .intake import Intake

    return Intake
