"""An event as server-sent event bytes, encoded once for all its readers.

`data` is what is stored, byte for byte, where that is an event its writer may write. Whatever a writer put there, a
frame is one event: nothing in it can end the frame early or begin another field.
"""

import re
from typing import Final, NamedTuple

import msgspec
from msgspec import UNSET, UnsetType
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


class _Place(msgspec.Struct):
    """What only the log may say of an event."""

    id: msgspec.Raw | UnsetType = UNSET
    prev: msgspec.Raw | UnsetType = UNSET


_place: Final = msgspec.json.Decoder(_Place)


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
    name, run, data = _shown(record)
    if not _NAME.fullmatch(name):
        name = "unknown"
    if b"\n" in data or b"\r" in data:
        data = _NEWLINE.sub(b"\ndata: ", data)
    return Frame(
        record.seq, name, run, record.is_fact, b"id: %d\nevent: %s\ndata: %s\n\n" % (record.seq, name.encode(), data)
    )


def line(record: Record) -> bytes:
    """The event as one line of JSON, with its place in the log put in front: `id`, and `prev`."""
    _, _, data = _shown(record)
    place = _place.decode(data)
    if place.id is not UNSET or place.prev is not UNSET:  # of two, most parsers would take the writer's own
        data = _wrapped(record)
    prev = b"null" if record.prev is None else b"%d" % record.prev
    return b'{"id":%d,"prev":%s,%s\n' % (record.seq, prev, _NEWLINE.sub(b" ", data.strip()[1:]).lstrip())


def _shown(record: Record) -> tuple[str, str, bytes]:
    """Its type, its run, and the JSON object that readers are given of it."""
    try:
        event = peek(record.data)
        str(record.data, "utf-8")  # which `peek` does not look at where it passes over a field
    except (Undecodable, UnicodeDecodeError):
        # Not as it was written: a reader who is less strict than we are might find an event in it.
        return UNDECODABLE, "", b'{"type":"%s","kind":"%s"}' % (UNDECODABLE.encode(), record.kind.encode())
    if not belongs(event.type, record.kind):
        return MISPLACED, event.run, _wrapped(record)
    return event.type, event.run, record.data


def _wrapped(record: Record) -> bytes:
    """What its writer had no right to write, so that nobody takes it for what it says it is."""
    return b'{"type":"%s","kind":"%s","event":%s}' % (MISPLACED.encode(), record.kind.encode(), record.data.strip())
