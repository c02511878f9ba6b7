"""Running one call: arguments checked, the function run within its time, what came of it made into a result.

`run` knows nothing of NATS, so the worker and the test helper share it. It never raises: whatever a tool does
is a result that the model can read.
"""

import asyncio
import dataclasses
import functools
import importlib
import json
import operator
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import msgspec

from tapeline import limits
from tapeline.depth import is_json_too_deep
from tapeline.events import Outcome

from . import generators
from .context import Context, Lost, ToolError, readable
from .definition import AnyTool, Tool
from .desk import Desk
from .models import dumped
from .place import Work, in_thread, on_this_loop
from .process import Died, in_process
from .schema import Invalid

_BINARY: Final = (bytes, bytearray, memoryview)


class Large(NamedTuple):
    """A content too large for an event, as JSON, and how it begins."""

    data: bytes
    preview: str


@dataclasses.dataclass(frozen=True)
class Result:
    """How a call ended: `content` is JSON as Python has it, `message` says what went wrong."""

    outcome: Outcome
    content: Any = None
    message: str = ""
    large: Large | None = None
    """Instead of `content`, where that is too large for an event."""

    @property
    def is_error(self) -> bool:
        return self.outcome != "ok"


async def run(desk: Desk, arguments: Any, context: Context) -> Result:
    """Calls the desk's tool as the model asked for it.

    A stop gives the function `TOOL_GRACE_S` to end by itself. An async function that does not end, or not
    within its deadline, is cancelled, and a process is killed; a thread can be neither, so it is left behind and
    what it returns is dropped: it can see that its time is over, for `stopped` is set then.
    """
    tool = desk.tool
    stop = asyncio.create_task(context.stopped.wait())
    work = _started(desk, arguments, context)
    made: asyncio.Task[Result] | None = None
    try:
        await _end_of(work.future, stop, context)
        if work.future.done():
            made = asyncio.create_task(_made(desk, context, work.future))
            await _end_of(made, stop, context, limits.TOOL_CANCEL_S)
            if made.done():
                return dataclasses.replace(made.result(), outcome="stopped") if context.stopped else made.result()
            context.log.warning("its result does not become JSON in time")
            late = f"the tool {tool.name} has ended, but what it returned did not become JSON in time"
        else:
            work.cancel()
            if work.heeds:
                await asyncio.wait({work.future}, timeout=limits.TOOL_CANCEL_S)
            if not work.future.done():
                context.log.warning("it does not end; it is left behind and what it returns will be dropped")
            elif not work.future.cancelled() and (raised := work.future.exception()) and not isinstance(raised, Died):
                context.log.warning("it raised when it was cancelled", exc_info=raised)
            late = f"the tool {tool.name} did not end in time"
        if context.stopped:
            return Result("stopped", message="the run was stopped while the tool was running")
        return Result("timeout", message=late)
    finally:
        stop.cancel()
        if made is not None:
            made.cancel()
        else:
            context.stopped.set()
            work.cancel()
            if not work.future.done():
                desk.leave(context.call, work.future)


async def _end_of(work: asyncio.Future[Any], stop: asyncio.Task[None], context: Context, more_s: float = 0.0) -> None:
    """Waits until the work has ended or has no more time: at its deadline, or some time after a stop."""
    time_s = context.time_left_s + more_s
    await asyncio.wait({work, stop}, timeout=time_s, return_when=asyncio.FIRST_COMPLETED)
    if context.stopped and not work.done():
        await asyncio.wait({work}, timeout=min(limits.TOOL_GRACE_S, context.time_left_s + more_s))


async def _made(desk: Desk, context: Context, ended: asyncio.Future[Any]) -> Result:
    """What came of it as a result, in a thread: large JSON takes a while, and an author's own serializer may take for
    ever. It keeps its turn for as long as it goes on, since that is what bounds the memory.
    """
    await desk.encoders.acquire()
    work = in_thread(lambda: _result(desk.tool, context, ended.result), f"result of {context.call}")
    work.future.add_done_callback(lambda _: desk.encoders.release())
    try:
        await asyncio.wait({work.future})
    finally:
        if not work.future.done():
            desk.leave(context.call, work.future)
    try:
        result: Result = work.future.result()
    except RuntimeError as error:  # there can be no more threads
        context.log.exception("its result could not be made")
        return Result("error", message=f"the tool {desk.tool.name} failed: {type(error).__name__}")
    return result


def _started(desk: Desk, arguments: Any, context: Context) -> Work:
    tool = desk.tool
    name = f"tool {tool.name} {context.call}"
    if tool.process:  # which finds the tool by its name: not every function pickles
        return in_process(_call, (tool.function.__module__, tool.function.__qualname__, arguments), context)
    if not tool.is_async:
        return in_thread(lambda: _prepared(tool, arguments, context)(), name)
    awaited = _awaited(tool, arguments, context)
    return desk.loop.start(awaited, name) if desk.loop else on_this_loop(awaited)


def _prepared(tool: AnyTool, arguments: Any, context: Context) -> Callable[[], Any]:
    """The function with all that it is given. Where it runs, since validators are the author's code as well. Raises
    `Invalid`, and whatever they do.
    """
    values = tool.arguments.convert(arguments)
    if tool.arguments.context_name:
        values[tool.arguments.context_name] = context
    return functools.partial(generators.plain(tool.function, context), **values)


async def _awaited(tool: AnyTool, arguments: Any, context: Context) -> Any:
    return await _prepared(tool, arguments, context)()


def _call(module: str, name: str, arguments: Any, context: Context) -> Result:
    """In a process of its own: the whole call."""
    found = operator.attrgetter(name)(importlib.import_module(module))
    # `other = tool(process=True)(function)` leaves the name to the function.
    tool: AnyTool = found if isinstance(found, Tool) else Tool(found, name=context.tool)

    def ended() -> Any:
        return (
            asyncio.run(_awaited(tool, arguments, context)) if tool.is_async else _prepared(tool, arguments, context)()
        )

    return _result(tool, context, ended)


def _result(tool: AnyTool, context: Context, ended: Callable[[], Any]) -> Result:
    """What the function returned or raised, which `ended` does."""
    try:
        value = ended()
    except asyncio.CancelledError:
        return Result("error", message="the tool cancelled itself")
    except Invalid as error:
        if error.__cause__:
            context.log.warning("its arguments were refused", exc_info=error.__cause__)
        return Result("error", message=readable(error))
    except ToolError as error:
        return Result("error", message=readable(error) or "the tool failed")
    except Lost as error:
        return Result("unknown", message=readable(error))
    except Died as error:
        return Result("error", message=f"the tool {tool.name} failed: its process {error}")
    except BaseException as error:  # whatever it is, it is the call's result
        context.log.exception("it raised")
        return Result("error", message=f"the tool {tool.name} failed: {type(error).__name__}")
    if tool.process and isinstance(value, Result):
        return value  # made in its process
    try:
        return _returned(value)
    except _NotSendable as reason:
        cause = reason.__cause__  # says where in the value, or in its author's serializer; a limit has none
        context.log.error("its result cannot be sent: it %s", reason, exc_info=cause)  # noqa: TRY400
        return Result("error", message=f"the tool {tool.name} {reason}")


class _NotSendable(Exception):
    """A returned value that no event can carry. The message is for the model."""


def _returned(value: Any) -> Result:
    """The value as plain JSON types, which is what every reader will see. Raises `_NotSendable`."""
    # The standard library's encoder, because it refuses NaN and circles, and asks about what it does not know.
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"), default=_plain)
        data = text.encode()
        preview = (value if isinstance(value, str) else text)[: limits.TOOL_PREVIEW_CHARS_MAX]
        del text  # four times as large as its bytes where there is an emoji
    except Exception as error:  # what is not JSON, and whatever the author's own serializers raise
        raise _NotSendable("returned something that is not JSON") from error
    if len(data) > limits.TOOL_STORED_BYTES_MAX:
        most = limits.TOOL_STORED_BYTES_MAX
        raise _NotSendable(f"returned {len(data)} bytes as JSON, and {most} is the most: ask for less")
    if is_json_too_deep(data):
        raise _NotSendable(f"returned JSON nested more than {limits.JSON_DEPTH_MAX} deep")
    if len(data) > limits.TOOL_RESULT_BYTES_MAX:
        return Result("ok", large=Large(data, preview))
    return Result("ok", content=json.loads(data))


def _plain(value: Any) -> Any:
    """Structs, dataclasses, models, dates, sets and the like as JSON has them; bytes have no place in it."""
    if isinstance(value, _BINARY):
        raise TypeError(f"{type(value).__name__} is not JSON")
    return msgspec.to_builtins(value, builtin_types=_BINARY, enc_hook=dumped)
