"""A TCP line to a server that can be held, or cut and mended, or cuts each connection by itself."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final

from tapeline import limits

_RETRY: Final = b"retry: %d\n" % limits.RETRY_MS
_AT_ONCE: Final = b"retry: %0*d\n" % (len(str(limits.RETRY_MS)), 1)  # as long as the other


class Line:
    """Between a client and the server at `port`."""

    url: str

    def __init__(self, port: int) -> None:
        self.connections = 0
        self.bytes_first: int | None = None
        """Of answers, after which the first connection is cut; a hundredth more for each that follows. Then the edge's
        `retry:` is made 1 ms as well: hundreds of cuts cannot wait a second each.
        """
        self._port = port
        self._open: set[asyncio.StreamWriter] = set()
        self._cut = False
        self._flows = asyncio.Event()
        self._flows.set()

    @classmethod
    @contextlib.asynccontextmanager
    async def to(cls, port: int) -> AsyncIterator["Line"]:
        line = cls(port)
        server = await asyncio.start_server(line._carry, "127.0.0.1", 0)
        line.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield line
        finally:
            server.close()
            line.cut()
            await server.wait_closed()

    def cut(self) -> None:
        """Every connection breaks, and none can be made."""
        self._cut = True
        for writer in self._open:
            writer.transport.abort()

    def mend(self) -> None:
        self._cut = False

    def hold(self) -> None:
        """What the server says does not arrive, until it is let go; what it is told does."""
        self._flows.clear()

    def let_go(self) -> None:
        self._flows.set()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        if self._cut:  # perhaps only now
            writer.transport.abort()
            far_writer.transport.abort()
            return
        left = None if self.bytes_first is None else int(self.bytes_first * 1.01**self.connections)
        self.connections += 1
        self._open |= {writer, far_writer}
        await asyncio.gather(self._copy(reader, far_writer), self._copy(far_reader, writer, left, self._flows))
        self._open -= {writer, far_writer}

    @staticmethod
    async def _copy(
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        left: int | None = None,
        flows: asyncio.Event | None = None,
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while left != 0 and (data := await reader.read(65_536 if left is None else left)):
                if flows:
                    await flows.wait()
                writer.write(data if left is None else data.replace(_RETRY, _AT_ONCE))
                await writer.drain()
                left = None if left is None else left - len(data)
        writer.close()
