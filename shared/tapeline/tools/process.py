"""A process for one call of a tool that asks for it: for what keeps a CPU busy, and for what might take others down.

It is forked from a server that has imported the tool's module already, so it starts in milliseconds. What the call's
`Context` says and hears goes over a pipe, and so does the result. It can be killed, with all that it has started.
"""

import asyncio
import contextlib
import logging
import logging.handlers
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable
from multiprocessing import connection, forkserver
from typing import Any, Final

from tapeline import limits

from .context import Context
from .place import Settle, Work, begin, promise

_STOP: Final = "stop"
_turn: Final = threading.Lock()  # starting one looks how the others have ended, which two threads cannot do at once


class Died(Exception):
    """The process ended without a result. The message says how."""


def preload(modules: Iterable[str]) -> None:
    """Has the server from which processes are forked import these, once, and starts it."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__, *modules])
    forkserver.ensure_running()


def in_process(function: Callable[..., Any], arguments: tuple[Any, ...], context: Context) -> Work:
    """Calls `function(*arguments, context)` in a process of its own; all but the context must pickle, and so must
    what it returns. Where it ends without returning, that is `Died`.
    """
    future, settle = promise()
    process = _Process(function, arguments, context, settle)
    begin(process.run, f"process of {context.call}", settle)
    return Work(future, process.kill, heeds=True)


class _Process:
    """The worker's end of it. `run` is a thread, since starting and joining block."""

    def __init__(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], context: Context, settle: Settle
    ) -> None:
        self._context = context
        self._settle = settle
        forking = multiprocessing.get_context("forkserver")
        self._pipe, self._theirs = forking.Pipe()
        about = {name: getattr(context, name) for name in ("tool", "call", "deadline", "attempt")}
        self._process = forking.Process(
            target=_serve,
            args=(self._theirs, function, arguments, about, logging.getLogger().level),
            name=f"tool {context.tool} {context.call}",
        )
        self._killed = self._ended = False

    def run(self) -> None:
        result: Any = None
        error: BaseException | None = None
        try:
            with _turn:
                self._process.start()
            self._theirs.close()
            if self._killed:  # before there was something to kill
                self.kill()
            self._context.stopped.then(self._stop)
            result = self._hear()
        except Exception as raised:  # noqa: BLE001 - whatever it is, whoever waits for the call must hear it
            error = raised
        if self._killed:
            error = asyncio.CancelledError()
        self.kill()  # with what it may have left behind
        self._ended = True
        self._pipe.close()
        self._settle(result, error)

    def kill(self) -> None:
        self._killed = True
        if self._process.pid is not None and not self._ended:
            for end in (os.killpg, os.kill):  # at first it is in no group of its own
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    end(self._process.pid, signal.SIGKILL)

    def _hear(self) -> Any:
        """What the process returned. Raises `Died`."""
        while self._pipe in connection.wait([self._pipe, self._process.sentinel]):
            try:
                kind, *said = self._pipe.recv()
            except (EOFError, OSError):
                break
            if kind == "returned":
                connection.wait([self._process.sentinel], limits.TOOL_CANCEL_S)  # it may have something to write yet
                return said[0]
            if kind == "said":
                self._context.tell(said[0])  # while it waits for room, so does the process: the pipe is full
            elif kind == "log":
                logging.getLogger(said[0].name).handle(said[0])
        connection.wait([self._process.sentinel])
        with _turn:
            self._process.join()
        code = self._process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        raise Died(how + (", perhaps for want of memory" if code == -signal.SIGKILL else ""))

    def _stop(self) -> None:
        with contextlib.suppress(OSError):  # it has ended
            self._pipe.send(_STOP)


# In the process


def _serve(
    pipe: "connection.Connection[Any, Any]",
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    about: dict[str, Any],
    log_level: int,
) -> None:
    os.setsid()  # what it starts is killed with it
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # the worker is asked to end, and gives us time
    turn = threading.RLock()

    def tell(*said: Any) -> None:
        with turn:
            pipe.send(said)

    logging.getLogger().handlers[:] = [_Relay(tell)]
    logging.getLogger().setLevel(log_level)
    context = Context(**about, say=lambda said: tell("said", said))
    threading.Thread(target=_heed, args=(pipe, context), daemon=True).start()
    tell("returned", function(*arguments, context))


def _heed(pipe: "connection.Connection[Any, Any]", context: Context) -> None:
    try:
        while pipe.recv() == _STOP:
            context.stopped.set()
    except (EOFError, OSError):
        os.killpg(0, signal.SIGKILL)  # the worker is gone, and with it whoever would hear the result


class _Relay(logging.handlers.QueueHandler):
    """What is logged here, the worker logs."""

    def __init__(self, tell: Callable[..., None]) -> None:
        super().__init__(None)  # type: ignore[arg-type] # `enqueue` is all that knows it
        self._tell = tell

    def enqueue(self, record: logging.LogRecord) -> None:
        self._tell("log", record)
