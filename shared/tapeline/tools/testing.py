"""Calling a tool as the worker would, without a server: for the tests of tool authors."""

import dataclasses
import json
import time
from typing import Any

from .context import Context, Flag, Progress
from .definition import AnyTool
from .desk import Desk
from .execution import Result, run

__all__ = ["Called", "Flag", "call_tool"]


@dataclasses.dataclass(frozen=True)
class Called(Result):
    """How the call ended, and what it said on the way: all its progress, in order, and its output."""

    progress: list[tuple[float | None, str]] = dataclasses.field(default_factory=list)
    output: str = ""


async def call_tool(
    tool: AnyTool,
    arguments: Any = None,
    *,
    call: str = "call",
    attempt: int = 1,
    timeout_s: float | None = None,
    stopped: Flag | None = None,
    stop_after: int | None = None,
) -> Called:
    """Calls `tool` with `arguments` as the model would give them, and never raises for what the tool does.

    What the worker would log is logged, by the loggers below `tapeline.tools`: pytest's `caplog` has it.

    Args:
        tool: What the decorator made.
        arguments: A dictionary of JSON values; none is `{}`. They arrive as JSON makes them, a tuple as a list.
        call: The call's id.
        attempt: From 1; what an idempotent tool sees when a worker was lost.
        timeout_s: Instead of the tool's own.
        stopped: Set it while the tool runs to stop the run.
        stop_after: Stops the run half-way: once the tool has said that many things, progress or output.

    Raises `TypeError` or `ValueError` for arguments that no model can send, bytes, dates or NaN for example.
    """
    given = json.loads(json.dumps({} if arguments is None else arguments, allow_nan=False))
    stop = Flag() if stopped is None else stopped
    progress: list[tuple[float | None, str]] = []
    output: list[str] = []

    def say(said: Progress | str) -> None:
        if isinstance(said, Progress):
            progress.append((said.fraction, said.message))
        else:
            output.append(said)
        if stop_after is not None and len(progress) + len(output) >= stop_after:
            stop.set()

    context = Context(
        tool=tool.name,
        call=call,
        deadline=time.time() + (tool.timeout_s if timeout_s is None else timeout_s),
        attempt=attempt,
        stopped=stop,
        say=say,
    )
    result = await run(Desk(tool), given, context)
    content = result.content if result.large is None else json.loads(result.large.data)
    return Called(result.outcome, content, result.message, progress=progress, output="".join(output))
