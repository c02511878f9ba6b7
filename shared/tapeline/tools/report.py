"""What a running tool says, on its way to the tape: of its progress the newest counts, of its output every character.

Said in any thread, taken on the event loop. Output that waits is bounded by `room`, and what is shown in all by
`TOOL_OUTPUT_CHARS_MAX`.
"""

import asyncio
import contextlib
import threading
from collections import deque
from typing import Final

from tapeline import limits

from .context import Progress

CUT: Final = "\n[the rest of the output is not shown]\n"


class Report:
    """What one attempt has said and what is not written yet."""

    def __init__(self) -> None:
        self.room = threading.Event()
        """Whether there is room for more output; who says more without it may wait for it, in any thread."""
        self.room.set()
        self._loop = asyncio.get_running_loop()
        self._stirred = asyncio.Event()
        self._ended = asyncio.Event()
        self._lock = threading.Lock()  # of all that follows
        self._progress = Progress()
        self._news = False
        self._waiting: deque[str] = deque()
        self._chars = 0
        self._left = limits.TOOL_OUTPUT_CHARS_MAX

    def say(self, said: Progress | str) -> None:
        """Takes progress, or output. Never blocks; dropped once this has ended."""
        with self._lock:
            if self.ended:
                return
            if isinstance(said, Progress):
                self._progress, self._news = said, True
            elif said and self._left >= 0:
                self._add(said[: self._left])
                self._left -= len(said)
                if self._left < 0:
                    self._add(CUT)
        with contextlib.suppress(RuntimeError):  # a thread left behind, and the loop has closed
            self._loop.call_soon_threadsafe(self._stirred.set)

    def take(self) -> list[tuple[Progress, str]]:
        """What to write, in order: the newest progress with each piece of output, of `DELTA_CHARS_MAX` at most.
        Progress alone is no longer worth an event once this has ended: the result comes next.
        """
        with self._lock:
            text = "".join(self._waiting)
            self._waiting.clear()
            self._chars = 0
            self.room.set()
            starts = range(0, len(text) or int(self._news and not self.ended), limits.DELTA_CHARS_MAX)
            self._news = False
            return [(self._progress, text[start : start + limits.DELTA_CHARS_MAX]) for start in starts]

    def cut(self) -> None:
        """Gives up what waits, and all output from here on: whether what was taken last is written is in doubt."""
        with self._lock:
            if 0 <= self._left < limits.TOOL_OUTPUT_CHARS_MAX:
                self._left = -1
                self._waiting.clear()
                self._add(CUT)

    def end(self) -> None:
        """Takes no more. Whoever waits for room need not."""
        with self._lock:
            self._ended.set()
            self.room.set()
        self._stirred.set()

    @property
    def ended(self) -> bool:
        """Whether it takes no more."""
        return self._ended.is_set()

    async def stirred(self) -> None:
        """Returns when there may be something to take, or when it has ended."""
        await self._stirred.wait()
        self._stirred.clear()

    async def pause(self) -> None:
        """Waits for `PROGRESS_INTERVAL_S`, or until it has ended."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), limits.PROGRESS_INTERVAL_S)

    def _add(self, text: str) -> None:
        self._waiting.append(text)
        self._chars += len(text)
        if self._chars >= limits.PENDING_CHARS_MAX:
            self.room.clear()
