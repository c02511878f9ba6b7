"""Adding to one conversation: every append says which event it comes right after, and loses if that is no
longer so. This compare-and-swap is the whole concurrency design.

A writer that loses reads what came between and decides again: harmless, so it appends after that; something
that ends its right to write, so `Overtaken`. It has one append in flight.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from opentelemetry import metrics

from . import events, limits
from .connection import Refused, Unavailable
from .record import Entry, Record
from .tape import Gone, Stale, Tape

_meter = metrics.get_meter("tapeline")
_latency: Final = _meter.create_histogram("tapeline.append.duration", "s", "One acknowledged append")
_rejected: Final = _meter.create_counter("tapeline.append.fence_rejections", "1", "Appends that lost their race")


class Overtaken(Exception):
    """Another writer has ended this one's right to append. `by` is its event; None: the conversation is gone."""

    def __init__(self, by: Record | None) -> None:
        super().__init__(f"overtaken by event {by.seq}" if by else "the conversation is gone")
        self.by = by


class Chain:
    """One writer's place in one conversation: `last` is the newest event it has seen.

    `ends` is asked of every event that others put in between; True ends this writer with `Overtaken`. That the
    conversation was deleted ends every writer.
    """

    def __init__(
        self, tape: Tape, conversation: str, last: int, ends: Callable[[Record], bool] = lambda _: True
    ) -> None:
        self.tape = tape
        self.conversation = conversation
        self.last = last
        self._ends = ends
        self._turn = asyncio.Lock()

    async def append(self, kind: str, event: events.Event, headers: Mapping[str, str] | None = None) -> int:
        """Appends one event; its sequence, once it is durable. Raises `Overtaken`, `Unavailable`, `Refused`."""
        return (await self.commit([(kind, event)], headers))[0]

    async def commit(
        self, entries: Sequence[tuple[str, events.Event]], headers: Mapping[str, str] | None = None
    ) -> list[int]:
        """Appends several events, all or none, next to each other. Raises as `append` does."""
        batch = [Entry(kind, events.encode(event), headers or {}) for kind, event in entries]
        for entry in batch:
            if len(entry.data) > limits.EVENT_BYTES_MAX:
                raise Refused(f"an event of {len(entry.data)} bytes; {limits.EVENT_BYTES_MAX} is the most")
        clock = asyncio.get_running_loop().time
        async with self._turn:
            started = clock()
            give_up = started + limits.APPEND_PATIENCE_S
            conflicts = 0
            # Whether an earlier try may have been stored. Of two servers that both lead, as they think for a moment,
            # one may have stored what the other refuses.
            unsure = self.tape.deployment.replicas > 1
            while True:
                try:
                    sequences = await self.tape.append_batch(self.conversation, batch, self.last)
                except Stale as stale:
                    _rejected.add(1)
                    conflicts += 1
                    if conflicts > limits.APPEND_CONFLICTS_MAX:
                        raise Unavailable("lost every race for this conversation") from stale
                    seen = self.last
                    stored = await self._catch_up(batch if unsure else (), stale.last)
                    if not stored and self.last == seen:  # what came first is under way, and may be our own
                        await asyncio.sleep(limits.APPEND_RACE_S)
                except Unavailable:
                    if clock() > give_up:
                        raise
                    unsure = True  # the next try will tell: its fence is the same
                    await asyncio.sleep(limits.APPEND_RETRY_S)
                    stored = []
                else:
                    stored = sequences
                if stored:
                    self.last = stored[-1]
                    _latency.record(clock() - started)
                    return stored

    async def _catch_up(self, batch: Sequence[Entry], true_last: int) -> list[int]:
        """Reads what came after `last`. The sequences of our own `batch` where it is there already, else none."""
        if true_last != -1 and true_last < self.last:
            await self.tape.confirm(self.conversation)
            true_last = await self.tape.last(self.conversation)
            if true_last < self.last:
                raise Overtaken(None)  # the log is shorter than what we saw: purged
        try:
            between = await self.tape.read(self.conversation, self.last, until=None if true_last == -1 else true_last)
        except Gone as gone:
            raise Overtaken(None) from gone
        if between and not between[0].follows(self.last):
            raise Overtaken(None)  # purged, and begun again
        if batch and between and between[0].prev == self.last and between[0].data == batch[0].data:
            return [record.seq for record in between[: len(batch)]]
        for record in between:
            if record.deletes or self._ends(record):
                raise Overtaken(record)
            self.last = record.seq
        return []
