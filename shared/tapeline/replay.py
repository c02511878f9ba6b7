"""A conversation's state, read from the log: the I/O around `fold`.

History is read from whichever replica answers, and one may lag; what a writer decides on must not, so `Tape.pages`
reads on until what the leader has is there.
"""

import contextlib
from collections.abc import Callable, Iterable

from . import limits, subjects
from .clock import now_ms
from .events import AnyEvent, Unknown
from .fold import State, brief, fold
from .record import Record
from .tape import Gone, Tape


async def load(tape: Tape, conversation: str) -> State:
    """The state from the facts alone, so in time that depends on them alone.

    `last_event_id` is the log's last sequence, which a writer may put its fence on: no fact before it is missing.
    Raises `Gone` where it is deleted at this moment, `Unavailable`.
    """
    return await _load(tape, conversation, Record.event)


async def outline(tape: Tape, conversation: str, call: str = "") -> State:
    """As `load`, without what was written and returned, but for what `call` returned: in memory that depends on how
    many facts there are, and not on how large.
    """
    return await _load(tape, conversation, lambda record: brief(record, call))


async def _load(tape: Tape, conversation: str, read: Callable[[Record], AnyEvent | Unknown]) -> State:
    await tape.confirm(conversation)
    last = await tape.last(conversation)
    state = State()
    if not last:
        return state  # whatever a replica has of it was purged
    newest = await tape.newest_fact(conversation, last)
    async for page in tape.pages(conversation, kind=subjects.FACTS, until=newest):
        state = fold(page, state, read)
    state.last_event_id = max(last, state.last_event_id)
    return state


async def snapshot(tape: Tape, conversation: str) -> State:
    """The state for a reader: with the partial text of a step that is being written, or the output of calls that run.

    A reader that follows after `last_event_id` continues exactly there. Raises as `load` does.
    """
    state = State()
    async for page in tape.pages(conversation, kind=subjects.FACTS):
        state = fold(page, state)
    claim, folded = _claim(state), state.last_event_id
    if claim is None:
        return state
    async for page in tape.pages(conversation, claim):
        if not page[0].follows(claim):
            raise Gone
        state = fold((record for record in page if record.seq > folded or not record.is_fact), state)
    return state


def _claim(state: State) -> int | None:
    """The event after which deltas still count; None where none does."""
    step = state.active.step if state.active else None
    if step is None:
        return None
    if step.finish is None:
        return step.event_id
    return min((call.event_id for call in step.calls if call.status == "running"), default=None)


class Expired(Exception):
    """Deltas that a reader has not seen have expired. Whoever asks again with its cursor is told so."""


async def whole_after(tape: Tape, conversation: str, after: int) -> int:
    """The earliest cursor, `after` or a later one, after which every event is still kept. Raises `Unavailable`.

    Each event names its predecessor, so where deltas have expired the log shows it. It need not be read any further
    than where they are too young for that.
    """
    whole = seen = after
    async with contextlib.aclosing(tape.pages(conversation, after)) as pages:
        async for page in pages:
            for record in page:
                if record.prev is not None and record.prev > seen:
                    whole = record.prev
                seen = record.seq
            if not may_have_expired(tape, page[-1].stored_at.timestamp() * 1000):
                break
    return whole


def check_whole(page: Iterable[Record], after: int) -> None:
    """Raises `Expired` where an event between event `after` and the last of a page is not in it."""
    for record in page:
        if record.prev is not None and record.prev > after:
            raise Expired("deltas have expired before they were read")
        after = record.seq


def may_have_expired(tape: Tape, ts: float) -> bool:
    """Whether a delta from `ts`, in ms since the epoch, may be gone by now, as far as clocks agree."""
    ttl_s = tape.deployment.delta_ttl_s
    return ttl_s > 0 and now_ms() - ts > (ttl_s - limits.EXPIRY_MARGIN_S) * 1000
