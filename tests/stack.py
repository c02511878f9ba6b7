"""The whole of Tapeline as real processes, for tests that ask it over HTTP and kill its parts."""

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Protocol

import httpx
from tapeline import limits, permissions
from tapeline.settings import Settings

from services import provision
from services.embedded import EmbeddedNats
from tests import PATIENT_S
from tests.forkserver import spawn

PASSWORDS: Final = {role: f"{role}-secret" for role in (permissions.ROOT, *(it.name for it in permissions.ROLES))}
POLL_S: Final = 0.02
EXIT_S: Final = 15.0  # for what a process does before and after its grace time, on a busy machine


def free_port() -> int:
    """A port that nothing has, nor gets unasked before it is used, or while whoever has it is restarted: those that the
    system gives away by itself begin at 32768.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port


def wait_until(what: str, is_so: Callable[[], bool], timeout_s: float = PATIENT_S) -> None:
    """Polls until it is so; fails, naming what did not become so, when it takes too long."""
    give_up = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < give_up, f"{what}: not within {timeout_s} s"
        time.sleep(POLL_S)


async def until(what: str, look: Callable[[], Any], timeout_s: float = PATIENT_S) -> Any:
    """As `wait_until`, on an event loop; `look` may be async. What it saw at last."""
    give_up = time.monotonic() + timeout_s
    while True:
        seen = look()
        if isinstance(seen, Awaitable):
            seen = await seen
        if seen:
            return seen
        assert time.monotonic() < give_up, f"{what}: not within {timeout_s} s"
        await asyncio.sleep(POLL_S)


class Process:
    """One service as a process, its output in a file."""

    def __init__(self, module: str, env: Mapping[str, str], log: Path, ready: Callable[[], bool] | None = None) -> None:
        self.module = module
        self._log = log
        log.touch()
        self._from = log.stat().st_size
        self.popen = spawn(module.split(), env, log, log)
        try:
            wait_until(f"{module} ready", lambda: self._is_ready(ready))
        except BaseException:
            self.end(signal.SIGKILL)
            raise

    def _is_ready(self, ready: Callable[[], bool] | None) -> bool:
        assert self.popen.poll() is None, f"{self.module} ended: {self.output()}"
        return ready() if ready else " ready" in self.output()

    def output(self) -> str:
        return self._log.read_bytes()[self._from :].decode(errors="replace")

    def send(self, number: int) -> None:
        """Signals it, SIGSTOP and SIGCONT for example."""
        self.popen.send_signal(number)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Ends the process; its exit code."""
        if self.popen.poll() is None:
            self.popen.send_signal(number)
            if number != signal.SIGKILL:
                try:
                    self.popen.wait(15)
                except subprocess.TimeoutExpired:
                    self.popen.kill()
                    raise
        return self.popen.wait(15)


class Nats(Protocol):
    """One server, or a cluster of them."""

    @property
    def url(self) -> str: ...
    def url_for(self, role: str) -> str: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...
    def kill(self) -> None: ...


class Stack:
    """NATS, provisioned, and any number of edges, inference and tool workers on it, each with its own credentials.

    `nats.url` may do anything; it is for tests that look into the log, or put something there.
    """

    def __init__(self, folder: Path, env: Mapping[str, str], nats: Nats | None = None) -> None:
        self.folder = folder
        self.nats = nats or EmbeddedNats(folder / "nats", port=free_port(), passwords=PASSWORDS)
        self.nats.start()
        self.env = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("TAPELINE_", "OTEL_"))},
            "TAPELINE_MODEL": "demo",
            "TAPELINE_DEMO_DELAY_MS": "5",
            "PYTHONUNBUFFERED": "1",
            **env,
        }
        self.ports: list[int] = []
        self.edges: list[Process | None] = []
        self.inferences: list[Process] = []
        self.workers: list[Process] = []
        self.provision()

    def provision(self) -> None:
        """Makes what is not there."""
        with ThreadPoolExecutor(1) as elsewhere:  # there may be a loop in this thread
            making = provision.main(Settings(self.env_for("provision")))
            elsewhere.submit(asyncio.run, making).result(PATIENT_S)

    def env_for(self, role: str) -> dict[str, str]:
        """The environment of a service, with the credentials of its role."""
        return {"TAPELINE_NATS_URL": self.nats.url_for(role), **self.env}

    def start(self) -> "Stack":
        """One of each."""
        self.start_inference()
        self.start_worker()
        self.add_edge()
        return self

    @property
    def url(self) -> str:
        return self.edge_url(0)

    def edge_url(self, number: int) -> str:
        return f"http://127.0.0.1:{self.ports[number]}"

    def add_edge(self, env: Mapping[str, str] | None = None, module: str = "services.edge") -> int:
        """Another edge; its number."""
        self.ports.append(free_port())
        self.edges.append(None)
        self.start_edge(len(self.edges) - 1, env, module)
        return len(self.edges) - 1

    def start_edge(self, number: int = 0, env: Mapping[str, str] | None = None, module: str = "services.edge") -> None:
        """Starts an edge that was ended, on its own port."""
        url = self.edge_url(number)

        def ready() -> bool:
            try:
                return httpx.get(f"{url}/readyz", timeout=2).status_code == 200
            except httpx.TransportError:
                return False

        env = self.env_for("edge") | {"TAPELINE_PORT": str(self.ports[number]), **(env or {})}
        self.edges[number] = Process(module, env, self.folder / f"edge-{number}.log", ready)

    def kill_edge(self, number: int = 0, sig: int = signal.SIGKILL) -> int:
        edge = self.edges[number]
        assert edge is not None
        self.edges[number] = None
        return edge.end(sig)

    async def drained(self, number: int = 0) -> float:
        """Asks an edge to go, as a deployment does, and waits until it has: in order, before its time is over.
        How long that took, seconds.
        """
        edge = self.edges[number]
        assert edge is not None
        began = time.monotonic()
        edge.send(signal.SIGTERM)
        await until("the edge has gone", lambda: edge.popen.poll() is not None, limits.DRAIN_S + EXIT_S)
        took_s = time.monotonic() - began
        assert self.kill_edge(number) == 0, edge.output()
        for line in ("Traceback", "Cancel"):  # uvicorn cancels what is left of a grace time
            assert line not in edge.output()
        return took_s

    def start_inference(self, env: Mapping[str, str] | None = None) -> Process:
        log = self.folder / f"inference-{len(self.inferences)}.log"
        process = Process("services.inference", self.env_for("inference") | dict(env or {}), log)
        self.inferences.append(process)
        return process

    def start_worker(self, env: Mapping[str, str] | None = None, module: str = "services.tools") -> Process:
        log = self.folder / f"tools-{len(self.workers)}.log"
        process = Process(module, self.env_for("tools") | dict(env or {}), log)
        self.workers.append(process)
        return process

    def restart_nats(self) -> None:
        """As after a crash: killed, and started again on the same port and store."""
        self.nats.kill()
        self.nats.start()

    def stop(self) -> None:
        for process in [*self.edges, *self.inferences, *self.workers]:
            if process is not None:
                process.end(signal.SIGKILL)
        self.nats.stop()

    def logs(self) -> str:
        return "\n".join(
            f"--- {log.name}\n{log.read_text(errors='replace')}" for log in sorted(self.folder.glob("*.log"))
        )
