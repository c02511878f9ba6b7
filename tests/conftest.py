"""The real parts that tests run against: a NATS server, a provisioned tape, and the whole stack as processes."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from tapeline import provision
from tapeline.connection import connect
from tapeline.tape import Deployment, Tape

from services.embedded import EmbeddedNats
from tests.client import Client
from tests.stack import Stack


@pytest.fixture(scope="session")
def nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedNats]:
    """A NATS server for tests that leave it running."""
    server = EmbeddedNats(tmp_path_factory.mktemp("nats"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def nats_url(tmp_path: Path) -> Iterator[str]:
    """A fresh NATS server for one test; empty."""
    server = EmbeddedNats(tmp_path / "nats")
    server.start()
    yield server.url
    server.stop()


@pytest.fixture
async def tape(nats_url: str) -> AsyncIterator[Tape]:
    """A tape on a fresh, provisioned server."""
    nc = await connect(nats_url, "provision")
    await provision.apply(nc, Deployment())
    await nc.close()
    tape = await Tape.open(nats_url, "test")
    yield tape
    await tape.close()


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The whole of Tapeline with the demo model, shared by a module's tests."""
    stack = Stack(tmp_path_factory.mktemp("stack"), {})
    try:
        yield stack.start()
    finally:
        stack.stop()


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[Client]:
    """A user of the shared system."""
    async with Client(stack.url) as client:
        yield client


@pytest.fixture
async def clients(stack: Stack) -> AsyncIterator[tuple[Client, Client]]:
    """A user of two edges of the shared system, by a client of each."""
    if len(stack.edges) < 2:
        stack.add_edge()
    async with Client(stack.edge_url(0)) as one, Client(stack.edge_url(1)) as other:
        yield one, other


@pytest.fixture
def fresh_stack(tmp_path: Path) -> Iterator[Stack]:
    """The whole of Tapeline for one test, which may kill its parts. Not started."""
    stack = Stack(tmp_path, {})
    try:
        yield stack
    finally:
        stack.stop()
