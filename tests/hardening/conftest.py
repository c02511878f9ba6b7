"""What every attack has to leave as it was: an edge that answers others promptly, says nothing of a failure, and holds
neither memory nor open files of the attacker's.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Final

import pytest

from tests import PATIENT_S
from tests.client import Client
from tests.hardening.vitals import GROWTH_BYTES_MAX, Vitals
from tests.stack import POLL_S, Process, Stack

PROMPT_S: Final = 5.0  # for a whole run, as soon as the edge is done with what it had to do anyhow
ANNS: Final = "key-of-ann-1"
BOBS: Final = "key-of-bob-1"
KEYS: Final = ("", ANNS)  # to each edge


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The whole of Tapeline for all attacks: edge 0 is open to this machine, edge 1 knows ann and bob."""
    stack = Stack(tmp_path_factory.mktemp("stack"), {"TAPELINE_DEMO_DELAY_MS": "1", "TAPELINE_HEARTBEAT_S": "1"})
    try:
        stack.start()
        # What the limits are for is in test_limits; here they would keep the attacks out.
        unlimited = {"TAPELINE_STREAMS_PER_USER": "0", "TAPELINE_MESSAGES_PER_MINUTE": "0"}
        stack.add_edge({"TAPELINE_API_KEYS": f"ann={ANNS},bob={BOBS}", **unlimited})
        yield stack
    finally:
        stack.stop()


@pytest.fixture
def guarded(stack: Stack) -> str:
    """The URL of the edge that knows its users."""
    return stack.edge_url(1)


@pytest.fixture
async def ann(guarded: str) -> AsyncIterator[Client]:
    async with Client(guarded, ANNS) as ann:
        yield ann


@pytest.fixture
async def bob(guarded: str) -> AsyncIterator[Client]:
    async with Client(guarded, BOBS) as bob:
        yield bob


@pytest.fixture(autouse=True)
async def unharmed(stack: Stack, request: pytest.FixtureRequest) -> AsyncIterator[None]:
    """After every attack the edges are as well as before it."""
    edges = [edge for edge in stack.edges if edge is not None]
    before = [Vitals.of(edge) for edge in edges]
    output = [len(edge.output()) for edge in edges]
    yield
    give_up = time.monotonic() + PATIENT_S
    while max(took := await _answered(stack)) > PROMPT_S:
        assert time.monotonic() < give_up, "others are held up"
    for number, (edge, was, length, took_s) in enumerate(zip(edges, before, output, took, strict=True)):
        now = await _released(edge, was)
        growth = now.rss_bytes - was.rss_bytes
        print(
            f"edge {number}: a run in {took_s:.2f} s; memory {was.rss_bytes / 1e6:.0f} MB, {growth / 1e6:+.1f} MB; "
            f"open files {was.files}, {now.files - was.files:+d}"
        )
        assert edge.popen.poll() is None
        assert "Traceback" not in edge.output()[length:], edge.output()[length:]
        assert now.files <= was.files, "the attacker's connections are still held"
        assert growth < GROWTH_BYTES_MAX


async def _answered(stack: Stack) -> list[float]:
    """How long a well-behaved user's run takes at each edge, to its end."""
    return await asyncio.gather(*(_run_s(stack.edge_url(number), KEYS[number]) for number in range(2)))


async def _run_s(url: str, key: str) -> float:
    began = time.monotonic()
    async with asyncio.timeout(PATIENT_S), Client(url, key) as client:
        conversation, run = await client.ask("long 3")
        assert (await client.run(conversation, run))[-1].event == "done"
        return time.monotonic() - began


async def _released(edge: Process, before: Vitals) -> Vitals:
    """Its vitals as soon as it has no more files open than before, or when it had time enough for that."""
    give_up = time.monotonic() + PATIENT_S
    while (now := Vitals.of(edge)).files > before.files and time.monotonic() < give_up:
        await asyncio.sleep(POLL_S)
    return now
