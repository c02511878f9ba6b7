"""The whole system on one machine, `python -m services`: up, down, and whatever may go wrong with it."""

import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final

import httpx
import pytest
from tapeline.settings import EX_CONFIG

from services.embedded import EmbeddedNats
from services.process import STOP_GRACE_S
from tests.stack import ROOT, free_port, wait_until

UP_TIMEOUT_S: Final = 40.0
DOWN_TIMEOUT_S: Final = STOP_GRACE_S + 5
SERVICES: Final = ("edge", "inference", "tools")

pytestmark = [
    pytest.mark.timeout(180),  # starts the system up to twice
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc"),
]


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


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    system = System(tmp_path / "data")
    yield system
    system.end()


def ask(url: str, conversation: str) -> str:
    """Sends a message in a new conversation; the types of its events, as they came."""
    assert httpx.post(f"{url}/v1/conversations", json={"id": conversation}).status_code == 201
    answer = httpx.post(
        f"{url}/v1/conversations/{conversation}/messages",
        json={"content": "Hello"},
        headers={"Accept": "text/event-stream"},
        timeout=30,
    )
    assert answer.status_code == 200, answer.text
    return " ".join(re.findall(r"^event: (\w+)$", answer.text, re.MULTILINE))


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False


def is_gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_up_down_and_up_again(system: System) -> None:
    system.up()
    family = system.family()
    assert sorted(family) == sorted([*SERVICES, "nats-server"])
    assert ask(system.url, "first").endswith(" done")
    tools_env = system.data / "tools.env"
    (setting,) = tools_env.read_text().splitlines()
    assert re.fullmatch(r"TAPELINE_NATS_URL=nats://127\.0\.0\.1:\d+", setting)
    assert stat.S_IMODE(tools_env.stat().st_mode) == 0o600

    system.down(signal.SIGINT)
    system.up()
    assert httpx.get(f"{system.url}/v1/conversations/first").status_code == 200
    assert tools_env.read_text().splitlines() == [setting]  # a worker from outside finds NATS where it was
    assert ask(system.url, "second").endswith(" done")
    system.down(signal.SIGTERM)
    assert "Traceback" not in system.output


def test_what_is_killed_is_started_again_and_that_is_said(system: System) -> None:
    system.up()
    for name in (*SERVICES, "nats-server"):
        killed = system.family()[name]
        os.kill(killed, signal.SIGKILL)
        called = "NATS" if name == "nats-server" else name
        system.wait_to_say(f"{called} was ended by SIGKILL; starting it again")
        wait_until(f"{name} again", partial(system.has, name))
        assert system.family()[name] != killed
    wait_until("the edge ready", lambda: is_ready(system.url))
    assert ask(system.url, "after").endswith(" done")
    system.down()


def test_everything_killed_at_once_comes_back(system: System) -> None:
    system.up()
    for pid in system.family().values():
        os.kill(pid, signal.SIGKILL)
    wait_until("the edge ready", lambda: is_ready(system.url))
    assert ask(system.url, "after").endswith(" done")
    system.down()


def test_nothing_outlives_a_killed_supervisor(system: System) -> None:
    system.up()
    family = system.family()
    system.process.kill()
    system.process.wait()
    for name, pid in family.items():
        wait_until(f"{name} gone", partial(is_gone, pid))
    system.up()
    system.down()


def test_a_second_one_on_the_same_folder_is_refused(system: System, tmp_path: Path) -> None:
    system.start()
    system.wait_to_say("starting NATS")
    second = System(tmp_path / "other")
    line = second.refused(TAPELINE_DATA=str(system.data))
    assert f"process {system.process.pid}" in line
    assert "TAPELINE_DATA" in line
    system.down()  # wherever it is on its way up


def test_a_port_in_use(system: System) -> None:
    with socket.create_server(("127.0.0.1", system.port)):
        line = system.refused()
    assert f"port {system.port} is in use by" in line
    assert f"(process {os.getpid()})" in line
    assert "TAPELINE_PORT" in line


@pytest.mark.parametrize("port", ["web", "0", "65536", "-1"])
def test_a_port_that_is_none(system: System, port: str) -> None:
    assert f"TAPELINE_PORT is '{port}'" in system.refused(TAPELINE_PORT=port)


def test_a_data_folder_that_cannot_be(system: System) -> None:
    system.data.write_text("a file")
    assert "TAPELINE_DATA" in system.refused()


def test_a_nats_that_cannot_be_reached(system: System) -> None:
    url = f"nats://127.0.0.1:{free_port()}"
    assert url in system.refused(TAPELINE_NATS_URL=url)


def test_a_missing_key(system: System) -> None:
    assert "OPENAI_API_KEY" in system.refused(TAPELINE_MODEL="openai:gpt-5")


def test_a_nats_of_ones_own_is_used_and_left_alone(system: System, tmp_path: Path) -> None:
    nats = EmbeddedNats(tmp_path / "nats")
    nats.start()
    try:
        system.up(TAPELINE_NATS_URL=nats.url)
        assert sorted(system.family()) == sorted(SERVICES)
        assert (system.data / "tools.env").read_text() == f"TAPELINE_NATS_URL={nats.url}\n"
        assert ask(system.url, "elsewhere").endswith(" done")
        system.down()
        assert nats.is_ready()
    finally:
        nats.stop()
