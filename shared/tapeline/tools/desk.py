"""Where one process serves the calls of one tool: so many run at once, and so many results are made into JSON."""

import asyncio
import logging
from typing import Any

from tapeline import limits

from .definition import AnyTool
from .place import Loop

log = logging.getLogger(__name__)


class Desk:
    """It serves until it closes for good; async tools run on `loop`, or on the caller's own."""

    def __init__(self, tool: AnyTool, loop: Loop | None = None) -> None:
        self.tool = tool
        self.loop = loop
        self.slots = asyncio.Semaphore(tool.max_concurrency)
        """Taken by whoever runs a call, and given back by `give_back`."""
        self.encoders = asyncio.Semaphore(limits.TOOL_ENCODERS_MAX)
        """Taken by who makes a result into JSON, for as long as that goes on."""
        self.closed = False
        self._left: dict[str, asyncio.Future[Any]] = {}  # by call
        self._stuck_at: float | None = None

    def close(self) -> None:
        """Calls that wait for a slot are given back; those that have one end as usual."""
        self.closed = True
        self.slots.release()  # whoever gets it gives its call back, and the slot to the next

    def give_back(self, call: str) -> None:
        """The call has ended. Its slot is free, unless something of it goes on: then once that has ended."""
        if (left := self._left.get(call)) is None:
            self.slots.release()
        else:
            left.add_done_callback(lambda _: self.slots.release())

    def leave(self, call: str, work: asyncio.Future[Any]) -> None:
        """What runs for a call goes on though the call has ended, and nothing can end it."""
        self._left[call] = work
        if len(self._left) >= self.tool.max_concurrency:
            self._stuck_at = asyncio.get_running_loop().time()
        work.add_done_callback(lambda _: self._ended(call, work))

    @property
    def stuck_s(self) -> float:
        """For how long no call has had a chance, since what was left behind has all the slots."""
        return 0.0 if self._stuck_at is None else asyncio.get_running_loop().time() - self._stuck_at

    def _ended(self, call: str, work: asyncio.Future[Any]) -> None:
        self._left.pop(call, None)
        self._stuck_at = None
        if not work.cancelled():
            work.exception()  # it is dropped as well
            log.warning("%s %s: what was left behind has ended; what it returned is dropped", self.tool.name, call)
