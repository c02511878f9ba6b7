"""Our services as processes, forked from one that has imported what they import: a second of CPU less for each of the
hundreds that the tests start. What runs is what `python -m` would run, and it ends as that would.

Not that of `multiprocessing`: its processes end in a way of their own, and whoever started them waits for them.

Elsewhere than on Linux, for other modules and where something is measured, it is `python -m`.
"""

import atexit
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from services.process import bind_to, spawn_options
from tests import ROOT

FORKED: Final = ("services.edge", "services.inference", "services.tools", "tapeline.tools")
IMPORTED: Final = (
    "services.edge.app",
    "services.inference.app",
    "services.inference.provider",
    "pydantic_ai.models.anthropic",
    "pydantic_ai.models.openai",
    "services.tools.builtin",
    "tapeline.tools.worker",
)
"""What those import, or do as soon as they are asked for a model."""


class Running(Protocol):
    """What of `subprocess.Popen` there is."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, number: int) -> None: ...
    def kill(self) -> None: ...


def spawn(command: Sequence[str], env: Mapping[str, str], out: Path, err: Path) -> Running:
    """Runs a module with these arguments, in the root of the repository and a session of its own; what it writes is
    appended to these files. It is killed when this process ends.
    """
    for file in (out, err):
        file.touch()
    if sys.platform == "linux" and command[0] in FORKED and "PYTEST_VERSION" in os.environ:
        return _server.spawn(list(command), dict(env), str(out), str(err))
    with out.open("ab") as stdout, err.open("ab") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            **spawn_options(),
        )


class _Forked:
    """A child of the server, which tells how it has ended."""

    def __init__(self, server: "_Server", pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._server = server
        self._end = os.pidfd_open(pid)

    def poll(self) -> int | None:
        return self._look(0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._look(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _look(self, timeout_s: float | None) -> int | None:
        if self.returncode is None:
            look = select.poll()
            look.register(self._end, select.POLLIN)
            if look.poll(None if timeout_s is None else timeout_s * 1000):
                self.returncode = self._server.ask("wait", self.pid)
                os.close(self._end)
        return self.returncode


class _Server:
    """This side of it. It is started when it is needed."""

    def __init__(self) -> None:
        self._popen: subprocess.Popen[bytes] | None = None
        self._turn = threading.Lock()

    def spawn(self, *what: Any) -> _Forked:
        return _Forked(self, self.ask("spawn", *what))

    def ask(self, *what: Any) -> int:
        with self._turn:
            if self._popen is None:
                self._popen = subprocess.Popen(
                    [sys.executable, "-u", "-m", __name__],
                    cwd=ROOT,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    start_new_session=True,  # and not bound to this thread: it ends when nobody can ask any more
                )
                atexit.register(self._popen.communicate)
            assert self._popen.stdin is not None
            assert self._popen.stdout is not None
            self._popen.stdin.write(json.dumps(what).encode() + b"\n")
            self._popen.stdin.flush()
            return int(self._popen.stdout.readline())


_server: Final = _Server()


# In the server


def _serve() -> list[str]:
    """Does what is asked for, until nobody can ask. Returns in each process that is forked: what it has to run."""
    for module in IMPORTED:
        importlib.import_module(module)
    assert threading.active_count() == 1, "a fork would have one thread of them"
    server = os.getpid()
    for line in sys.stdin.buffer:
        match json.loads(line):
            case "spawn", command, env, out, err:
                pid = os.fork()
                if pid == 0:
                    bind_to(server)
                    os.setsid()
                    for number, name, flags in ((0, os.devnull, os.O_RDONLY), (1, out, _APPEND), (2, err, _APPEND)):
                        os.dup2(file := os.open(name, flags, 0o600), number)
                        os.close(file)
                    os.environ.clear()
                    os.environ.update(env)
                    return list(command)
                print(pid)
            case "wait", pid:
                print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    sys.exit()


_APPEND: Final = os.O_WRONLY | os.O_CREAT | os.O_APPEND

if __name__ == "__main__":
    module, *arguments = _serve()
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)
