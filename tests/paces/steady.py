"""A pool whose calls take a fifth of a second, and have an effect: a line in the file that PACES_JOURNAL names."""

import asyncio
import os
from pathlib import Path

from tapeline.tools import Context, tool


def note(call: str) -> None:
    with Path(os.environ["PACES_JOURNAL"]).open("a") as journal:
        journal.write(f"{call}\n")


@tool
async def steady(context: Context) -> str:
    """Does what must not be done twice."""
    await asyncio.sleep(0.2)
    note(context.call)
    return "steady"
