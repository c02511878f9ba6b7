"""`scripts/bench edge`: events delivered per CPU-second of the edge, and memory of an idle stream.

Beside the same load, in the same run, on a bare uvicorn ASGI loop without any log (`ceiling.py`). Rounds alternate,
so that both meet the same machine.
"""

import argparse
import asyncio
import os
import statistics
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import httpx
import uvloop
from tapeline import events, subjects
from tapeline.append import Chain
from tapeline.tape import Tape

from tests.bench.ceiling import TEXT
from tests.crowd import Reader, crowd, kib
from tests.stack import Process, Stack, free_port, until

WAIT_S: Final = 60.0
TICK: Final = os.sysconf("SC_CLK_TCK")


class Load(NamedTuple):
    """So many topics, each with so many readers, to each of which so many events are sent, so many a second."""

    topics: int
    readers: int
    events: int
    rate: float


class Side:
    """One of the two that are compared: where its topics are streamed, and what makes it send."""

    def __init__(self, port: int, pid: int, path: Callable[[int], str], send: Callable[[Load], Awaitable[Any]]) -> None:
        self.port, self.pid, self.path, self.send = port, pid, path, send

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def readers(self, topics: int, each: int) -> AbstractAsyncContextManager[list[Reader]]:
        return crowd(self.port, [self.path(topic) for topic in range(topics) for _ in range(each)])

    async def delivered_per_cpu_s(self, load: Load) -> float:
        """Events delivered per second of this process's CPU time."""
        async with self.readers(load.topics, load.readers) as readers:
            before = self.cpu_s()
            await self.send(load)
            await until("all events", lambda: all(len(reader.ids) >= load.events for reader in readers), WAIT_S)
            spent = self.cpu_s() - before
        total = sum(len(reader.ids) for reader in readers)
        assert total == load.topics * load.readers * load.events, "an event was lost or doubled"
        return total / spent

    async def idle_kib(self, topics: int, each: int) -> float:
        """Memory that an open stream takes, nothing being sent."""
        before = kib(self.pid)
        async with self.readers(topics, each):
            return (kib(self.pid) - before) / (topics * each)


class Conversations:
    """The tape's side of the load: conversations, and a writer of tokens into each."""

    def __init__(self, tape: Tape, http: httpx.AsyncClient) -> None:
        self.tape, self.http = tape, http
        self.names: list[str] = []
        self.last: list[int] = []

    async def provide(self, count: int) -> None:
        while len(self.names) < count:
            created = await self.http.post("/v1/conversations", json={})
            about = created.raise_for_status().json()
            self.names.append(about["id"])
            self.last.append(about["event_id"])

    def path(self, topic: int) -> str:
        return f"/v1/conversations/{self.names[topic]}/events?after={self.last[topic]}"

    async def send(self, load: Load) -> None:
        await asyncio.gather(*(self._write(self.names[topic], topic, load) for topic in range(load.topics)))

    async def _write(self, conversation: str, topic: int, load: Load) -> None:
        loop = asyncio.get_running_loop()
        chain = Chain(self.tape, conversation, self.last[topic])
        started = loop.time() + topic / load.topics / load.rate  # evenly over time, as people are
        for number in range(load.events):
            await asyncio.sleep(max(0.0, started + number / load.rate - loop.time()))
            token = events.Token(run="bench", ts=1795365404662, step=1, attempt=1, text=TEXT.decode())
            self.last[topic] = await chain.append(subjects.MODEL_DELTA, token)


@asynccontextmanager
async def sides(folder: Path) -> AsyncIterator[tuple[Conversations, dict[str, Side]]]:
    stack = await asyncio.to_thread(Stack, folder, {})
    port = free_port()
    async with AsyncExitStack() as rest:
        rest.callback(stack.stop)
        await asyncio.to_thread(stack.add_edge)
        edge = stack.edges[0]
        assert edge is not None
        ceiling = await asyncio.to_thread(
            Process, f"tests.bench.ceiling {port}", stack.env, folder / "ceiling.log", lambda: answers(port)
        )
        rest.callback(ceiling.end, 9)
        http = await rest.enter_async_context(httpx.AsyncClient(base_url=stack.url, timeout=30))
        tape = await Tape.open(stack.nats.url, "bench")
        rest.push_async_callback(tape.close)
        conversations = Conversations(tape, http)

        async def send(load: Load) -> None:
            query = {"topics": load.topics, "events": load.events, "rate": load.rate}
            (await http.post(f"http://127.0.0.1:{port}/", params=query)).raise_for_status()

        yield (
            conversations,
            {
                "tapeline": Side(stack.ports[0], edge.popen.pid, conversations.path, conversations.send),
                "ceiling": Side(port, ceiling.popen.pid, lambda topic: f"/{topic}", send),
            },
        )


def answers(port: int) -> bool:
    try:
        httpx.post(f"http://127.0.0.1:{port}/?topics=0&events=0&rate=1", timeout=1)
    except httpx.TransportError:
        return False
    return True


async def measure(options: argparse.Namespace) -> None:
    for topics, each in ((options.idle, 1), (1, options.idle)) if options.idle else ():
        with tempfile.TemporaryDirectory() as folder:  # processes that have not grown for anything else
            async with sides(Path(folder)) as (conversations, both):
                await conversations.provide(topics)
                used = {name: await side.idle_kib(topics, each) for name, side in both.items()}
                ratio = used["tapeline"] / used["ceiling"]
                each_kib = f"{used['tapeline']:.1f} KiB each, ceiling {used['ceiling']:.1f} KiB, ratio {ratio:.2f}"
                print(f"{topics} × {each} idle streams: {each_kib}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        async with sides(Path(folder)) as (conversations, both):
            print(f"{'topics × readers':>16} {'way':>9} {'events/CPU-s':>13}   {options.rounds} rounds, medians")
            for load in options.loads:
                await conversations.provide(load.topics)
                got: dict[str, list[float]] = {name: [] for name in both}
                for _ in range(options.rounds):
                    for name, side in both.items():
                        got[name].append(await side.delivered_per_cpu_s(load))
                medians = {name: statistics.median(values) for name, values in got.items()}
                for name, median in medians.items():
                    print(f"{load.topics:>9} × {load.readers:<4} {name:>9} {median:>13,.0f}")
                print(f"{'':>16} {'ratio':>9} {medians['tapeline'] / medians['ceiling']:>13.2f}", flush=True)


def load(text: str) -> Load:
    topics, readers, count, rate = text.split("x")
    return Load(int(topics), int(readers), int(count), float(rate))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--loads",
        type=load,
        nargs="*",
        default=[Load(1, 1000, 200, 20), Load(500, 1, 40, 4)],
        help="TOPICSxREADERSxEVENTSxRATE",
    )
    parser.add_argument("--idle", type=int, default=5000, help="idle streams; 0: none")
    uvloop.run(measure(parser.parse_args()))
