"""One stored event: its place in the log, its writer's word, and the bytes as they were written."""

import datetime
import re
from collections.abc import Mapping
from typing import Final, NamedTuple

from nats.aio.msg import Msg

from . import events, subjects

FENCE: Final = "Nats-Expected-Last-Subject-Sequence"
FENCE_SUBJECT: Final = "Nats-Expected-Last-Subject-Sequence-Subject"

_SEQUENCE: Final = re.compile(r"[0-9]{1,20}")


class Record(NamedTuple):
    """One stored event: its place in the log, and its bytes as they were written."""

    seq: int
    prev: int | None
    """The conversation's event before it; None where its writer did not say so to the server, which checks it."""
    subject: str
    data: bytes
    headers: Mapping[str, str]

    @property
    def kind(self) -> str:
        return subjects.split(self.subject)[1]

    @property
    def is_fact(self) -> bool:
        return ".fact." in self.subject

    @property
    def stored_at(self) -> datetime.datetime:
        """When it was stored, by the server's clock."""
        return datetime.datetime.fromisoformat(self.headers["Nats-Time-Stamp"])

    @property
    def deletes(self) -> bool:
        """Whether it deletes the conversation."""
        return self.subject.endswith(subjects.INPUT) and isinstance(self.event(), events.Deleted)

    def follows(self, seen: int) -> bool:
        """Whether it can come after event `seen` of the same conversation; if not, that one was purged, and another
        was begun under its id. That takes an edge: what anybody else says came before ends nobody's reading.
        """
        return self.prev is None or self.prev >= seen or not self.subject.endswith(subjects.INPUT)

    def event(self) -> events.AnyEvent | events.Unknown:
        """What it says. What is no event, or not its writer's to write, is `Unknown` too: it must stop nobody."""
        try:
            event = events.decode(self.data)
        except events.Undecodable:
            return events.Unknown(type=events.UNDECODABLE)
        if not isinstance(event, events.Unknown) and not events.belongs(events.tag(event), self.kind):
            return events.Unknown(type=events.MISPLACED)
        return event


class Entry(NamedTuple):
    """One event to be appended: its kind, its bytes, and headers besides the fence."""

    kind: str
    data: bytes
    headers: Mapping[str, str] = {}


def record(message: Msg) -> Record:
    """The record in a live copy or in a direct get's reply: both carry the same headers."""
    headers = message.headers or {}
    seq, subject = int(headers["Nats-Sequence"]), headers["Nats-Subject"]
    return Record(seq, _before(seq, subject, headers), subject, message.data, headers)


def _before(seq: int, subject: str, headers: Mapping[str, str]) -> int | None:
    """What came before, in the words of its writer as far as the server has held him to them: any other header, a fence
    over other subjects too, may say whatever he likes.
    """
    fence = headers.get(FENCE, "")
    if _SEQUENCE.fullmatch(fence) and headers.get(FENCE_SUBJECT) == subjects.chain_of(subject):
        return int(fence)
    number = headers.get("Nats-Batch-Sequence", "")
    if "Nats-Batch-Id" in headers and _SEQUENCE.fullmatch(number) and int(number) > 1:
        return seq - 1  # inside a batch, sequences are contiguous
    return None
