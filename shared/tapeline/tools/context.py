"""What a running tool may ask for. It knows nothing of NATS: the worker and the test helper feed it."""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Generator, MutableMapping
from typing import Any

from tapeline import limits

Say = Callable[[float | None, str], None]
"""Takes progress, a fraction and a message. Called in any thread, must not block."""


class ToolError(Exception):
    """A failure that the tool wants the model to read: the message reaches it, and the reader, as it is.

    Of any other exception only the type's name leaves the worker, since its text may hold secrets.
    """


class Flag:
    """Something that happens once. Ask or wait for it on the event loop or in a thread."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._thread_event = threading.Event()

    def __bool__(self) -> bool:
        return self._thread_event.is_set()

    def set(self) -> None:
        """Makes it so; on the event loop only."""
        self._thread_event.set()
        self._event.set()

    async def wait(self) -> None:
        """Returns once it is so."""
        await self._event.wait()

    def wait_in_thread(self, timeout_s: float) -> bool:
        """Blocks this thread until it is so, for `timeout_s` at most. Whether it is."""
        return self._thread_event.wait(timeout_s)


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
    ) -> None:
        self.tool = tool
        self.call = call
        """The call's id, the same in every attempt: use it as an idempotency key."""
        self.deadline = deadline
        """When the call must have ended, in seconds since the epoch."""
        self.attempt = attempt
        """From 1; more where a worker was lost before. Only idempotent tools see more than 1."""
        self.stopped = Flag() if stopped is None else stopped  # a flag that is not set is false
        """Whether the run was stopped. `if context.stopped`, `await context.stopped.wait()`, or in a thread
        `context.stopped.wait_in_thread(1.0)`. End soon then: what you return is kept for the audit."""
        self.log = _Log(logging.getLogger("tapeline.tools.call"), {"tool": tool, "call": call})
        """A logger whose lines name the tool and the call."""
        self._say = say

    @property
    def time_left_s(self) -> float:
        """Seconds until the deadline, not less than 0."""
        return max(0.0, self.deadline - time.time())

    def progress(self, fraction: float | None = None, message: str = "") -> "Said":
        """Says how far the call is, from 0 to 1, or what it does. It never waits for anything, so it can be used
        in a thread as it is; on the event loop, awaiting it lets other tasks run. Said often, the newest counts.
        """
        if fraction is not None:
            fraction = None if math.isnan(fraction) else min(1.0, max(0.0, float(fraction)))
        if self._say is not None:
            self._say(fraction, readable(message))
        return Said()


class Said:
    """Awaiting it gives other tasks a turn; not awaiting it is fine."""

    def __await__(self) -> Generator[Any, None, None]:
        yield


def readable(text: object) -> str:
    """`text` as an event may carry it: no longer than a message may be, and valid Unicode."""
    said = str(text)[: limits.TOOL_MESSAGE_CHARS_MAX]
    return said.encode("utf-8", "replace").decode("utf-8")
