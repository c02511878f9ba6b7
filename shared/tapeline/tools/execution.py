"""Running one call: arguments checked, the function run within its time, what came of it made into a result.

`run` knows nothing of NATS, so the worker and the test helper share it. It never raises: whatever a tool does
is a result that the model can read.
"""

import asyncio
import contextlib
import contextvars
import dataclasses
import json
import logging
import threading
from collections.abc import Callable
from typing import Any, Final

import msgspec

from tapeline import limits
from tapeline.events import Outcome

from .context import Context, ToolError, readable
from .definition import AnyTool
from .schema import Invalid

log = logging.getLogger(__name__)

_BINARY: Final = (bytes, bytearray, memoryview)


@dataclasses.dataclass(frozen=True)
class Result:
    """How a call ended: `content` is JSON as Python has it, `message` says what went wrong."""

    outcome: Outcome
    content: Any = None
    message: str = ""

    @property
    def is_error(self) -> bool:
        return self.outcome != "ok"


async def run(tool: AnyTool, arguments: Any, context: Context) -> Result:
    """Calls the tool as the model asked for it.

    A stop gives the function `TOOL_GRACE_S` to end by itself. An async function that does not end, or not
    within its deadline, is cancelled; a thread cannot be, so it is left behind and what it returns is dropped.
    """
    try:
        values = tool.arguments.convert(arguments)
    except Invalid as error:
        return Result("error", message=readable(error))
    if tool.arguments.context_name:
        values[tool.arguments.context_name] = context
    work = _started(tool, values, context)
    stop = asyncio.create_task(context.stopped.wait())
    try:
        await asyncio.wait({work, stop}, timeout=context.time_left_s, return_when=asyncio.FIRST_COMPLETED)
        if context.stopped and not work.done():
            await asyncio.wait({work}, timeout=min(limits.TOOL_GRACE_S, context.time_left_s))
        if work.done():
            result = _result(tool, work, context)
            return dataclasses.replace(result, outcome="stopped") if context.stopped else result
        work.cancel()
        if tool.is_async:
            await asyncio.wait({work}, timeout=limits.TOOL_CANCEL_S)
        if not tool.is_async or not work.done():
            context.log.warning("it does not end; it is left behind and what it returns will be dropped")
        elif not work.cancelled() and (raised := work.exception()):
            context.log.warning("it raised when it was cancelled", exc_info=raised)
        if context.stopped:
            return Result("stopped", message="the run was stopped while the tool was running")
        return Result("timeout", message=f"the tool {tool.name} did not end in time")
    finally:
        stop.cancel()
        work.cancel()


def _started(tool: AnyTool, values: dict[str, Any], context: Context) -> asyncio.Future[Any]:
    if tool.is_async:
        return asyncio.create_task(_contained(tool.function, values))
    return _in_thread(lambda: tool.function(**values), context)


async def _contained(function: Callable[..., Any], values: dict[str, Any]) -> Any:
    try:
        return await function(**values)
    except (SystemExit, KeyboardInterrupt) as error:  # from a task, these would end the whole worker
        raise RuntimeError(f"the tool raised {type(error).__name__}") from error


def _in_thread(function: Callable[[], Any], context: Context) -> asyncio.Future[Any]:
    """A thread of its own per call, and a daemon: one that never returns neither blocks others nor our exit."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(value: Any, error: BaseException | None) -> None:
        if future.done():
            context.log.warning("it has ended too late; what it returned is dropped")
        elif isinstance(error, StopIteration):  # which a future does not take
            future.set_exception(RuntimeError("the tool raised StopIteration"))
        elif error is not None:
            future.set_exception(error)
        else:
            future.set_result(value)

    def work() -> None:
        value: Any = None
        error: BaseException | None = None
        try:
            value = function()
        except BaseException as raised:  # noqa: BLE001 - whatever it is, it is the call's result
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody is left to tell
            loop.call_soon_threadsafe(settle, value, error)

    snapshot = contextvars.copy_context()  # the thread's spans belong to the call's
    threading.Thread(target=snapshot.run, args=(work,), name=f"tool {context.call}", daemon=True).start()
    return future


def _result(tool: AnyTool, work: asyncio.Future[Any], context: Context) -> Result:
    """What the function returned or raised."""
    if work.cancelled():
        return Result("error", message="the tool cancelled itself")
    error = work.exception()
    if isinstance(error, ToolError):
        return Result("error", message=readable(error) or "the tool failed")
    if error is not None:
        context.log.error("it raised", exc_info=error)
        return Result("error", message=f"the tool {tool.name} failed: {type(error).__name__}")
    try:
        return Result("ok", content=_as_json(work.result()))
    except _NotSendable as reason:
        context.log.exception("its result cannot be sent")
        return Result("error", message=f"the tool {tool.name} {reason}")


class _NotSendable(Exception):
    """A returned value that no event can carry. The message is for the model."""


def _as_json(value: Any) -> Any:
    """The value as plain JSON types, which is what every reader will see. Raises `_NotSendable`."""
    # The standard library's encoder, because it refuses NaN and circles, and asks about what it does not know.
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False, default=_plain)
        size = len(text.encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise _NotSendable("returned something that is not JSON") from error
    if size > limits.TOOL_RESULT_BYTES_MAX:
        most = limits.TOOL_RESULT_BYTES_MAX
        raise _NotSendable(f"returned {size} bytes as JSON, and {most} is the most: ask for less")
    content = json.loads(text)
    _check_depth(content)
    return content


def _check_depth(content: Any) -> None:
    """Raises `_NotSendable` where the nesting would be too much for some reader's decoder."""
    level = [content]
    for _ in range(limits.TOOL_RESULT_DEPTH_MAX):
        level = [
            inner
            for value in level
            if isinstance(value, dict | list)
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise _NotSendable(f"returned JSON nested more than {limits.TOOL_RESULT_DEPTH_MAX} deep")


def _plain(value: Any) -> Any:
    """Structs, dataclasses, dates, sets and the like as JSON has them; bytes have no place in it."""
    if isinstance(value, _BINARY):
        raise TypeError(f"{type(value).__name__} is not JSON")
    return msgspec.to_builtins(value, builtin_types=_BINARY)
