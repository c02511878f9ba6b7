"""Calling a tool as the worker would, without a server: for the tests of tool authors."""

import dataclasses
import time
from typing import Any

from .context import Context, Flag
from .definition import AnyTool
from .execution import Result, run

__all__ = ["Called", "Flag", "call_tool"]


@dataclasses.dataclass(frozen=True)
class Called(Result):
    """How the call ended, and the progress it reported on the way, all of it, in order."""

    progress: list[tuple[float | None, str]] = dataclasses.field(default_factory=list)


async def call_tool(
    tool: AnyTool,
    arguments: Any = None,
    *,
    call: str = "call",
    attempt: int = 1,
    timeout_s: float | None = None,
    stopped: Flag | None = None,
) -> Called:
    """Calls `tool` with `arguments` as the model would give them, and never raises for what the tool does.

    Args:
        tool: What the decorator made.
        arguments: A dictionary of JSON values; none is `{}`.
        call: The call's id.
        attempt: From 1; what an idempotent tool sees when a worker was lost.
        timeout_s: Instead of the tool's own.
        stopped: Set it while the tool runs to stop the run.
    """
    progress: list[tuple[float | None, str]] = []
    context = Context(
        tool=tool.name,
        call=call,
        deadline=time.time() + (tool.timeout_s if timeout_s is None else timeout_s),
        attempt=attempt,
        stopped=stopped,
        say=lambda fraction, message: progress.append((fraction, message)),
    )
    result = await run(tool, {} if arguments is None else arguments, context)
    return Called(result.outcome, result.content, result.message, progress)
