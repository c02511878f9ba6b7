"""Whether the edge's port can be had, asked before anything starts, so that the answer is one clear line."""

import errno
import socket
from pathlib import Path

from tapeline.settings import ConfigError


def check(host: str, port: int) -> None:
    """Raises `ConfigError` if no server could listen there."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ConfigError(f"TAPELINE_HOST is {host!r}: {error.strerror}") from error
    for family, kind, protocol, _, address in addresses:
        with socket.socket(family, kind, protocol) as probe:
            # As servers do: a port that a server has just left is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
                probe.listen()
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise ConfigError(
                        f"port {port} is in use by {_holder(port)}; stop it, or set TAPELINE_PORT to another"
                    ) from error
                raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}") from error


def _holder(port: int) -> str:
    """Names the process that listens on the port, where the system lets us see it (Linux, our own user)."""
    sockets = {f"socket:[{inode}]" for inode in _listening(port)}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if any(str(open_file.readlink()) in sockets for open_file in (folder / "fd").iterdir()):
                return f"{(folder / 'comm').read_text().strip()} (process {folder.name})"
        except OSError:  # another user's, or gone by now
            continue
    return "another program"


def _listening(port: int) -> set[str]:
    listen_state = "0A"
    inodes = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        if not table.exists():
            continue
        for row in table.read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = row.split()[:10]
            if state == listen_state and int(local.rpartition(":")[2], 16) == port:
                inodes.add(inode)
    return inodes
