"""Readers who take nothing of what they asked for, or little: the first have an end, with all that was held for them,
the others are kept. At an edge whose patience is short.
"""

import asyncio
import contextlib
import math
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Final

import pytest
from tapeline import limits, subjects
from tapeline.tape import Tape

from tests.client import Client, opened
from tests.crowd import files
from tests.hardening.attacker import get
from tests.hardening.conftest import ANNS
from tests.hardening.vitals import open_streams
from tests.stack import Process, Stack, until

PATIENCE_S: Final = 2
STREAMS: Final = 2
CUT_S: Final = 30.0  # for what takes two seconds and a look
CONTENT: Final = "\N{MUSICAL SYMBOL G CLEF}" * limits.CONTENT_CHARS_MAX
"""0.8 MB."""
MESSAGES: Final = 6
"""Of that, which are more than the kernels hold, and more than a reader who drips takes in time."""
STINGY_BYTES: Final = 2_048
DRIP_BYTES: Final = 8_000  # at most, each tenth of a second
DRIPPING_S: Final = 5 * PATIENCE_S
KEY: Final = f"Authorization: Bearer {ANNS}"


@pytest.fixture(autouse=True)
def unharmed() -> None:
    """Here each test says of its own edge what it has to have left; the others are not needed."""


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """NATS, and an edge that gives nobody more than a few seconds."""
    env = {
        "TAPELINE_API_KEYS": f"ann={ANNS}",
        "TAPELINE_STREAMS_PER_USER": str(STREAMS),
        "TAPELINE_MESSAGES_PER_MINUTE": "0",
        "TAPELINE_HEARTBEAT_S": "1",
    }
    stack = Stack(tmp_path_factory.mktemp("impatient"), env)
    try:
        stack.add_edge(module=f"tests.edge_with WRITE_TIMEOUT_S={PATIENCE_S}")
        yield stack
    finally:
        stack.stop()


@pytest.fixture
def edge(impatient: Stack) -> Process:
    edge = impatient.edges[0]
    assert edge is not None
    return edge


@pytest.fixture
async def tape(impatient: Stack) -> AsyncIterator[Tape]:
    tape = await opened(impatient.nats.url)
    yield tape
    await tape.close()


@pytest.fixture
async def path(impatient: Stack) -> str:
    """A conversation with large messages, whose runs have not begun."""
    async with Client(impatient.url, ANNS) as ann:
        conversation = await ann.create()
        for _ in range(MESSAGES):
            await ann.post(conversation, CONTENT, on_busy="queue")
    return f"/v1/conversations/{conversation}"


class Stingy:
    """A connection of which nothing is read but what is asked for: neither the kernel nor we take more ahead."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    async def begin(self, path: str, *headers: str) -> None:
        """Asks, and reads no further than the head of the answer."""
        await asyncio.get_running_loop().sock_sendall(self._sock, get(path, KEY, *headers))
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += await self._take(1)
        assert head.startswith(b"HTTP/1.1 200 ")

    async def drip(self, for_s: float = math.inf) -> int:
        """Takes a little at a time; how many bytes that were. Raises `EOFError` where there is no more."""
        count, loop = 0, asyncio.get_running_loop()
        give_up = loop.time() + for_s
        while loop.time() < give_up:
            count += len(await self._take(DRIP_BYTES))
            await asyncio.sleep(0.1)
        return count

    async def _take(self, count: int) -> bytes:
        data = await asyncio.get_running_loop().sock_recv(self._sock, count)
        if not data:
            raise EOFError
        return data


@contextlib.asynccontextmanager
async def stingy(stack: Stack, receive_bytes: int = STINGY_BYTES) -> AsyncIterator[Stingy]:
    with socket.socket() as sock:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", stack.ports[0]))
        yield Stingy(sock)


@pytest.mark.parametrize("what", ["a stream", "lines", "a replay", "a snapshot"])
async def test_a_reader_who_takes_nothing(what: str, impatient: Stack, edge: Process, tape: Tape, path: str) -> None:
    """Would keep a socket, its buffers and a place for as long as it likes; or would give back the place alone, and
    come for the next.
    """
    asked, *headers = {
        "a stream": (f"{path}/events",),
        "lines": (f"{path}/events", "Accept: application/x-ndjson"),
        "a replay": (f"{path}/events?pace=1000",),
        "a snapshot": (path,),
    }[what]
    before = files(edge.popen.pid)
    async with stingy(impatient) as attacker:
        await attacker.begin(asked, *headers)
        held = files(edge.popen.pid)
        if what != "a snapshot":
            assert await leased(tape) == 1
        await until("the place is given back", lambda: is_free(tape), CUT_S)
        if what != "a snapshot":
            assert files(edge.popen.pid) < held, "the place was given back before the connection"
        await until("its connection is closed", lambda: files(edge.popen.pid) <= before, CUT_S)


async def test_readers_who_take_nothing_while_an_edge_is_drained(impatient: Stack, edge: Process, path: str) -> None:
    """Would keep it until it is killed: those who stalled, and one who takes a little now and then."""
    async with stingy(impatient) as stalled, stingy(impatient) as dripping, stingy(impatient) as shown:
        await shown.begin(path)
        await stalled.begin(f"{path}/events")
        await dripping.begin(f"{path}/events")
        taking = asyncio.create_task(dripping.drip())
        try:
            await impatient.drained()
        finally:
            taking.cancel()
            impatient.start_edge(module=f"tests.edge_with WRITE_TIMEOUT_S={PATIENCE_S}")
    assert "ERROR" not in edge.output()


async def test_a_reader_who_takes_a_little_is_kept(impatient: Stack, path: str) -> None:
    """Would be cut off in the middle of each large event, resume, and never see the next."""
    async with stingy(impatient, 2 * DRIP_BYTES) as slow:
        await slow.begin(f"{path}/events")
        count = await slow.drip(DRIPPING_S)
        print(f"{count / DRIPPING_S / 1e3:.0f} kB/s")
        async with Client(impatient.url, ANNS) as ann:
            assert await open_streams(ann) == 1
        assert count < MESSAGES * len(CONTENT.encode()) / 2, "it was too fast for this to be a test"
        await slow.drip(1)


async def leased(tape: Tape) -> int:
    """Places that are taken."""
    leases = await tape.newest(subjects.LEASES, subjects.lease("ann"))
    return sum(int(one.data.removeprefix(b'{"streams":').removesuffix(b"}")) for one in leases)


async def is_free(tape: Tape) -> bool:
    return await leased(tape) == 0
