"""Tools that misbehave, for the tests of what a worker makes of them."""

import asyncio
import os
import signal
import threading
import time
from typing import Any

import msgspec
from tapeline import limits
from tapeline.tools import Context, tool

from tests.toolbox import add, note

__all__ = ["add"]

for limit in ("TOOL_LOOP_BLOCKED_S", "TOOL_STUCK_S"):  # which are too long for a test
    if seconds := os.environ.get(limit):
        vars(limits)[limit] = float(seconds)


@tool
async def block_the_loop(seconds: float) -> None:
    """Is async and blocks all the same."""
    time.sleep(seconds)  # noqa: ASYNC251 - that is what it is for


@tool
async def be_quick() -> str:
    """Does nothing wrong."""
    return "done"


@tool
async def never_async() -> None:
    """Never returns."""
    await asyncio.Event().wait()


@tool
def never() -> None:
    """Never returns, and cannot be cancelled."""
    while True:
        time.sleep(0.1)


class Load(msgspec.Struct):
    """Takes for ever to be made."""

    kg: int

    def __post_init__(self) -> None:
        never()


@tool
def weigh(load: Load) -> int:
    """Never has its arguments."""
    return load.kg


weigh_in_a_process = tool(process=True, name="weigh_in_a_process")(weigh.function)


@tool(max_concurrency=2)
def never_twice(context: Context) -> None:
    """Never returns, and is asked for more often than it has places."""
    note("never", context)
    threading.Event().wait()


class Stuck:
    """What never becomes JSON."""

    def model_dump(self, mode: str) -> None:
        never()


@tool
def never_json() -> Any:
    """Returns what never becomes JSON."""
    return Stuck()


@tool(process=True)
def never_in_a_process(context: Context) -> None:
    """Never returns, and keeps a CPU busy."""
    note(f"pid {os.getpid()}", context)
    while True:
        pass


@tool(process=True)
def pulse(context: Context) -> str:
    """Says how far it is until it is stopped."""
    for number in range(600):
        context.progress(number / 600, f"pulse {number}")
        context.log.warning("heard from a process")
        if context.stopped.wait_in_thread(0.1):
            return "stopped"
    return "done"


@tool
def tick(seconds: float, context: Context) -> str:
    """Says in a thread how far it is."""
    for number in range(int(seconds * 10)):
        context.progress(None, f"tick {number}")
        time.sleep(0.1)
    return "done"


@tool(process=True)
def exit_in_a_process(code: int) -> None:
    """Ends its process."""
    os._exit(code)


@tool(process=True)
async def crash_in_a_process() -> None:
    """Crashes its process."""
    os.kill(os.getpid(), signal.SIGSEGV)


@tool(process=True)
def leak_in_a_process() -> None:
    """Fails with a secret."""
    raise RuntimeError("password hunter2")


@tool(idempotent=True)
def end_the_worker(context: Context) -> None:
    """Ends the whole worker, and may be run again."""
    note("end", context)
    os._exit(3)


@tool
async def end_the_worker_once(context: Context) -> None:
    """Ends the whole worker, and must not be run again."""
    note("once", context)
    os._exit(3)


@tool
def give(what: str) -> Any:
    """Returns what no event can carry."""
    circle: list[Any] = []
    circle.append(circle)
    values = {"nan": float("nan"), "bytes": b"x", "circle": circle, "object": object(), "surrogate": "\ud800"}
    return values[what]


@tool
async def leak() -> None:
    """Fails with a secret."""
    raise RuntimeError("password hunter2")


@tool
def take(tree: dict[str, Any]) -> int:
    """Takes anything."""
    return len(tree)


@tool(timeout_s=120)
def hog(seconds: float) -> None:
    """Is slow, and asked for often."""
    time.sleep(seconds)


_at_once = 0
_counting = threading.Lock()


@tool(max_concurrency=2)
def narrow() -> int:
    """How many of its calls run at this moment."""
    global _at_once
    with _counting:
        _at_once += 1
    time.sleep(0.05)
    with _counting:
        _at_once -= 1
        return _at_once + 1
