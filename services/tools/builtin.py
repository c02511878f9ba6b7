"""The built-in tools: enough for a demo and for tests, each of a different kind."""

import asyncio
import datetime
import itertools
import re
import secrets
import time
import zoneinfo
from collections.abc import Generator
from typing import Annotated, Any, Final

from msgspec import Meta
from tapeline.tools import Context, ToolError, tool

from .arithmetic import BadExpression, evaluate
from .notes import NOTES

SAFE_INTEGER_MAX: Final = 2**53  # beyond it, JSON readers lose digits


@tool(idempotent=True, timeout_s=10)
def clock(timezone: str = "UTC") -> dict[str, str]:
    """The current date and time.

    Args:
        timezone: IANA name of the time zone, such as Europe/Lisbon.
    """
    try:
        now = datetime.datetime.now(zoneinfo.ZoneInfo(timezone))
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ToolError(f"there is no time zone {timezone[:60]!r}") from error
    return {"time": now.isoformat(timespec="seconds"), "weekday": f"{now:%A}", "timezone": timezone}


@tool(idempotent=True, timeout_s=10)
def calculate(expression: str) -> int | float | str:
    """Calculates an arithmetic expression exactly where it can.

    Knows + - * / // % **, parentheses, abs, ceil, cos, exp, floor, log, log10, max, min, round, sin, sqrt, tan,
    and e, pi, tau. A whole number too large for JSON is given as text.

    Args:
        expression: Such as `(3 + 4) * 2 ** 10`.
    """
    try:
        value = evaluate(expression)
    except BadExpression as error:
        raise ToolError(str(error)) from error
    return str(value) if isinstance(value, int) and abs(value) > SAFE_INTEGER_MAX else value


@tool(idempotent=True, timeout_s=60)
async def search_notes(
    query: Annotated[str, Meta(min_length=1, max_length=200, description="Words to look for.")],
    context: Context,
    seconds: Annotated[float, Meta(ge=0, le=30, description="How long to take over it.")] = 4,
) -> dict[str, Any]:
    """Searches a small collection of notes about how Tapeline works. Takes a few seconds and says how far it is."""
    words = set(re.findall(r"\w+", query.lower()))
    found: list[tuple[int, str, str]] = []
    for number, (title, text) in enumerate(NOTES):
        await context.progress(number / len(NOTES), f"reading “{title}”, {len(found)} found")
        try:
            async with asyncio.timeout(seconds / len(NOTES)):
                await context.stopped.wait()
                break
        except TimeoutError:
            pass
        said = re.findall(r"\w+", f"{title} {text}".lower())
        if score := sum(said.count(word) for word in words):
            found.append((score, title, text))
    found.sort(key=lambda note: (-note[0], note[1]))
    await context.progress(1.0, f"{len(found)} found")
    return {"query": query, "notes": [{"title": title, "text": text} for _, title, text in found[:5]]}


@tool(idempotent=True, timeout_s=60)
def collatz(
    start: Annotated[int, Meta(ge=1, le=1_000_000, description="The number to start from.")] = 27,
    seconds: Annotated[float, Meta(ge=0, le=30, description="How long to take over it.")] = 6,
) -> Generator[str | float, None, dict[str, int]]:
    """Walks from a number down to 1: half of it where it is even, else three times it and one. Shows each step."""
    walk = [start]
    while walk[-1] != 1:
        walk.append(walk[-1] * 3 + 1 if walk[-1] % 2 else walk[-1] // 2)
    for number, (one, next_one) in enumerate(itertools.pairwise(walk), start=1):
        yield f"{one} → {next_one}\n"
        yield number / len(walk)
        time.sleep(seconds / len(walk))
    return {"start": start, "steps": len(walk) - 1, "highest": max(walk)}


@tool(needs_approval=True)
def draw_lots(
    names: Annotated[list[str], Meta(min_length=1, max_length=100, description="Whom or what to choose from.")],
) -> dict[str, str]:
    """Draws one of the names by lot, once and for good: what is drawn stands in the log, and nobody can draw it again.

    Asks for approval, for that reason.
    """
    return {"drawn": secrets.choice(names)}


@tool(idempotent=True, timeout_s=10)
def fail(message: str = "this tool always fails") -> None:
    """Always fails, for trying out what a failing tool looks like.

    Args:
        message: What it says as it fails.
    """
    raise ToolError(message)
