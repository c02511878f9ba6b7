"""Tools for the tests of the worker. What they do, they write to the file that TOOLBOX_JOURNAL names."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

from tapeline.tools import Context, ToolError, tool


def note(word: str, context: Context) -> None:
    with Path(os.environ["TOOLBOX_JOURNAL"]).open("a") as journal:
        journal.write(f"{word} {context.call} {context.attempt}\n")


@tool(idempotent=True)
def add(a: int, b: int, context: Context) -> int:
    """Adds two numbers."""
    note("add", context)
    return a + b


@tool
def broken() -> None:
    """Raises what the tool author did not foresee."""
    raise ValueError("password hunter2")


@tool
def refuse(message: str) -> None:
    """Raises what the tool author wants the model to read."""
    raise ToolError(message)


@tool
async def count(to: int, pause_s: float, context: Context) -> int:
    """Counts, saying how far it is."""
    for number in range(to):
        await context.progress((number + 1) / to, f"{number + 1} of {to}")
        await asyncio.sleep(pause_s)
    return to


@tool(name="recite-aloud", idempotent=True)
async def recite(lines: int, pause_s: float, context: Context) -> AsyncIterator[str]:
    """Puts out line after line; without a pause where a worker was lost."""
    for number in range(lines):
        yield f"line {number}\n"
        await asyncio.sleep(pause_s if context.attempt == 1 else 0)


@tool
async def once(seconds: float, context: Context) -> str:
    """Has an effect that must not happen twice."""
    note("once", context)
    await asyncio.sleep(seconds)
    return "done"


@tool
async def both_ends(seconds: float, context: Context) -> None:
    """Notes when it ends as well."""
    note("begun", context)
    await asyncio.sleep(seconds)
    note("ended", context)


@tool(idempotent=True)
async def again(seconds: float, context: Context) -> str:
    """May be run again."""
    note("again", context)
    await asyncio.sleep(seconds if context.attempt == 1 else 0)
    return "done"


@tool(idempotent="TOOLBOX_REVISED" in os.environ)
async def revised(seconds: float, context: Context) -> str:
    """May be run again in its second version only."""
    note("revised", context)
    await asyncio.sleep(seconds if context.attempt == 1 else 0)
    return "done"


@tool(max_concurrency=1)
async def alone(seconds: float, context: Context) -> str:
    """One at a time."""
    note("alone", context)
    await asyncio.sleep(seconds)
    return "done"


@tool
async def stubborn(seconds: float, context: Context) -> None:
    """Does not let itself be cancelled."""
    note("stubborn", context)
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        try:
            await asyncio.sleep(0.1)
        except asyncio.CancelledError:
            continue


@tool
def block(seconds: float, context: Context) -> bool:
    """Blocks its thread; says whether it was stopped."""
    note("block", context)
    return context.stopped.wait_in_thread(seconds)


@tool
def stuck(seconds: float, context: Context) -> None:
    """Blocks its thread and looks at nothing."""
    note("stuck", context)
    time.sleep(seconds)


@tool(idempotent=True)
def large(size: int) -> list[str]:
    """Returns JSON of about that many bytes."""
    return rows(size)


def rows(size: int) -> list[str]:
    """What `large` returns: no two parts of it are the same, and its characters are of one to four bytes."""
    return [f'{number:012} "é" €\\😀' + "x" * 969 for number in range(size // 1000)]
