"""The whole system as `scripts/up` starts it: one supervisor, `python -m services`, and all of its family."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

from tapeline.settings import EX_CONFIG

from services.process import STOP_GRACE_S
from tests import ROOT
from tests.stack import free_port, wait_until

UP_TIMEOUT_S: Final = 60.0
DOWN_TIMEOUT_S: Final = STOP_GRACE_S + 5


class System:
    """One supervisor; started again and again on the same folder and port."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = data.with_suffix(".log")
        self._running: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._running is not None
        return self._running

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def start(self, **settings: str) -> None:
        """Starts it; its output begins anew."""
        ours = ("TAPELINE_", "OTEL_", "OPENAI_", "ANTHROPIC_")
        environ = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
        environ |= {"TAPELINE_DATA": str(self.data), "TAPELINE_PORT": str(self.port), **settings}
        with self._log.open("wb") as log:
            self._running = subprocess.Popen(
                [sys.executable, "-m", "services"],
                cwd=ROOT,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def up(self, **settings: str) -> None:
        """Starts it, and waits until it says that it is ready."""
        self.start(**settings)
        ready = f"ready {self.url}\n"
        wait_until("up", lambda: ready in self.output or self.process.poll() is not None, UP_TIMEOUT_S)
        assert ready in self.output, self.output

    def down(self, number: signal.Signals = signal.SIGINT) -> None:
        """Ends it as asked, and makes sure that nothing of it is left."""
        family = self.family()
        self.process.send_signal(number)
        assert self.process.wait(DOWN_TIMEOUT_S) == 0, self.output
        assert all(is_gone(pid) for pid in family.values()), self.output

    def refused(self, **settings: str) -> str:
        """Starts it where it cannot run; the one line that it ends with."""
        self.start(**settings)
        assert self.process.wait(UP_TIMEOUT_S) == EX_CONFIG, self.output
        assert "Traceback" not in self.output
        own = [line for line in self.output.splitlines() if line.startswith("tapeline: ")]
        assert len(own) == 1, self.output
        return own[0]

    def wait_to_say(self, text: str) -> None:
        wait_until(f"says {text!r}", lambda: text in self.output)

    def has(self, name: str) -> bool:
        return name in self.family()

    def family(self) -> dict[str, int]:
        """The supervisor's children by name: the services and `nats-server`."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                command = (folder / "cmdline").read_bytes().split(b"\0")
            except (FileNotFoundError, ProcessLookupError):  # it has just ended
                continue
            if parent == self.process.pid and command != [b""]:
                name = next((part for part in command if part.startswith(b"services.")), command[0])
                found[name.decode().rpartition("/")[2].removeprefix("services.")] = int(folder.name)
        return found

    def end(self) -> None:
        """Whatever a test has left running."""
        if self._running and self._running.poll() is None:
            self._running.kill()
            self._running.wait()


def is_gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()
