"""The HTTP server: uvicorn, its settings, who looks after its connections, and how it ends."""

import asyncio
import functools
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from tapeline import limits

from .refusal import Refusals


class Server(uvicorn.Server):
    """Uvicorn waits for open responses when it is asked to end, so these are told first, by `drain`.

    Only what `proxies` say of a client's address is believed.
    """

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        port: int,
        proxies: Sequence[str],
        refusals: Refusals,
        drain: Callable[[], None],
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                http=_protocol(refusals),
                ws="none",
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

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Until it has been told to end, and has."""
        looking = asyncio.create_task(self._look())
        try:
            await super().serve(sockets)
        finally:
            looking.cancel()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's; what a reader has not taken waits here rather than in the kernel, which says nothing of it."""
        await super().startup(sockets)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            for listener in (listener for server in self.servers for listener in server.sockets):
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, limits.UNSENT_BYTES)

    def handle_exit(self, sig: int, _: FrameType | None) -> None:
        """Not ready, no new stream, and the open ones end. A second Ctrl-C does not wait for that.

        Uvicorn's own would raise the signal again in the end, which kills the process before it has cleaned up.
        """
        self._loop.call_soon_threadsafe(self._go)
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    def _go(self) -> None:
        self._drain()
        self._loop.call_later(limits.DRAIN_JITTER_S + limits.DRAIN_END_S, self._cut)

    def _cut(self) -> None:
        """Whoever has not taken all by now would keep this process until it is killed."""
        for connection in self._connections():
            if connection.owes:
                connection.cut("slow")

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(limits.WRITE_TICK_S)
            for connection in self._connections():
                connection.look(self._loop.time())

    def _connections(self) -> list[Any]:
        return [one for one in self.server_state.connections if hasattr(one, "look")]  # uvicorn's own have none


def _protocol(refusals: Refusals) -> Any:
    """What makes a protocol for each connection."""
    if sys.platform == "win32":
        return "h11"  # there is no httptools; it bounds what it takes by itself, but not the time
    from .intake import Intake

    return functools.partial(Intake, refusals=refusals)
