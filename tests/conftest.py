"""The real parts that tests run against: a NATS server, a provisioned tape, and the whole stack as processes."""

import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from tapeline import provision
from tapeline.connection import connect
from tapeline.tape import Deployment, Tape
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

from services.embedded import EmbeddedNats
from tests.browser import browser, page
from tests.client import Client
from tests.stack import Stack, free_port
from tests.workers import Start, Worker

__all__ = ["browser", "page"]


FAULTS: Final = {"test_cluster", "test_guide", "test_kill", "test_matrix", "test_pools"}
"""Files that take minutes and all of two cores: begun first, one after the other."""
LONG: Final = {"test_deadlines", "test_limits", "test_page", "test_tools", "test_up"}
"""Begun next: at the end one process would be left with them."""


class ByFile(LoadScopeScheduling):  # type: ignore[misc]
    """All tests of a file run in one process, which makes what they share once. (The groups of xdist 3.8 come to
    nothing with pytest 9.2.)
    """

    def _split_scope(self, nodeid: str) -> str:
        name = Path(nodeid.partition("::")[0]).stem
        return "faults" if name in FAULTS else name


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: (item.path.stem not in FAULTS, item.path.stem not in LONG))


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
    server = EmbeddedNats(tmp_path / "nats", port=free_port())
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


@pytest.fixture
async def workers(tmp_path: Path, nats_url: str) -> AsyncIterator[Start]:
    """Starts workers, and kills those that are left."""
    started: list[Worker] = []

    async def start(*modules: str, url: str = nats_url, **more: Any) -> Worker:
        started.append(Worker(tmp_path, url))
        return await started[-1].start(*modules, **more)

    yield start
    for worker in started:
        await worker.end(signal.SIGKILL)
