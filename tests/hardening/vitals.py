"""What an edge holds at the moment: memory, open files, streams."""

from typing import Final, NamedTuple

from tests.client import Client
from tests.crowd import files, kib
from tests.stack import Process, until

GROWTH_BYTES_MAX: Final = 48 << 20
"""Of an edge's memory in one attack. One that is warm has some 70 MB; most attacks send more than this."""


class Vitals(NamedTuple):
    """What a process holds."""

    rss_bytes: int
    files: int

    @classmethod
    def of(cls, process: Process) -> "Vitals":
        return cls(int(kib(process.popen.pid) * 1024), files(process.popen.pid))


async def open_streams(client: Client) -> int:
    """As the edge counts them."""
    return int(await client.metric("tapeline_streams_open"))


async def streams_are(client: Client, count: int) -> None:
    """Waits until so many are open."""

    async def are() -> bool:
        return await open_streams(client) == count

    await until(f"{count} streams are open", are)
