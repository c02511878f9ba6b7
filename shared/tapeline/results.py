"""What tools returned that is too large for an event: written beside the tape in chunks before its event is, and read
back a page at a time.

An attempt at a call has a subject of its own. Nobody who may write there can change or take away what is there, so
whatever comes after a result is ignored, and whatever came before it, or in its place, has another digest.
"""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Final

from . import limits, subjects
from .clock import now_ms
from .connection import Refused, Unavailable
from .events import Stored, ToolResult
from .record import Record
from .tape import Stale, Tape

_SIZE: Final = limits.RESULT_CHUNK_BYTES


class Broken(Exception):
    """What is stored is not, or no longer, what the result says."""


async def store(
    tape: Tape, conversation: str, call: str, attempt: int, data: bytes, preview: str, deadline: int
) -> Stored:
    """Writes the content, JSON, and returns when all of it is durable, so that its event can be written.

    While NATS is away it goes on trying until `deadline`, in ms since the epoch. Raises `Unavailable`, `Refused`.
    """
    subject = subjects.result(conversation, call, attempt)
    starts = range(0, len(data), _SIZE)
    digest = hashlib.sha256()
    after = 0
    async with tape.storing:
        for start in starts:
            chunk = data[start : start + _SIZE]
            after = await _put(tape, subject, chunk, after, deadline)
            digest.update(chunk)
    return Stored(bytes=len(data), sha256=digest.hexdigest(), chunks=len(starts), attempt=attempt, preview=preview)


async def _put(tape: Tape, subject: str, chunk: bytes, after: int, deadline: int) -> int:
    """Stores one chunk right after the one with sequence `after`; its own sequence."""
    while True:
        try:
            return await tape.put(subject, chunk, after=after)
        except Unavailable:
            if now_ms() > deadline:
                raise
            await asyncio.sleep(limits.APPEND_RETRY_S)
        except Stale:
            newest = await tape.newest(subjects.RESULTS, subject)
            if newest and newest[-1].seq > after:
                if newest[-1].data != chunk:
                    raise Refused(f"somebody else has stored something at {subject}") from None
                return newest[-1].seq  # an earlier try, whose answer was lost
            await asyncio.sleep(limits.APPEND_RACE_S)  # an earlier try is under way


async def chunks(tape: Tape, conversation: str, call: str, stored: Stored) -> AsyncGenerator[bytes]:
    """The content, a chunk at a time; the last one only if all of it is what was stored.

    Raises `Broken`, `Unavailable`.
    """
    pages = tape.stored_pages(subjects.RESULTS, subjects.result(conversation, call, stored.attempt))
    digest = hashlib.sha256()
    count = size = 0
    async with aclosing(pages):
        async for page in pages:
            for record in page:
                count += 1
                size += len(record.data)
                digest.update(record.data)
                is_last = count == stored.chunks
                if size > stored.bytes or (is_last and (size, digest.hexdigest()) != (stored.bytes, stored.sha256)):
                    raise Broken(f"the result of call {call} is not what was stored")
                yield record.data
                if is_last:
                    return
    raise Broken(f"of the result of call {call} there are {count} chunks, not {stored.chunks}")


async def violations(tape: Tape, conversation: str, records: Iterable[Record]) -> list[str]:
    """What of a conversation's stored results is not as its events say, a line each. Raises `Unavailable`."""
    found = []
    for record in records:
        event = record.event()
        if isinstance(event, ToolResult) and event.stored is not None:
            try:
                async for _ in chunks(tape, conversation, event.call, event.stored):
                    pass
            except Broken as broken:
                found.append(f"{record.seq} ToolResult: {broken}")
    return found
