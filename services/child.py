"""One service as a child process: its output, its end, and its next start.

Owns what the terminal shows, a line at a time under the name of who said it.
"""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import Final

from tapeline.settings import EX_CONFIG, ConfigError

from .process import STOP_GRACE_S, ending, signal_group, spawn_options

RESTART_DELAY_S: Final = (0.2, 10.0)  # the first, and the longest after doublings
STEADY_S: Final = 30.0  # what has run this long starts again with the first delay
LINE_BYTES_MAX: Final = 64 << 10  # a longer line of output is broken
OUTPUT_GRACE_S: Final = 1.0  # how long the output of an ended service may still be held open by others
NAME_WIDTH: Final = len("inference")


class NotReady(Exception):
    """The system did not come up. The message says which part."""


def say(text: str, name: str = "tapeline") -> None:
    """Prints a line under the name of who says it."""
    print(f"{name:<{NAME_WIDTH}} | {text}", flush=True)


class Child:
    """One service as a process, and its output."""

    def __init__(self, name: str, environ: Mapping[str, str]) -> None:
        self.name = name
        self.environ = environ
        self.ready = asyncio.Event()
        self.proven = False
        """The system has been ready with it: what stops it from now on, such as NATS being away, can pass."""
        self._process: asyncio.subprocess.Process | None = None
        self._last_line = "it gave no reason"

    async def once(self) -> None:
        """Runs it to its end. Raises `ConfigError` or `NotReady` if that is not success."""
        code = await self._run()
        if code:
            raise NotReady(f"{self.name} {ending(code)}: {self._last_line}")

    async def keep(self) -> None:
        """Runs it for ever, again whenever it ends unasked. Raises `ConfigError` if it calls that no use."""
        backoff = Backoff()
        while True:
            backoff.started()
            code = await self._run()
            delay_s = backoff.next_s()
            say(f"{self.name} {ending(code)}; starting it again in {delay_s:g} s")
            await asyncio.sleep(delay_s)

    def kill(self) -> None:
        if self._process is not None:
            signal_group(self._process.pid, signal.SIGKILL)

    async def _run(self) -> int:
        # A pipe of our own: asyncio's would make the child's end wait for whatever else still holds the pipe.
        reading, writing = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", f"services.{self.name}"),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=writing,
                stderr=writing,
                env=self.environ,
                **spawn_options(),
            )
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        self._process = process
        output = asyncio.create_task(self._forward(reading))
        try:
            code = await process.wait()
        finally:
            await self._end(process)
            self._process = None
            await asyncio.wait([output], timeout=OUTPUT_GRACE_S)
            output.cancel()
        if code == EX_CONFIG and not self.proven:
            raise ConfigError(self._last_line)
        return code

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it ended this moment
                os.kill(process.pid, signal.SIGTERM)
            try:
                async with asyncio.timeout(STOP_GRACE_S):
                    await process.wait()
            except TimeoutError:
                say(f"{self.name} did not stop within {STOP_GRACE_S:.0f} s; killing it")
        signal_group(process.pid, signal.SIGKILL)  # with whatever it has started and left behind
        await process.wait()

    async def _forward(self, descriptor: int) -> None:
        output = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(output), os.fdopen(descriptor, "rb", buffering=0)
        )
        with contextlib.closing(transport):
            pending = b""
            while chunk := await output.read(LINE_BYTES_MAX):
                *lines, pending = (pending + chunk).split(b"\n")
                if len(pending) > LINE_BYTES_MAX:
                    lines.append(pending)
                    pending = b""
                for line in lines:
                    self._heard(line)
            self._heard(pending)

    def _heard(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        if not text:
            return
        self._last_line = text
        if " ready" in text:
            self.ready.set()
        say(text, self.name)


class Backoff:
    """How long to wait before a process is started again: longer each time, until it has run steadily."""

    def __init__(self) -> None:
        self._first_s, self._longest_s = RESTART_DELAY_S
        self._next_s = self._first_s
        self._started_at = time.monotonic()

    def started(self) -> None:
        self._started_at = time.monotonic()

    def next_s(self) -> float:
        if time.monotonic() - self._started_at >= STEADY_S:
            self._next_s = self._first_s
        delay_s = self._next_s
        self._next_s = min(delay_s * 2, self._longest_s)
        return delay_s
