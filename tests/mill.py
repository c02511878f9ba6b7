"""Tools for the chaos, which do the same whenever they are run: one in a process of its own, one whose result is large.

A module of their own, since a worker with a tool for processes starts a server to fork them from.
"""

import os
import time
from collections.abc import Iterator
from typing import Annotated, Final

from msgspec import Meta
from tapeline.tools import Context, tool

from tests.toolbox import note, rows

FLOUR: Final = [f"grain {number}\n" for number in range(30)]
BALE_BYTES: Final = 600_000  # more than an event holds


@tool(process=True, idempotent=True)
def grind(context: Context) -> Iterator[str]:
    """Puts out line after line in a process."""
    note(f"pid {os.getpid()}", context)
    for line in FLOUR:
        yield line
        time.sleep(0.05)


@tool(idempotent=True)
def bale(size: Annotated[int, Meta(ge=BALE_BYTES)]) -> list[str]:
    """Returns JSON of about that many bytes."""
    return rows(size)
