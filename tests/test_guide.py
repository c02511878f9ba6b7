"""docs/first-worker.md, followed to the letter: a worker package in a folder and a venv of its own joins a running
system, is called, upgraded and removed, while the built-in pool goes on serving.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

import httpx
import jsonschema
import pytest
import yaml

from tests import ROOT
from tests.stack import wait_until
from tests.system import System
from tests.test_compose import specification

GUIDE: Final = ROOT / "docs" / "first-worker.md"
BLOCK_S: Final = 300.0  # one block of commands: making a venv, installing into it
SAID_S: Final = 60.0
ASKED_EVERY_S: Final = 0.2
SERVED_LEAST: Final = 20
PARCEL: Final = ("parcel_price", "What does a parcel cost?")

pytestmark = pytest.mark.timeout(900)  # two venvs are installed, from wherever packages come


class Block(NamedTuple):
    """A fenced block: commands (`sh`), what they print (`text`), or a file."""

    language: str
    file: str
    text: str


def blocks(text: str) -> list[Block]:
    found = re.findall(r"^```(\w+) ?(\S*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(*one) for one in found]


class Terminal:
    """One shell, as its user has it before him."""

    def __init__(self, folder: Path, environ: dict[str, str]) -> None:
        self._said = b""
        self._entered = 0
        self._shell = subprocess.Popen(
            ["bash", "-e", "-o", "pipefail"],
            cwd=folder,
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._shell.stdout is not None
        while chunk := os.read(self._shell.stdout.fileno(), 65_536):
            self._said += chunk
        self._shell.stdout.close()

    @property
    def said(self) -> str:
        """What was printed since the last commands were entered."""
        return self._said[self._entered :].decode(errors="replace")

    def enter(self, commands: str) -> None:
        """Runs the commands; fails where one of them does."""
        assert self._shell.stdin is not None
        self._entered = len(self._said)
        self._shell.stdin.write(f"{commands}\necho all of it was run\n".encode())
        self._shell.stdin.flush()
        wait_until(f"runs {commands}", lambda: "all of it was run" in self.said or not self.is_open, BLOCK_S)
        assert "all of it was run" in self.said, f"{commands}\n{self.said}"

    @property
    def is_open(self) -> bool:
        return self._shell.poll() is None

    def close(self) -> None:
        """Ends the shell and all that it has started."""
        os.killpg(self._shell.pid, signal.SIGKILL)
        self._shell.wait()
        self._reader.join()
        assert self._shell.stdin is not None
        self._shell.stdin.close()


class Others:
    """Somebody who asks for a built-in tool all the while."""

    def __init__(self, url: str) -> None:
        self.outcomes: list[str] = []
        self._url = url
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        with httpx.Client(base_url=self._url, timeout=30) as client:
            while not self._done.wait(ASKED_EVERY_S):
                answer = asked(client, "calculate", "calculate 2 + 3")
                results = [json.loads(data) for data in re.findall(r"^data: (.*tool_result.*)$", answer, re.MULTILINE)]
                self.outcomes += [f"{result['outcome']} {result.get('content')}" for result in results] or [answer]

    @contextmanager
    def asking(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._done.set()
            self._thread.join()


def asked(client: httpx.Client, tool: str, content: str) -> str:
    """The answer in a conversation of its own, in which that tool may be used, as it streams."""
    conversation = client.post("/v1/conversations", json={"tools": [tool]}).json()["id"]
    headers = {"Accept": "text/event-stream"}
    return client.post(f"/v1/conversations/{conversation}/messages", json={"content": content}, headers=headers).text


def package(folder: Path) -> None:
    """What the published package is made of, and nothing else of the repository."""
    folder.mkdir()
    shutil.copytree(ROOT / "shared", folder / "shared", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)


def outside() -> dict[str, str]:
    """The environment of somebody who has nothing of ours."""
    ours = ("TAPELINE_", "OTEL_", "PYTHON", "VIRTUAL_ENV", "PYTEST")
    return {key: value for key, value in os.environ.items() if not key.startswith(ours)}


class Image:
    """A Dockerfile carried out without an engine: a folder and a venv stand in for the image."""

    def __init__(self, repository: Path, folder: Path) -> None:
        self._environ = outside() | {"PATH": f"{folder / 'venv/bin'}:{os.environ['PATH']}"}
        self._command: list[str] = []
        self._folder = folder
        for line in (repository / "Dockerfile").read_text().splitlines():
            instruction, _, rest = line.partition(" ")
            match instruction:
                case "FROM":
                    assert re.fullmatch(r"python:3\.\d+-slim", rest)
                    venv.create(folder / "venv", with_pip=True)
                case "WORKDIR":
                    self._folder = folder / rest.lstrip("/")
                    self._folder.mkdir(parents=True)
                case "COPY":
                    self._copy(repository, *rest.split())
                case "RUN":
                    subprocess.run(["sh", "-ec", rest], cwd=self._folder, env=self._environ, check=True)
                case "CMD":
                    self._command = json.loads(rest)
                case _:
                    assert instruction == "USER", f"no way to do {line!r}"

    def _copy(self, repository: Path, source: str, target: str) -> None:
        if (repository / source).is_dir():
            shutil.copytree(repository / source, self._folder / target)
        else:
            shutil.copy(repository / source, self._folder / target)

    @contextmanager
    def running(self, log: Path, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
        """A container of it."""
        with log.open("wb") as out:
            process = subprocess.Popen(
                self._command, cwd=self._folder, env=self._environ | settings, stdout=out, stderr=subprocess.STDOUT
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def test_a_worker_of_somebody_else_joins_is_upgraded_and_leaves(tmp_path: Path) -> None:
    bash, curl = shutil.which("bash"), shutil.which("curl")
    if not (bash and curl):
        pytest.skip("bash or curl is not installed, so docs/first-worker.md was NOT followed")
    package(tmp_path / "tapeline")
    system = System(tmp_path / "tapeline" / ".tapeline")
    terminal = Terminal(tmp_path, outside())
    repository = tmp_path / "parcels"
    others = Others(system.url)
    try:
        system.up(TAPELINE_DEMO_DELAY_MS="1")
        with others.asking():
            for block in blocks(GUIDE.read_text()):
                follow(block, terminal, repository, system)
        terminal.enter('echo "id=$id"')
        id_ = terminal.said.partition("=")[2].split()[0]
        runs = httpx.get(f"{system.url}/v1/conversations/{id_}").json()["runs"]
        workers = [call["worker"] for run in runs for step in run["steps"] for call in step["calls"]]
        assert len(workers) == len(set(workers)) == 2, "the second answer is the new version's"
        assert set(others.outcomes) == {"ok 5"}, "the other pool serves on"
        assert len(others.outcomes) >= SERVED_LEAST
    finally:
        terminal.close()
        system.end()


def follow(block: Block, terminal: Terminal, repository: Path, system: System) -> None:
    """Does what the guide says."""
    if block.language == "sh":
        terminal.enter(block.text.replace("localhost:8080", system.url.removeprefix("http://")))
    elif block.language == "text":
        wait_until(f"{block.text} in {terminal.said}", lambda: block.text.strip() in terminal.said, SAID_S)
        if "tools ready" in block.text:
            with httpx.Client(base_url=system.url, timeout=30) as client:
                wait_until("the model is offered it", lambda: '"tool_call"' in asked(client, *PARCEL), SAID_S)
    else:
        assert block.file, f"a file without a name: {block.text}"
        (repository / block.file).write_text(block.text)
    if block.file == "compose.yaml":
        jsonschema.Draft202012Validator(specification()).validate(yaml.safe_load(block.text))
    if block.file == "Dockerfile":
        image = Image(repository, repository.parent / "image")
        name, _, url = (system.data / "tools.env").read_text().strip().partition("=")
        log = repository.parent / "image.log"
        with image.running(log, **{name: url}) as container:
            wait_until("the image's worker is ready", lambda: "tools ready: parcel_price" in log.read_text(), SAID_S)
            container.send_signal(signal.SIGTERM)
            assert container.wait(SAID_S) == 0, log.read_text()
