"""The whole system on one machine, `python -m services`: up, down, and whatever may go wrong with it."""

import json
import os
import re
import signal
import socket
import stat
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final

import httpx
import pytest
from tapeline import subjects
from tapeline.connection import Denied, connect
from tapeline.record import Entry
from tapeline.tape import Tape

from services.embedded import EmbeddedNats
from tests.stack import free_port, wait_until
from tests.system import System, is_gone

SERVICES: Final = ("edge", "inference", "tools")

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc")


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


def test_up_down_and_up_again(system: System) -> None:
    system.up()
    family = system.family()
    assert sorted(family) == sorted([*SERVICES, "nats-server"])
    assert ask(system.url, "first").endswith(" done")
    tools_env = system.data / "tools.env"
    (setting,) = tools_env.read_text().splitlines()
    assert re.fullmatch(r"TAPELINE_NATS_URL=nats://tools:\w+@127\.0\.0\.1:\d+", setting)
    for secret in (
        tools_env,
        system.data / "auditor.env",
        system.data / "secrets.json",
        system.data / "nats/nats.conf",
    ):
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600, secret
    for password in json.loads((system.data / "secrets.json").read_text()).values():
        assert password not in system.output
        assert password not in (system.data / "nats/nats.log").read_text()

    system.down(signal.SIGINT)
    system.up()
    assert httpx.get(f"{system.url}/v1/conversations/first").status_code == 200
    assert tools_env.read_text().splitlines() == [setting]  # a worker from outside finds NATS where it was
    assert ask(system.url, "second").endswith(" done")
    system.down(signal.SIGTERM)
    assert "Traceback" not in system.output


async def test_nobody_comes_in_without_credentials_and_a_workers_cannot_forge(system: System) -> None:
    system.up()
    ask(system.url, "real")
    url = (system.data / "tools.env").read_text().strip().partition("=")[2]
    with pytest.raises(Denied, match="does not accept these credentials"):
        await connect(re.sub(r"//.*@", "//", url), "stranger")
    tape = await Tape.open(url, "worker")
    try:
        last = await tape.last("real")
        for kind in (subjects.INPUT, subjects.MODEL, subjects.MODEL_DELTA, subjects.call("clock")):
            with pytest.raises(Denied):
                await tape.append("real", Entry(kind, b'{"type":"token","text":"forged"}'), last)
        assert await tape.last("real") == last
    finally:
        await tape.close()
    system.down()


def test_a_folder_of_before_there_were_credentials_keeps_its_conversations(system: System) -> None:
    nats = EmbeddedNats(system.data / "nats")
    nats.start()
    try:
        system.data.mkdir(exist_ok=True)
        elsewhere = System(system.data.with_name("elsewhere"))
        elsewhere.up(TAPELINE_NATS_URL=nats.url)
        assert ask(elsewhere.url, "old").endswith(" done")
        elsewhere.down()
    finally:
        nats.stop()
    (system.data / "tools.env").write_text(f"TAPELINE_NATS_URL={nats.url}\n")
    system.up()
    assert (system.data / "tools.env").read_text().strip().endswith(f":{nats.port}")
    answer = httpx.get(f"{system.url}/v1/conversations/old")
    assert answer.status_code == 200
    assert ask(system.url, "new").endswith(" done")
    system.down()


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


def test_a_log_level_that_is_none(system: System) -> None:
    assert "TAPELINE_LOG is 'LOUD'; it must be one of CRITICAL" in system.refused(TAPELINE_LOG="loud")


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
