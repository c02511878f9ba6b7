"""Where a function runs: on an event loop, or in a thread. (In a process: see `process`.)

Async tools get an event loop of their own in a second thread, so that one which blocks it stops the others of its
kind at most: never the worker, which claims, acknowledges and keeps deadlines on its own loop.
"""

import asyncio
import contextlib
import contextvars
import itertools
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final, NamedTuple

from tapeline import limits
from tapeline.settings import Broken

log = logging.getLogger(__name__)

_PACKAGE: Final = str(Path(__file__).parent) + os.sep


class Work(NamedTuple):
    """A function at work somewhere."""

    future: asyncio.Future[Any]
    """On the loop of whoever started it: what the function returned or raised."""
    cancel: Callable[[], None]
    """Makes it end, where that can be done."""
    heeds: bool
    """Whether it can."""


def on_this_loop(coroutine: Coroutine[Any, Any, Any]) -> Work:
    """A task on the caller's own loop."""
    task = asyncio.create_task(_contained(coroutine))

    def cancel() -> None:
        task.cancel()

    return Work(task, cancel, heeds=True)


def in_thread(function: Callable[[], Any], name: str) -> Work:
    """A thread of its own per call, and a daemon: one that never returns neither blocks others nor our exit."""
    future, settle = promise()

    def work() -> None:
        try:
            settle(function(), None)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the call's result
            settle(None, error)

    snapshot = contextvars.copy_context()  # the thread's spans belong to the call's
    begin(lambda: snapshot.run(work), name, settle)
    return Work(future, lambda: None, heeds=False)


class Loop:
    """The event loop of a worker's async tools, all of which share it, so that they can share clients."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="async tools", daemon=True)
        self._thread.start()

    def start(self, coroutine: Coroutine[Any, Any, Any], name: str) -> Work:
        """A task on it."""
        future, settle = promise()
        snapshot = contextvars.copy_context()  # the task's spans belong to the call's
        tasks: list[asyncio.Task[Any]] = []

        def begin() -> None:
            task = self._loop.create_task(_contained(coroutine), name=name, context=snapshot)
            task.add_done_callback(ended)
            tasks.append(task)

        def ended(task: asyncio.Task[Any]) -> None:
            if task.cancelled():
                settle(None, asyncio.CancelledError())
            elif error := task.exception():
                settle(None, error)
            else:
                settle(task.result(), None)

        def cancel() -> None:
            self._loop.call_soon_threadsafe(lambda: tasks[0].cancel())

        self._loop.call_soon_threadsafe(begin)
        return Work(future, cancel, heeds=True)

    async def watch(self) -> None:
        """Warns, from the worker's loop, when a tool blocks this one. Ends only with `Broken`."""
        mine = asyncio.get_running_loop()
        while True:
            answered = asyncio.Event()
            self._loop.call_soon_threadsafe(mine.call_soon_threadsafe, answered.set)
            silent_s = 0.0  # in turns of our own: a process that was paused has blocked nothing
            while not answered.is_set():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(limits.TOOL_LOOP_LATE_S):
                        await answered.wait()
                        break
                silent_s += limits.TOOL_LOOP_LATE_S
                if silent_s >= limits.TOOL_LOOP_BLOCKED_S:
                    raise Broken(f"the async tools' event loop has been blocked for {silent_s:.0f} s {self._where()}")
                if silent_s == limits.TOOL_LOOP_LATE_S:
                    where = self._where()
                    log.warning("a tool blocks the async tools' event loop %s: let it block in a sync function", where)
            await asyncio.sleep(limits.TOOL_LOOP_LATE_S)

    async def close(self) -> None:
        """Ends it, unless a tool blocks it."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        await asyncio.to_thread(self._thread.join, limits.TOOL_CANCEL_S)
        if not self._thread.is_alive():
            self._loop.close()

    def _run(self) -> None:
        while True:
            try:
                self._loop.run_forever()
            except (SystemExit, KeyboardInterrupt):
                log.exception("a task of a tool tried to end the process")
            else:
                return

    def _where(self) -> str:
        """The call and the line it is at: of the tool's own function, where that is what runs."""
        task = asyncio.current_task(self._loop)
        frame = sys._current_frames().get(self._thread.ident or 0)  # noqa: SLF001 - there is no other way to look
        stack = traceback.extract_stack(frame)
        begun = itertools.dropwhile(lambda line: (line.filename, line.name) != (__file__, _contained.__name__), stack)
        line = next((line for line in begun if not line.filename.startswith(_PACKAGE)), stack[-1])
        who = task.get_name() if task else "nobody"
        return f"({who}, at {line.filename}:{line.lineno} in {line.name}: {line.line})"


Settle = Callable[[Any, BaseException | None], None]


def promise() -> tuple[asyncio.Future[Any], Settle]:
    """A future on this loop, and what settles it from any thread, once."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settled(value: Any, error: BaseException | None) -> None:
        if isinstance(error, asyncio.CancelledError):
            future.cancel()
        elif isinstance(error, StopIteration):  # which a future does not take
            future.set_exception(RuntimeError("the tool raised StopIteration"))
        elif error is not None:
            future.set_exception(error)
        else:
            future.set_result(value)

    def settle(value: Any, error: BaseException | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody is left to tell
            loop.call_soon_threadsafe(settled, value, error)

    return future, settle


def begin(work: Callable[[], None], name: str, settle: Settle) -> None:
    """Starts a thread for work that settles something; where there can be no more threads, that is its error."""
    try:
        threading.Thread(target=work, name=name, daemon=True).start()
    except RuntimeError as error:
        settle(None, error)


async def _contained(coroutine: Coroutine[Any, Any, Any]) -> Any:
    try:
        return await coroutine
    except (SystemExit, KeyboardInterrupt) as error:  # from a task, these would end the loop
        raise RuntimeError(f"the tool raised {type(error).__name__}") from error
