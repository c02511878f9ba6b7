"""Clients that others wrote follow a run and resume, though the edge dies under them: PyPI `httpx-sse`, which leaves
resuming to its user, and npm `eventsource`, which does what a browser's EventSource does.
"""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, get_args

import httpx
import pytest
from httpx_sse import aconnect_sse
from tapeline import events

from tests import PATIENT_S
from tests.client import Client, Received, as_received, log_of
from tests.stack import Stack

LONG: Final = "long 600"  # long enough that an edge can be started again in the meantime
EARLY: Final = 20  # events after which the edge goes
NAMES: Final = [kind.__struct_config__.tag for kind in get_args(events.AnyEvent)]
SCRIPT: Final = Path(__file__).parent / "node" / "follow.mjs"
NODE_MIN: Final = (20, 15)  # as in scripts/node
ODD: Final = "long 5 line\u2028paragraph\u2029next\u0085line \r\n tab\x0b feed\x0c nul\0 é 漢 🙂"


# PyPI httpx-sse


async def test_httpx_sse_follows_and_resumes_after_every_tenth_event(
    stack: Stack, clients: tuple[Client, Client]
) -> None:
    conversation, run = await clients[0].answered("long 60")
    log = as_received(await log_of(stack.nats.url, conversation), run)
    for count in range(0, len(log), 10):
        received = []
        async for event in httpx_sse(clients[0], conversation, run):
            received.append(event)
            if len(received) > count:
                break
        assert [event async for event in httpx_sse(clients[1], conversation, run, received[-1].id)] == log[count + 1 :]
        assert received == log[: count + 1]


async def test_httpx_sse_misses_nothing_when_the_edge_is_killed_in_mid_answer(fresh_stack: Stack) -> None:
    fresh_stack.start()
    async with Client(fresh_stack.url) as client:
        conversation, run = await client.ask(LONG)
        received: list[Received] = []

        async def follow() -> None:
            async for event in httpx_sse(client, conversation, run):
                received.append(event)
                if len(received) == EARLY:
                    fresh_stack.kill_edge()

        with pytest.raises(httpx.TransportError):
            await follow()
        assert received[-1].event != "done"
        fresh_stack.start_edge()
        received += [event async for event in httpx_sse(client, conversation, run, received[-1].id)]
    assert received == as_received(await log_of(fresh_stack.nats.url, conversation), run)


async def test_httpx_sse_takes_whatever_is_said_for_one_event(stack: Stack, client: Client) -> None:
    conversation, run = await client.answered(ODD)
    received = [event async for event in httpx_sse(client, conversation, run)]
    assert received == as_received(await log_of(stack.nats.url, conversation), run)
    assert json.loads(received[0].data)["content"] == ODD


async def httpx_sse(client: Client, conversation: str, run: str, cursor: int | None = None) -> AsyncGenerator[Received]:
    headers = {} if cursor is None else {"Last-Event-ID": str(cursor)}
    url = f"/v1/conversations/{conversation}/events"
    async with aconnect_sse(client.http, "GET", url, params={"run": run}, headers=headers) as source:
        async for event in source.aiter_sse():
            yield Received(int(event.id), event.event, event.data.encode())


async def test_httpx_sse_sees_no_event_in_a_heartbeat(fresh_stack: Stack) -> None:
    fresh_stack.env["TAPELINE_HEARTBEAT_S"] = "1"
    fresh_stack.add_edge()
    async with Client(fresh_stack.url) as client:
        conversation, run = await client.ask("long 5")  # which nobody answers yet

        async def follow() -> list[Received]:
            return [event async for event in httpx_sse(client, conversation, run)]

        following = asyncio.create_task(follow())
        async with client.events(conversation) as beside:
            await beside.heartbeats(3)
        fresh_stack.start_inference()
        received = await following
    assert received == as_received(await log_of(fresh_stack.nats.url, conversation), run)


# npm eventsource


@pytest.fixture(scope="module")
def node() -> str:
    """Node, found as scripts/node finds it. Without it the tests are skipped, but not in CI."""
    for found in (str(Path(sys.prefix) / "bin" / "node"), shutil.which("node")):
        if found and Path(found).exists():
            said = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=PATIENT_S, check=True)
            major, minor, _ = said.stdout.strip().removeprefix("v").split(".")
            if (int(major), int(minor)) >= NODE_MIN and (SCRIPT.parent / "node_modules" / "eventsource").exists():
                return found
    reason = "npm's eventsource is NOT tested: no Node with the packages of tests/node; run scripts/node"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


class Follower:
    """An EventSource in a process of its own, and what it has heard."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.received: list[Received] = []
        self.losses: list[dict[str, Any]] = []

    async def hear(self) -> bool:
        """Waits for the next word; False when it has ended, of its own accord and without a complaint."""
        assert self._process.stdout is not None
        async with asyncio.timeout(PATIENT_S):
            line = await self._process.stdout.readline()
            if not line:
                assert await self._process.wait() == 0
                return False
        heard = json.loads(line)
        if "lost" in heard:
            self.losses.append(heard)
        else:
            self.received.append(Received(int(heard["id"]), heard["event"], heard["data"].encode()))
        return True

    async def hear_all(self) -> list[Received]:
        while await self.hear():
            pass
        return self.received


@asynccontextmanager
async def eventsource(node: str, edge: str, conversation: str, run: str) -> AsyncIterator[Follower]:
    url = f"{edge}/v1/conversations/{conversation}/events?run={run}"
    process = await asyncio.create_subprocess_exec(
        node, SCRIPT, url, *NAMES, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    try:
        yield Follower(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_eventsource_follows_a_run_and_stops_at_its_end(node: str, stack: Stack, client: Client) -> None:
    conversation, run = await client.ask("long 60")
    async with eventsource(node, stack.url, conversation, run) as follower:
        received = await follower.hear_all()
    assert received == as_received(await log_of(stack.nats.url, conversation), run)
    *_, last = follower.losses
    assert last == {"lost": 204, "closed": True}, "it came back after the end, and was told that this was all"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_eventsource_comes_back_by_itself_when_the_edge_is_restarted_in_mid_answer(
    number: signal.Signals, node: str, fresh_stack: Stack
) -> None:
    fresh_stack.start()
    async with Client(fresh_stack.url) as client:
        conversation, run = await client.ask(LONG)
        async with eventsource(node, fresh_stack.url, conversation, run) as follower:
            while len(follower.received) < EARLY:
                assert await follower.hear()
            fresh_stack.kill_edge(sig=number)
            fresh_stack.start_edge()
            received = await follower.hear_all()
    assert received == as_received(await log_of(fresh_stack.nats.url, conversation), run)
    *before, last = follower.losses
    assert len(before) >= 2, "it never lost the connection before the end, so this was no test"
    assert not any(loss["closed"] for loss in before)
    assert last == {"lost": 204, "closed": True}


async def test_eventsource_takes_whatever_is_said_for_one_event(node: str, stack: Stack, client: Client) -> None:
    conversation, run = await client.answered(ODD)
    async with eventsource(node, stack.url, conversation, run) as follower:
        received = await follower.hear_all()
    assert received == as_received(await log_of(stack.nats.url, conversation), run)
    assert json.loads(received[0].data)["content"] == ODD
