"""One who speaks HTTP by hand: what it sends is sent as it is, and what comes back is read strictly."""

import asyncio
import contextlib
import re
import socket
import struct
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from tests import PATIENT_S

CHUNK_BYTES: Final = 1 << 16

_STATUS: Final = re.compile(rb"HTTP/1\.1 ([1-5][0-9]{2}) [\x20-\x7e]*")
_HEADER: Final = re.compile(rb"([A-Za-z0-9!#$%&'*+.^_`|~-]+):[ \t]*([\x20-\x7e]*)")


class Answer(NamedTuple):
    """One response, as it was read."""

    status: int
    headers: dict[bytes, bytes]
    body: bytes


def get(path: str = "/healthz", *headers: str) -> bytes:
    """A well-formed GET with these further header lines."""
    return _request("GET", path, headers)


def post(path: str, body: bytes, *headers: str) -> bytes:
    """A well-formed POST of JSON."""
    about = ("Content-Type: application/json", f"Content-Length: {len(body)}")
    return _request("POST", path, (*about, *headers)) + body


def _request(method: str, path: str, headers: Iterable[str]) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode(
        "utf-8", "surrogatepass"
    )


LAST: Final = get("/healthz", "Connection: close")
"""After this the edge hangs up; its answer is the last."""


class Wire:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        """Sends, as fast as it is taken. That the edge has hung up is no error: that is for what follows to see."""
        try:
            for start in range(0, len(data), CHUNK_BYTES):
                self.writer.write(data[start : start + CHUNK_BYTES])
                await self.writer.drain()
        except ConnectionError:
            return

    async def rest(self) -> bytes:
        """All that comes until the edge hangs up, however it does."""
        said = bytearray()
        try:
            async with asyncio.timeout(PATIENT_S):
                while chunk := await self.reader.read(CHUNK_BYTES):
                    said += chunk
        except ConnectionError:
            pass  # reset: it had no mind to read the rest
        return bytes(said)

    async def closed(self) -> bool:
        """Whether the edge has hung up within `PATIENT_S`."""
        try:
            await self.rest()
        except TimeoutError:
            return False
        return True

    async def until(self, mark: bytes) -> bytes:
        """What comes, up to and with this."""
        async with asyncio.timeout(PATIENT_S):
            return await self.reader.readuntil(mark)

    def half_close(self) -> None:
        """Says that no more will be sent, and goes on reading."""
        with contextlib.suppress(OSError):  # the edge has hung up already
            self.writer.write_eof()

    def reset(self) -> None:
        """Goes without a goodbye (RST), whatever was under way."""
        sock: socket.socket = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


@asynccontextmanager
async def wire(url: str, *, receive_bytes: int | None = None) -> AsyncGenerator[Wire]:
    """A connection to the edge at `url`, with so small a buffer for what it sends."""
    sock = socket.socket()
    sock.setblocking(False)
    if receive_bytes is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", urlsplit(url).port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=1 << 20)
    try:
        yield Wire(reader, writer)
    finally:
        writer.transport.abort()


async def said(url: str, *parts: bytes) -> list[Answer]:
    """What an edge answers to these bytes until it hangs up, which has to be soon. It is read while they are sent."""
    async with wire(url) as attacker:
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(attacker.rest())
            for part in parts:
                await attacker.send(part)
        return answers(reading.result())


async def statuses(url: str, *parts: bytes) -> list[int]:
    """As `said`, the statuses alone."""
    return [answer.status for answer in await said(url, *parts)]


def answers(data: bytes) -> list[Answer]:
    """The whole responses in what an edge sent. None blames the edge but for being away (503)."""
    found: list[Answer] = []
    while data:
        head, end, data = data.partition(b"\r\n\r\n")
        if not end:
            break  # cut off in mid-header: no answer
        first, *lines = head.split(b"\r\n")
        status = _STATUS.fullmatch(first)
        assert status, f"no status line: {first!r}"
        fields = [_HEADER.fullmatch(line) for line in lines]
        assert all(fields), f"no header lines: {lines}"
        headers = {field[1].lower(): field[2] for field in fields if field}
        assert len(headers) == len(lines), f"a header twice: {lines}"
        code = int(status[1])
        assert code < 500 or code == 503, head
        if headers.get(b"transfer-encoding") == b"chunked":
            body, data = _chunked(data)
        else:
            length = int(headers.get(b"content-length", b"0"))
            body, data = data[:length], data[length:]
        found.append(Answer(code, headers, body))
    return found


def _chunked(data: bytes) -> tuple[bytes, bytes]:
    body = b""
    while True:
        size, _, data = data.partition(b"\r\n")
        length = int(size or b"0", 16)
        body, data = body + data[:length], data[length + 2 :]
        if not length:
            return body, data
