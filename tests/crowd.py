"""Many readers at once, each as cheap as Python can make it, who keep count of every event they are given.

They speak HTTP over bare sockets: a thousand of a real client's would measure the client.
"""

import asyncio
import contextlib
import os
import re
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, cast

from tests.stack import until

PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")

OPENING: Final = 100  # connections at a time: more would overflow a listener's queue
OPEN_S: Final = 60.0
AGAIN_S: Final = 0.05
# A whole event. Whatever else the bytes hold (the size of a chunk, a comment) is never inside one.
EVENT: Final = re.compile(rb"id: (\d+)\nevent: [^\n]+\ndata: [^\n]*\n\n")
HELD_MAX: Final = 1 << 20


class Reader(asyncio.Protocol):
    """One reader of one conversation. It comes back with its cursor for as long as it is told where to."""

    def __init__(self, path: str, receive_bytes: int | None = None) -> None:
        self.path = path
        self.receive_bytes = receive_bytes
        """Of the socket's buffer; None: the kernel's own idea."""
        self.ids: list[int] = []
        self.lost = asyncio.Event()
        self.open: asyncio.Future[None]
        self._transport: asyncio.Transport | None = None
        self._held = b""

    async def connect(self, port: int) -> None:
        """Opens the stream, after the last event it has; returns when its first bytes are there. Raises `OSError`."""
        loop = asyncio.get_running_loop()
        self.lost.clear()
        self.open = loop.create_future()
        self._held = b""
        with contextlib.ExitStack() as unless_connected:
            one = unless_connected.enter_context(socket.socket())
            if self.receive_bytes:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.receive_bytes)
            one.setblocking(False)
            await loop.sock_connect(one, ("127.0.0.1", port))
            await loop.create_connection(lambda: self, sock=one)
            unless_connected.pop_all()
        await self.open

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Asks."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own is no subclass of it
        headers = ["Host: 127.0.0.1", "Accept: text/event-stream"]
        if self.ids:
            headers.append(f"Last-Event-ID: {self.ids[-1]}")
        self._transport.write("\r\n".join([f"GET {self.path} HTTP/1.1", *headers, "", ""]).encode())

    def data_received(self, data: bytes) -> None:
        """Takes what is whole."""
        if not self.open.done():
            if data.startswith(b"HTTP/1.1 200"):
                self.open.set_result(None)
            else:
                self.open.set_exception(ConnectionError(data[:500].decode()))
        self._held += data
        end = 0
        for event in EVENT.finditer(self._held):
            self.ids.append(int(event[1]))
            end = event.end()
        self._held = self._held[end:]
        assert len(self._held) < HELD_MAX, "no event for a megabyte"

    def connection_lost(self, error: Exception | None) -> None:
        """Whoever waits is told."""
        if not self.open.done():
            self.open.set_exception(error or ConnectionError("closed before it began"))
        self.lost.set()

    def pause(self) -> None:
        """Stops reading, as a phone in a tunnel does."""
        assert self._transport is not None
        self._transport.pause_reading()

    def resume(self) -> None:
        """Reads on."""
        assert self._transport is not None
        self._transport.resume_reading()

    def close(self) -> None:
        """Leaves."""
        if self._transport is not None:
            self._transport.close()


async def come(readers: Sequence[Reader], port: int) -> None:
    """Opens all their streams, some at a time; returns when the last has its first bytes."""
    turn = asyncio.Semaphore(OPENING)

    async def one(reader: Reader) -> None:
        async with turn:
            while True:
                try:
                    await reader.connect(port)
                except OSError:
                    await asyncio.sleep(AGAIN_S)
                else:
                    return

    async with asyncio.timeout(OPEN_S):
        await asyncio.gather(*(one(reader) for reader in readers))


@asynccontextmanager
async def crowd(port: int, paths: Sequence[str]) -> AsyncIterator[list[Reader]]:
    """A reader of each path, all there; they leave in the end."""
    readers = [Reader(path) for path in paths]
    try:
        await come(readers, port)
        yield readers
    finally:
        for reader in readers:
            reader.close()


async def reached(readers: Sequence[Reader], last: int, within_s: float) -> None:
    """Returns when all have the event `last`."""
    await until(f"event {last}", lambda: all(reader.ids and reader.ids[-1] >= last for reader in readers), within_s)


def kib(pid: int) -> float:
    """What a process has in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES / 1024


def files(pid: int) -> int:
    """How many files and sockets a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))
