"""The proxies of docs/deploy as real processes, each with the very file that is deployed, before two edges.

Only what names the machine is replaced: addresses, ports, and where certificates, logs and pid are.
"""

import os
import shutil
import signal
import socket
import ssl
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Final

import httpx
import pytest

from tests import ROOT
from tests.client import Client
from tests.stack import free_port, wait_until

DEPLOY: Final = ROOT / "docs" / "deploy"
KEY: Final = "ann-secret"
READER: Final = "127.0.0.2"  # any address of 127.0.0.0/8 may ask
EDGES: Final = ("10.0.0.11:8080", "10.0.0.12:8080")  # in each of the files


def program(name: str) -> str:
    """Where it is. Without it the tests are skipped, but not in CI."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    if found:
        return found
    reason = f"docs/deploy is NOT tested with {name}: not on this machine (Debian: apt-get install {name})"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def replaced(text: str, replacements: Mapping[str, str]) -> str:
    """The text with each of these, which has to be there once, replaced."""
    for old, new in replacements.items():
        assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
        text = text.replace(old, new)
    return text


class Certificate:
    """One for 127.0.0.1 that signs itself."""

    def __init__(self, folder: Path) -> None:
        self.certificate, self.key, self.both = (folder / name for name in ("tls.crt", "tls.key", "tls.pem"))
        request = [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-subj", "/CN=tapeline", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"),
            *("-keyout", str(self.key), "-out", str(self.certificate)),
        ]
        subprocess.run(request, check=True, capture_output=True, timeout=30)
        self.both.write_text(self.certificate.read_text() + self.key.read_text())

    def trusted(self) -> ssl.SSLContext:
        """How a client knows it."""
        return ssl.create_default_context(cafile=str(self.certificate))


class Proxy(ABC):
    """One proxy before two edges, over TLS on a port of its own. `changes` are further replacements."""

    name: ClassVar[str]

    def __init__(
        self, folder: Path, certificate: Certificate, ports: Sequence[int], changes: Mapping[str, str] | None = None
    ) -> None:
        self.port = free_port()
        self.folder = folder
        self.certificate = certificate
        self.edges = dict(zip(EDGES, (f"127.0.0.1:{port}" for port in ports), strict=True))
        self._changes = changes or {}
        self._log = folder / "proxy.out"
        command = self.command(program(self.name))
        with self._log.open("ab") as out:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, "HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        try:
            wait_until(f"{self.name} listens", self._listens)
        except BaseException:
            self.stop()
            raise

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def render(self, name: str, replacements: Mapping[str, str]) -> Path:
        """A file of docs/deploy as this test runs it."""
        text = (DEPLOY / name).read_text()
        changes = {old: new for old, new in self._changes.items() if old in text}
        rendered = self.folder / name
        rendered.write_text(replaced(text, {**replacements, **changes}))
        return rendered

    @abstractmethod
    def command(self, found: str) -> list[str]:
        """Writes the configuration; how the proxy is started with it, in the foreground."""

    def logs(self) -> str:
        """All that it has logged."""
        return "".join(path.read_text(errors="replace") for path in [self._log, *self.folder.glob("*.log")])

    def stop(self) -> None:
        """At once; the kernel closes what is open."""
        if self._process.poll() is None:
            self._end()
        self._process.wait(15)

    def _end(self) -> None:
        self._process.send_signal(signal.SIGKILL)

    def _listens(self) -> bool:
        assert self._process.poll() is None, f"{self.name} ended: {self.logs()}"
        with socket.socket() as one:
            return one.connect_ex(("127.0.0.1", self.port)) == 0


class Nginx(Proxy):
    """Debian's `nginx`."""

    name = "nginx"

    def command(self, found: str) -> list[str]:
        self.render(
            "site.conf",
            {
                **self.edges,
                "listen 443": f"listen 127.0.0.1:{self.port}",
                "/etc/nginx/tls.crt": str(self.certificate.certificate),
                "/etc/nginx/tls.key": str(self.certificate.key),
            },
        )
        logs = {f"/var/log/nginx/{one}.log": f"{self.folder}/{one}.log" for one in ("access", "error")}
        config = self.render("nginx.conf", {**logs, "worker_processes auto": "worker_processes 2"})
        temporary = " ".join(
            f"{one}_temp_path {self.folder}/{one};" for one in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        config.write_text(config.read_text().replace("http {", f"http {{ {temporary}", 1))
        ours = f"daemon off; pid {self.folder}/nginx.pid; " + ("user root;" if os.getuid() == 0 else "")
        return [found, "-p", str(self.folder), "-c", str(config), "-e", str(self.folder / "error.log"), "-g", ours]

    def _end(self) -> None:
        self._process.send_signal(signal.SIGTERM)  # killed, it would leave its workers behind


class Haproxy(Proxy):
    """Debian's `haproxy`."""

    name = "haproxy"

    def command(self, found: str) -> list[str]:
        own = {
            "bind :443": f"bind 127.0.0.1:{self.port}",
            "/etc/haproxy/tls.pem": str(self.certificate.both),
            "server here unix@/run/haproxy": f"server here unix@{self.folder}",
            "bind unix@/run/haproxy": f"bind unix@{self.folder}",
        }
        return [found, "-db", "-f", str(self.render("haproxy.cfg", {**self.edges, **own}))]


class Caddy(Proxy):
    """Debian's `caddy`."""

    name = "caddy"

    def command(self, found: str) -> list[str]:
        tls = f"tls {self.certificate.certificate} {self.certificate.key}"
        own = {
            "\n{\n": f"\n{{\n\tadmin off\n\thttp_port {free_port()}\n",
            "chat.example.com {": f"{self.url} {{\n\t{tls}",
        }
        return [
            found,
            "run",
            "--adapter",
            "caddyfile",
            "--config",
            str(self.render("Caddyfile", {**self.edges, **own})),
        ]


PROXIES: Final = (Nginx, Haproxy, Caddy)


def through(proxy: Proxy, connections: int | None = None, *, http2: bool = True) -> Client:
    """A user of the proxy, at an address of its own, over so many connections at most."""
    transport = httpx.AsyncHTTPTransport(
        http2=http2,
        verify=proxy.certificate.trusted(),
        local_address=READER,
        limits=httpx.Limits(max_connections=connections),
        trust_env=False,
    )
    return Client(proxy.url, KEY, transport)
