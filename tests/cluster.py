"""Three NATS servers as one cluster, which tests break: kill a server, cut it off from the others, heal it.

Each pair of servers has one link, through a proxy of ours. A cut link keeps its connections and delivers nothing, as
when a network goes away; when it is healed they are reset, and what was on its way is lost.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

from nats.aio.client import Client
from tapeline import permissions
from tapeline.connection import Unavailable, api, connect

from services.embedded import HOST, EmbeddedNats, Member
from tests.stack import PASSWORDS, POLL_S, free_port

T = TypeVar("T")

NODES: Final = 3
CLOSE_S: Final = 10.0
SETTLED_S: Final = 40.0  # an election takes 4 to 9 s, and may have to be held again
CHUNK_BYTES: Final = 65_536
NOWHERE: Final = f"{HOST}:1"  # what servers tell each other to connect to, so that nobody gets round a link


class Link:
    """Whoever connects to `port` reaches `target`, unless the link is cut."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.is_cut = False
        self._open: set[asyncio.StreamWriter] = set()

    async def listen(self) -> asyncio.Server:
        server = await asyncio.start_server(self._connected, HOST, 0)
        self.port = server.sockets[0].getsockname()[1]
        return server

    def reset(self) -> None:
        """Ends its connections; those who had them connect again."""
        for writer in self._open:
            writer.transport.abort()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            other_reader, other = await asyncio.open_connection(HOST, self.target)
        except OSError:
            await _ended(writer)
            return
        ends = {writer, other}
        self._open |= ends
        await asyncio.gather(self._pump(reader, other), self._pump(other_reader, writer))
        self._open -= ends
        await asyncio.gather(*map(_ended, ends))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                if not self.is_cut:
                    writer.write(data)
                    await writer.drain()
        writer.transport.abort()


async def _ended(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


class Links:
    """Links, at work in a thread of their own."""

    def __init__(self, targets: Sequence[int]) -> None:
        self.all = [Link(target) for target in targets]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="links", daemon=True)
        self._thread.start()
        self._servers = [self._on_loop(link.listen()) for link in self.all]

    def reset(self, links: Iterable[Link]) -> None:
        async def reset() -> None:
            for link in links:
                link.reset()

        self._on_loop(reset())

    def close(self) -> None:
        async def close() -> None:
            for server in self._servers:
                server.close()
            for link in self.all:
                link.reset()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            await asyncio.wait_for(asyncio.gather(*others), CLOSE_S)

        self._on_loop(close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_S)
        self._loop.close()

    def _on_loop(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(CLOSE_S)


class Cluster:
    """The servers, by number, and the links between them."""

    def __init__(self, folder: Path) -> None:
        ports = [free_port() for _ in range(NODES)]
        # Each server dials the next, so every pair has one link. Link n is from server n.
        self._links = Links([ports[(number + 1) % NODES] for number in range(NODES)])
        self.nodes = [
            EmbeddedNats(
                folder / f"nats-{number}",
                passwords=PASSWORDS,
                member=Member(f"n{number}", ports[number], NOWHERE, [f"nats://{HOST}:{link.port}"]),
            )
            for number, link in enumerate(self._links.all)
        ]

    @property
    def url(self) -> str:
        """All servers, as `TAPELINE_NATS_URL` takes them."""
        return self.url_for(permissions.ROOT)

    def url_for(self, role: str) -> str:
        return ",".join(node.url_for(role) for node in self.nodes)

    def start(self) -> None:
        """Starts all; they may not have found each other yet."""
        for node in self.nodes:
            node.spawn()
        for node in self.nodes:
            node.wait()

    def kill(self) -> None:
        for node in self.nodes:
            node.kill()

    def stop(self) -> None:
        self.kill()

    def close(self) -> None:
        """Ends everything, for good."""
        self.kill()
        self._links.close()

    def cut(self, *numbers: int) -> None:
        """Cuts one server off from the others, or two from each other."""
        for number, link in enumerate(self._links.all):
            if {number, (number + 1) % NODES} >= set(numbers):
                link.is_cut = True

    def heal(self) -> None:
        """All links work again."""
        links = [link for link in self._links.all if link.is_cut]
        self._links.reset(links)
        for link in links:
            link.is_cut = False

    async def leader(self, stream: str, consumer: str = "", asked: Sequence[int] = range(NODES)) -> int:
        """The server that leads a stream, or one of its consumers, as these say; waits until one does."""
        method = f"CONSUMER.INFO.{stream}.{consumer}" if consumer else f"STREAM.INFO.{stream}"
        async with self._connection(asked) as nc:
            return int(_leader(await _until(nc, method, lambda answer: bool(_leader(answer)))).removeprefix("n"))

    async def settled(self) -> None:
        """Runs every server, and waits until each has all that was stored."""
        self.heal()
        for node in self.nodes:
            if node.pid is None:
                node.spawn()  # from this thread: the kernel ends a child with the thread that started it
        async with self._connection() as nc:
            while not all(node.is_ready() for node in self.nodes):
                await asyncio.sleep(POLL_S)
            for name in (await _until(nc, "STREAM.NAMES", lambda answer: "streams" in answer))["streams"]:
                await _until(nc, f"STREAM.INFO.{name}", _is_whole)

    @asynccontextmanager
    async def _connection(self, servers: Sequence[int] = range(NODES)) -> AsyncGenerator[Client]:
        """A connection to one of these, for no longer than `SETTLED_S`."""
        async with asyncio.timeout(SETTLED_S):
            nc = await connect(",".join(self.nodes[number].url for number in servers), "cluster")
            try:
                yield nc
            finally:
                await nc.close()


Answer = dict[str, Any]


async def _until(nc: Client, method: str, is_so: Callable[[Answer], bool]) -> Answer:
    """The answer that says so."""
    while True:
        with contextlib.suppress(Unavailable):
            if is_so(answer := await api(nc, method)):
                return answer
        await asyncio.sleep(POLL_S)


def _leader(answer: Answer) -> str:
    name: str = answer["cluster"].get("leader", "")
    return name


def _is_whole(answer: Answer) -> bool:
    replicas = answer["cluster"].get("replicas", [])
    return bool(_leader(answer)) and len(replicas) == NODES - 1 and all(one["current"] for one in replicas)
