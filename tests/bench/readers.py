"""`scripts/bench readers`: what many readers cost one edge, and how long they wait when it is killed.

Each scenario checks that every reader has every event once and reports figures. `tests/test_readers.py` runs the same
with fewer.
"""

import argparse
import asyncio
import math
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import httpx
import uvloop
from tapeline import events, subjects
from tapeline.append import Chain
from tapeline.record import Entry
from tapeline.tape import Tape

from tests.crowd import Reader, come, crowd, files, kib, reached
from tests.stack import Stack, until

WITHIN_S: Final = 60.0
CHARS: Final = 300
EXPORTED_BATCH: Final = 400
EXPORT_PAUSE_S: Final = 1.0
EXPORT_GROWTH_MIB_MAX: Final = 16
RECEIVE_BYTES: Final = 4096  # so that a reader who stops is felt by the edge, not soaked up by the kernel


class Talk:
    """One conversation, or one run in it, and a writer of tokens into it."""

    def __init__(self, tape: Tape, conversation: str, last: int, path: str, run: str | None = None) -> None:
        self.chain = Chain(tape, conversation, last)
        self.path = path
        self.run = run

    async def say(self, count: int, rate: float | None = None, chars: int = CHARS) -> int:
        """So many tokens, so many a second; the last one's sequence."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        for number in range(count):
            if rate:
                await asyncio.sleep(max(0.0, started + number / rate - loop.time()))
            token = events.Token(run=self.run or "bench", ts=number, step=1, attempt=1, text="x" * chars)
            await self.chain.append(subjects.MODEL_DELTA, token)
        return self.chain.last

    async def check(self, readers: list[Reader]) -> None:
        """Every reader has every event, once, in order."""
        records = await self.chain.tape.read(self.chain.conversation)
        log = [record.seq for record in records if self.run in (None, events.peek(record.data).run)]
        for reader in readers:
            assert reader.ids == log, "a reader missed an event, or has one twice"


class System:
    """Two edges on one tape."""

    def __init__(self, stack: Stack, tape: Tape, http: httpx.AsyncClient) -> None:
        self.stack, self.tape, self.http = stack, tape, http

    async def talk(self) -> Talk:
        created = (await self.http.post("/v1/conversations", json={})).raise_for_status().json()
        return Talk(self.tape, created["id"], created["event_id"], f"{created['events_url']}?after=0")

    async def asked(self) -> Talk:
        """A run, which nobody but the writer answers."""
        created = (await self.http.post("/v1/conversations", json={})).raise_for_status().json()
        answer = await self.http.post(f"{created['url']}/messages", json={"content": "hi"})
        posted = answer.raise_for_status().json()
        return Talk(self.tape, created["id"], posted["event_id"], posted["events_url"], posted["run"])

    def port(self, number: int = 0) -> int:
        return self.stack.ports[number]

    def pid(self, number: int = 0) -> int:
        edge = self.stack.edges[number]
        assert edge is not None
        return edge.popen.pid

    async def metric(self, name: str) -> float:
        """What the first edge says of itself."""
        metrics = (await self.http.get("/metrics")).text
        return sum(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith(f"{name}{{"))


@asynccontextmanager
async def system(folder: Path) -> AsyncIterator[System]:
    stack = await asyncio.to_thread(Stack, folder, {})
    try:
        for _ in range(2):
            await asyncio.to_thread(stack.add_edge)
        async with httpx.AsyncClient(base_url=stack.url, timeout=30) as http:
            tape = await Tape.open(stack.nats.url, "bench")
            try:
                yield System(stack, tape, http)
            finally:
                await tape.close()
    finally:
        await asyncio.to_thread(stack.stop)


async def stalled(
    system: System, others: int, stall_s: float, rate: float, chars: int, growth_mib_max: float = math.inf
) -> str:
    """One reader takes nothing for a while, as the others go on: more than the kernel keeps for it."""
    talk = await system.talk()
    slow = Reader(talk.path, RECEIVE_BYTES)
    async with crowd(system.port(), [talk.path] * others) as readers:
        await come([slow], system.port())
        before = kib(system.pid())
        slow.pause()
        peak = before
        saying = asyncio.create_task(talk.say(int(stall_s * rate), rate, chars))
        while not saying.done():
            peak = max(peak, kib(system.pid()))
            await asyncio.sleep(0.1)
        last = await saying
        grown_mib = (peak - before) / 1024
        assert grown_mib < growth_mib_max, f"the edge grew by {grown_mib:.1f} MiB"
        await reached(readers, last, WITHIN_S)
        behind = len(readers[0].ids) - len(slow.ids)
        reads = await system.metric("tapeline_feed_catch_up_reads_total")
        resumed = time.monotonic()
        slow.resume()
        await reached([slow], last, WITHIN_S)
        caught_up_s = time.monotonic() - resumed
        assert await system.metric("tapeline_feed_catch_up_reads_total") > reads, "it was not behind the ring"
        await talk.check([*readers, slow])
        slow.close()
    return (
        f"{others} readers went on while one took nothing for {stall_s:g} s ({behind} events behind, then caught up in "
        f"{caught_up_s:.2f} s): the edge grew by {grown_mib:.1f} MiB from {before / 1024:.0f} MiB"
    )


async def churned(system: System, count: int, wave: int) -> str:
    """Readers come and leave, a wave at a time."""
    talk = await system.talk()
    await talk.say(5)

    async def come_and_leave() -> None:
        async with crowd(system.port(), [talk.path] * wave) as readers:
            await reached(readers, talk.chain.last, WITHIN_S)

    await come_and_leave()  # what is made once is made
    await gone(system)
    before_files, before_kib = files(system.pid()), kib(system.pid())
    started = time.monotonic()
    for _ in range(count // wave):
        await come_and_leave()
    took_s = time.monotonic() - started
    await gone(system)
    await until("every socket closed", lambda: files(system.pid()) <= before_files, WITHIN_S)
    grown = kib(system.pid()) - before_kib
    return (
        f"{count} readers came and left in {took_s:.1f} s: no stream, feed or socket stayed open, the edge grew by "
        f"{grown / 1024:.1f} MiB from {before_kib / 1024:.0f} MiB"
    )


async def gone(system: System) -> None:
    """Returns when the first edge has no stream open, and follows no conversation."""
    async with asyncio.timeout(WITHIN_S):
        while await system.metric("tapeline_streams_open") or await system.metric("tapeline_feeds_open"):
            await asyncio.sleep(0.1)


async def storm(system: System, count: int, rate: float, *, of_run: bool) -> str:
    """All readers of an edge lose it in mid-answer and come to another at once."""
    talk = await (system.asked() if of_run else system.talk())
    async with crowd(system.port(0), [talk.path] * count) as readers:
        saying = asyncio.create_task(talk.say(int(rate * 20), rate))
        await until("all are reading", lambda: all(len(reader.ids) > rate for reader in readers), WITHIN_S)
        started = time.monotonic()
        await asyncio.to_thread(system.stack.kill_edge, 0, signal.SIGKILL)
        await asyncio.gather(*(reader.lost.wait() for reader in readers))
        cursors = [len(reader.ids) for reader in readers]
        await come(readers, system.port(1))
        back_s = time.monotonic() - started
        newest = talk.chain.last
        await reached(readers, newest, WITHIN_S)
        live_s = time.monotonic() - started
        assert all(len(reader.ids) > cursor for reader, cursor in zip(readers, cursors, strict=True))
        await reached(readers, await saying, WITHIN_S)
        await talk.check(readers)
    await asyncio.to_thread(system.stack.start_edge, 0)
    what = "a run" if of_run else "a conversation"
    return (
        f"{count} readers of {what} lost their edge (SIGKILL) and came back to another at once: the last was let in "
        f"after {back_s:.2f} s and live after {live_s:.2f} s; none missed an event or had one twice"
    )


async def replayed(system: System, count: int, words: int = 3) -> str:
    """A long conversation is exported, by one who takes nothing for a while."""
    talk = await system.talk()
    chain = talk.chain
    token = events.encode(events.Token(run="bench", ts=1, step=1, attempt=1, text="word " * words))
    for stored in range(1, count, EXPORTED_BATCH):  # the conversation's first event is there
        batch = [Entry(subjects.MODEL_DELTA, token)] * min(EXPORTED_BATCH, count - stored)
        chain.last = (await chain.tape.append_batch(chain.conversation, batch, chain.last))[-1]
    figures = []
    for accept, query in (
        ("application/x-ndjson", {}),
        ("application/x-ndjson", {"view": "compact"}),
        ("text/event-stream", {"pace": "1000"}),
    ):
        before, peak, read, size = kib(system.pid()), 0.0, 0, 0
        started = time.monotonic()
        paused_s = 0.0
        url = talk.path.partition("?")[0]
        async with system.http.stream("GET", url, params=query, headers={"Accept": accept}) as response:
            async for data in response.aiter_raw():
                while paused_s < EXPORT_PAUSE_S:
                    await asyncio.sleep(0.1)
                    paused_s += 0.1
                    peak = max(peak, kib(system.pid()))
                read += data.count(b"\n")
                size += len(data)
                peak = max(peak, kib(system.pid()))
        took_s = time.monotonic() - started - paused_s
        wanted = 1 if query.get("view") else count
        lines = wanted * 4 + 2 if "pace" in query else wanted  # id, event, data and none; the hello
        assert read == lines, f"{read} lines, not {lines}"
        grown_mib = (peak - before) / 1024
        assert grown_mib < EXPORT_GROWTH_MIB_MAX, f"the edge grew by {grown_mib:.1f} MiB"
        how = "&".join(f"{name}={value}" for name, value in query.items()) or "full"
        figures.append(
            f"{accept} {how}: {wanted} events in {took_s:.2f} s, {wanted / took_s:,.0f}/s, "
            f"the edge grew by {grown_mib:.1f} MiB for {size / (1 << 20):.0f} MiB"
        )
    return "\n".join(figures)


async def measure(options: argparse.Namespace) -> None:
    scenarios: dict[str, Callable[[System], Awaitable[str]]] = {
        "stalled": lambda one: stalled(one, 1000, 60, 20, 4_000),
        "churned": lambda one: churned(one, 10_000, 250),
        "storm": lambda one: storm(one, 1000, 20, of_run=False),
        "storm-run": lambda one: storm(one, 1000, 20, of_run=True),
        "replayed": lambda one: replayed(one, 100_000),
    }
    for name, scenario in scenarios.items():
        if options.only in ("", name):
            with tempfile.TemporaryDirectory() as folder:
                async with system(Path(folder)) as one:
                    print(f"{name}: {await scenario(one)}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="stalled, churned, storm, storm-run or replayed")
    uvloop.run(measure(parser.parse_args()))
