"""The whole system on one machine, as one tree of processes.

Owns the order of starting and stopping, the restart of what ended unasked, and what is printed about both. It
knows nothing of what the services do, only how each says that it is ready.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import re
import secrets
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from tapeline import permissions
from tapeline.settings import NATS_URL, ConfigError, Settings

from . import port as ports
from .child import Backoff, Child, NotReady, say
from .embedded import EmbeddedNats, ServerEnded, write_secret

READY_TIMEOUT_S: Final = 60.0
READY_POLL_S: Final = 0.05
PROBE_TIMEOUT_S: Final = 2.0
NATS_POLL_S: Final = 0.1
SECRET_BYTES: Final = 24


async def supervise(settings: Settings) -> None:
    """Runs the system until SIGINT or SIGTERM. Raises `ConfigError` or `NotReady`."""
    system = _System(settings)
    running = asyncio.create_task(system.run())

    def stop() -> None:
        if running.cancelling():
            system.kill()  # asked twice: at once
        else:
            say("stopping")
            running.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    with contextlib.suppress(asyncio.CancelledError):
        await running


class _System:
    def __init__(self, settings: Settings) -> None:
        self.host = settings.text("TAPELINE_HOST", "127.0.0.1")
        self.port = settings.number("TAPELINE_PORT", 8080, least=1, most=65535)
        self.data = Path(settings.text("TAPELINE_DATA", ".tapeline"))
        self.nats_url = settings.text(NATS_URL)
        self.environ = settings.environ
        self.children: list[Child] = []

    async def run(self) -> None:
        with _sole_user_of(self.data):
            ports.check(self.host, self.port)
            if self.nats_url:
                await self._run_services(lambda _: self.nats_url)
            else:
                await self._run_with_nats()

    def kill(self) -> None:
        for child in self.children:
            child.kill()

    async def _run_with_nats(self) -> None:
        say("starting NATS")
        nats = EmbeddedNats(self.data / "nats", port=self._last_nats_port(), passwords=self._passwords())
        try:
            try:
                nats.start()
            except ServerEnded:
                if not nats.port:
                    raise
                nats.port = 0  # somebody has taken the old one
                nats.start()
            await self._run_services(nats.url_for, nats)
        except ServerEnded as error:
            raise NotReady(str(error)) from error
        finally:
            nats.stop()

    async def _run_services(self, url_for: Callable[[str], str], nats: EmbeddedNats | None = None) -> None:
        """`url_for` a role is where NATS is, with its own credentials."""
        await self._child("provision", url_for).once()
        edge, inference, tools = (self._child(name, url_for) for name in ("edge", "inference", "tools"))
        say("starting edge, inference, tools")
        try:
            async with asyncio.TaskGroup() as group:
                if nats:
                    group.create_task(_keep(nats))
                for child in (edge, inference, tools):
                    group.create_task(child.keep())
                waits = {
                    "edge": self._edge_answers(),
                    "inference": inference.ready.wait(),
                    "tools": tools.ready.wait(),
                }
                readiness = [group.create_task(wait, name=name) for name, wait in waits.items()]
                _, late = await asyncio.wait(readiness, timeout=READY_TIMEOUT_S)
                if late:
                    names = ", ".join(sorted(task.get_name() for task in late))
                    raise NotReady(f"not ready after {READY_TIMEOUT_S:.0f} s: {names}")
                for child in self.children:
                    child.proven = True
                for role in ("tools", "auditor"):
                    # For a worker, and for a reader of everything, from outside the repository.
                    write_secret(self.data / f"{role}.env", f"{NATS_URL}={url_for(role)}\n")
                print(f"ready http://{self._bracketed_host()}:{self.port}", flush=True)
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None  # the others only followed it

    def _child(self, name: str, url_for: Callable[[str], str]) -> Child:
        environ = {
            **self.environ,
            NATS_URL: url_for(name),
            "TAPELINE_HOST": self.host,
            "TAPELINE_PORT": str(self.port),
            "PYTHONUNBUFFERED": "1",
        }
        child = Child(name, environ)
        self.children.append(child)
        return child

    async def _edge_answers(self) -> bool:
        """Returns once the edge says over HTTP that it is ready."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        request = f"GET /readyz HTTP/1.1\r\nHost: {self._bracketed_host()}\r\nConnection: close\r\n\r\n"
        while True:
            with contextlib.suppress(OSError, TimeoutError):  # not listening yet, or just ended
                async with asyncio.timeout(PROBE_TIMEOUT_S):
                    reader, writer = await asyncio.open_connection(host, self.port)
                    try:
                        writer.write(request.encode())
                        status_line = await reader.readline()
                    finally:
                        writer.close()
                if status_line.split(b" ")[1:2] == [b"200"]:
                    return True
            await asyncio.sleep(READY_POLL_S)

    def _bracketed_host(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host

    def _passwords(self) -> dict[str, str]:
        """Each role's, made up once and kept, so that a worker from outside still comes in after a restart."""
        path = self.data / "secrets.json"
        try:
            kept: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
            passwords = {
                role.name: kept.get(role.name) or secrets.token_hex(SECRET_BYTES) for role in permissions.ROLES
            }
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(f"{path} cannot be read; without it, new passwords would be made: {error}") from error
        if passwords != kept:
            write_secret(path, json.dumps(passwords, indent=2) + "\n")
        return passwords

    def _last_nats_port(self) -> int:
        """Where NATS listened the last time, so that workers from outside find it again; 0 the first time."""
        tools_env = self.data / "tools.env"
        if not tools_env.exists():
            return 0
        url = rf"^{NATS_URL}=nats://(?:[^@\s]*@)?127\.0\.0\.1:(\d+)$"
        last = re.search(url, tools_env.read_text(), re.MULTILINE)
        return int(last[1]) if last else 0


async def _keep(nats: EmbeddedNats) -> None:
    """Starts the server again, on the same port and store, whenever it ends unasked."""
    backoff = Backoff()
    while True:
        try:
            while True:
                nats.is_ready()
                await asyncio.sleep(NATS_POLL_S)
        except ServerEnded as error:
            delay_s = backoff.next_s()
            say(f"{error}; starting it again in {delay_s:g} s")
            await asyncio.sleep(delay_s)
            backoff.started()
            nats.spawn()


@contextlib.contextmanager
def _sole_user_of(data: Path) -> Iterator[None]:
    """Holds the folder's lock, which the kernel frees however this process ends. Raises `ConfigError`."""
    try:
        data.mkdir(parents=True, exist_ok=True)
        file = (data / "lock").open("a+")
    except OSError as error:
        raise ConfigError(f"TAPELINE_DATA is {str(data)!r}, which cannot be written: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ConfigError(
                f"another one is running on {data} (process {file.read().strip()}); "
                "stop it, or set TAPELINE_DATA to another folder"
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
