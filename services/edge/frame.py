"""An event as server-sent event bytes, encoded once for all its readers.

`data` is what is stored, byte for byte. Whatever a writer put there, a frame is one event: nothing in it can
end the frame early or begin another field.
"""

import re
from typing import Final, NamedTuple

from tapeline import limits
from tapeline.events import MISPLACED, UNDECODABLE, Undecodable, belongs, peek
from tapeline.record import Record

# No blank line after these: httpx-sse, for one, would take it for the end of an event.
HELLO: Final = b"retry: %d\n: tapeline\n" % limits.RETRY_MS
HEARTBEAT: Final = b": hb\n"
TERMINAL: Final = ("done", "error")
DELETED: Final = "deleted"

_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_NEWLINE: Final = re.compile(rb"\r\n|\r|\n")


class Frame(NamedTuple):
    """One event as it is sent, and what is asked of it on the way."""

    seq: int
    type: str
    run: str
    is_fact: bool
    data: bytes

    @property
    def ends_run(self) -> bool:
        return self.type in TERMINAL

    @property
    def ends_all(self) -> bool:
        """Every reader is sent it, and no reader anything after it."""
        return self.type == DELETED


def frame(record: Record) -> Frame:
    """The event as it is sent to every reader."""
    try:
        event = peek(record.data)
        name, run = event.type, event.run
    except Undecodable:
        name, run = UNDECODABLE, ""
    data = record.data
    if not belongs(name, record.kind):
        name, data = MISPLACED, _wrapped(record)
    elif not _NAME.fullmatch(name):
        name = "unknown"
    if b"\n" in data or b"\r" in data:
        data = _NEWLINE.sub(b"\ndata: ", data)
    return Frame(
        record.seq, name, run, record.is_fact, b"id: %d\nevent: %s\ndata: %s\n\n" % (record.seq, name.encode(), data)
    )


def line(record: Record) -> bytes:
    """The stored event as one line of JSON, with its place in the log put in front: `id`, and `prev`."""
    data, prev = record.data.strip(), record.prev
    place = b'{"id":%d,"prev":%s,' % (record.seq, b"null" if prev is None else b"%d" % prev)
    try:
        if not belongs(peek(data).type, record.kind):
            data = _wrapped(record)
    except Undecodable:
        return place + b'"type":"%s"}\n' % UNDECODABLE.encode()
    return place + _NEWLINE.sub(b" ", data[1:]).lstrip() + b"\n"


def _wrapped(record: Record) -> bytes:
    """What its writer had no right to write, so that nobody takes it for what it says it is."""
    return b'{"type":"%s","kind":"%s","event":%s}' % (MISPLACED.encode(), record.kind.encode(), record.data.strip())
