"""What an edge holds at the moment: memory, open files, streams."""

import asyncio
import os
from pathlib import Path
from typing import Final, NamedTuple

from tests.client import Client
from tests.stack import POLL_S, Process

GROWTH_BYTES_MAX: Final = 48 << 20
"""Of an edge's memory in one attack. One that is warm has some 70 MB; most attacks send more than this."""
CLOSED_S: Final = (
    20.0  # within which an edge has come to the end of what was opened, and knows that its readers have gone
)


class Vitals(NamedTuple):
    """What a process holds."""

    rss_bytes: int
    files: int

    @classmethod
    def of(cls, process: Process) -> "Vitals":
        proc = Path(f"/proc/{process.popen.pid}")
        pages = int((proc / "statm").read_text().split()[1])
        return cls(pages * os.sysconf("SC_PAGE_SIZE"), len(list((proc / "fd").iterdir())))


async def open_streams(client: Client) -> int:
    """As the edge counts them."""
    lines = (await client.http.get("/metrics")).text.splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith("tapeline_streams_open"))


async def streams_are(client: Client, count: int) -> None:
    """Waits until so many are open."""
    async with asyncio.timeout(CLOSED_S):
        while await open_streams(client) != count:
            await asyncio.sleep(POLL_S)
