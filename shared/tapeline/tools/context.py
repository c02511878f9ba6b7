"""What a running tool may ask for. It knows nothing of NATS: the worker and the test helper feed it."""

import asyncio
import contextlib
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Generator, MutableMapping
from typing import Any

from tapeline import limits


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a call is: `fraction` from 0 to 1 where that is known, `message` says what it is doing."""

    fraction: float | None = None
    message: str = ""

    @classmethod
    def of(cls, fraction: float | None, message: object) -> "Progress":
        """Whatever a tool says of its progress, as an event may carry it."""
        if fraction is not None:
            fraction = None if math.isnan(fraction) else min(1.0, max(0.0, float(fraction)))
        return cls(fraction, readable(message))


Say = Callable[[Progress | str], None]
"""Takes what a tool says: progress, or output. Called in any thread, must not block."""


class ToolError(Exception):
    """A failure that the tool wants the model to read: the message reaches it, and the reader, as it is.

    Of any other exception only the type's name leaves the worker, since its text may hold secrets.
    """


class Lost(Exception):
    """What ran the call for the tool was lost half-way, so nobody can tell whether it had its effect: another attempt
    is made if the tool is idempotent, else it ends as `unknown` with this message.
    """


class Flag:
    """Something that happens once. Set it, ask for it and wait for it in any thread, and on any event loop."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._waiting: set[Callable[[], None]] = set()

    def __bool__(self) -> bool:
        return self._event.is_set()

    def __repr__(self) -> str:
        return f"<Flag {'set' if self else 'not set'}>"

    def set(self) -> None:
        """Makes it so."""
        with self._lock:
            self._event.set()
            waiting, self._waiting = self._waiting, set()
        for act in waiting:
            act()

    def then(self, act: Callable[[], None]) -> None:
        """Calls `act` once it is so, in the thread that makes it so."""
        with self._lock:
            if not self._event.is_set():
                self._waiting.add(act)
                return
        act()

    async def wait(self) -> None:
        """Returns once it is so."""
        loop, happened = asyncio.get_running_loop(), asyncio.Event()

        def act() -> None:
            with contextlib.suppress(RuntimeError):  # a loop that has closed
                loop.call_soon_threadsafe(happened.set)

        self.then(act)
        try:
            await happened.wait()
        finally:
            with self._lock:
                self._waiting.discard(act)

    def wait_in_thread(self, timeout_s: float) -> bool:
        """Blocks this thread until it is so, for `timeout_s` at most. Whether it is."""
        return self._event.wait(timeout_s)


class _Log(logging.LoggerAdapter[logging.Logger]):
    def process(self, msg: object, kwargs: MutableMapping[str, Any]) -> tuple[object, MutableMapping[str, Any]]:
        extra = self.extra or {}
        return f"{extra['tool']} {extra['call']}: {msg}", kwargs


class Context:
    """One call, as its tool sees it. A parameter with this annotation is given it, and the model never sees that."""

    def __init__(
        self,
        *,
        tool: str,
        call: str,
        deadline: float,
        attempt: int = 1,
        stopped: Flag | None = None,
        say: Say | None = None,
        room: threading.Event | None = None,
    ) -> None:
        self.tool = tool
        self.call = call
        """The call's id, the same in every attempt: use it as an idempotency key."""
        self.deadline = deadline
        """When the call must have ended, in seconds since the epoch."""
        self.attempt = attempt
        """From 1; more where a worker was lost before. Only idempotent tools see more than 1."""
        self.stopped = Flag() if stopped is None else stopped  # a flag that is not set is false
        """Whether the run was stopped, or the call's time is over. `if context.stopped`,
        `await context.stopped.wait()`, or in a thread `context.stopped.wait_in_thread(1.0)`. End soon then: what you
        return is kept for the audit."""
        self.log = _Log(logging.getLogger("tapeline.tools.call"), {"tool": tool, "call": call})
        """A logger whose lines name the tool and the call."""
        self._say = say
        self._room = room

    @property
    def time_left_s(self) -> float:
        """Seconds until the deadline, not less than 0."""
        return max(0.0, self.deadline - time.time())

    def progress(self, fraction: float | None = None, message: str = "") -> "Said":
        """Says how far the call is, from 0 to 1, or what it does. It never waits for anything, so it can be used
        in a thread as it is; on the event loop, awaiting it lets other tasks run. Said often, the newest counts.
        """
        return self.tell(Progress.of(fraction, message))

    def output(self, text: str) -> "Said":
        """Shows text to the reader as it comes; all of it, in order. In a thread it waits while more is waiting
        than the log has taken; on the event loop, awaiting it does.
        """
        if not isinstance(text, str):
            raise TypeError(f"output is text, not {type(text).__name__}")
        return self.tell(unicode(text))

    def tell(self, said: Progress | str) -> "Said":
        """What `progress` and `output` do with what an event may carry."""
        if self._say is not None:
            self._say(said)
        if isinstance(said, Progress) or self._room is None or self._room.is_set():
            return Said()
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self._room.wait()
        return Said(self._room)


class Said:
    """Awaiting it gives other tasks a turn, and waits for `room`; not awaiting it is fine."""

    def __init__(self, room: threading.Event | None = None) -> None:
        self._room = room

    def __await__(self) -> Generator[Any, None, None]:
        yield
        while self._room is not None and not self._room.is_set():
            yield from asyncio.sleep(limits.OUTPUT_ROOM_S).__await__()


def readable(text: object) -> str:
    """`text` as an event may carry it: no longer than a message may be, and valid Unicode."""
    return unicode(str(text)[: limits.TOOL_MESSAGE_CHARS_MAX])


def unicode(text: str) -> str:
    """`text` as UTF-8 can carry it: halves of surrogate pairs become `?`."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
