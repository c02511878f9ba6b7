"""A rolling restart behind each proxy: every edge is ended by SIGTERM and started again while people read, and nobody
misses an event or has one twice.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.client import Client, Source, as_received, at_once, log_of
from tests.hardening.vitals import open_streams
from tests.proxy import PROXIES, Certificate, Proxy, through
from tests.stack import Stack, until

RUNS: Final = 20
READERS: Final = 10  # of each run, over one connection
PAUSE_S: Final = 30.0  # a drained reader comes back after a second; the rest is a busy machine


@pytest.fixture
def stack(fresh_stack: Stack) -> Stack:
    """Two edges, and answers that are longer than a restart takes."""
    fresh_stack.env["TAPELINE_DEMO_DELAY_MS"] = "300"
    fresh_stack.start().add_edge()
    return fresh_stack


@pytest.fixture(params=PROXIES, ids=lambda kind: kind.name)
def proxy(request: pytest.FixtureRequest, tmp_path: Path, stack: Stack) -> Iterator[Proxy]:
    """Each proxy as it is deployed."""
    folder = tmp_path / "proxy"
    folder.mkdir()
    proxy: Proxy = request.param(folder, Certificate(folder), stack.ports)
    yield proxy
    proxy.stop()


async def test_readers_of_edges_that_are_restarted_in_turn_miss_nothing(stack: Stack, proxy: Proxy) -> None:
    async with contextlib.AsyncExitStack() as leaving:
        users = [await leaving.enter_async_context(through(proxy)) for _ in range(RUNS)]
        asked = await at_once(RUNS, (user.ask("long 5000") for user in users))
        readers = [Source(user, *one) for user, one in zip(users, asked, strict=True) for _ in range(READERS)]
        async with asyncio.TaskGroup() as group:
            for reader in readers:
                group.create_task(reader.follow())
            for reader in readers:
                await reader.begun.wait()
            exits_s = [await restarted(stack, number, users[0], *asked[0]) for number in range(len(stack.edges))]
            async with Client(stack.url) as direct:  # httpx loses a POST among streams that an HTTP/2 peer has ended
                for conversation, run in asked:
                    assert (await direct.stop(conversation, run)).status_code == 202

    logs = {run: as_received(await log_of(stack.nats.url, conversation), run) for conversation, run in asked}
    for reader in readers:
        assert reader.received == logs[reader.run]
    connections = [reader.connections for reader in readers]
    pause_s = max(reader.pause_s for reader in readers)
    events = sum(map(len, logs.values()))
    exits = ", ".join(f"{one:.1f} s" for one in exits_s)
    print(f"{proxy.name}: {len(readers)} readers of {RUNS} runs, {events} events, {sum(connections)} connections;")
    print(f"exits after {exits}; the longest pause of a reader {pause_s:.1f} s")
    assert sum(connections) >= 2 * len(readers), "not everyone was on an edge that went, so this was no test"
    assert pause_s < PAUSE_S


async def restarted(stack: Stack, number: int, user: Client, conversation: str, run: str) -> float:
    """Ends an edge as a deployment does, and starts it again, until the user's proxy knows that it is back; how long it
    took to go, seconds.
    """
    took_s = await stack.drained(number)
    # In a thread, so that the readers are not held up; the edge ends with that thread, which is after the test.
    await asyncio.to_thread(stack.start_edge, number)

    async with Client(stack.edge_url(number)) as direct:

        async def is_known() -> bool:
            async with user.events(conversation, run=run) as stream:
                await stream.more()
                return await open_streams(direct) > 0

        await until("the proxy knows that the edge is back", is_known)
    return took_s
