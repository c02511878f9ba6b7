"""What a model produces, on its way to the tape: one append in flight, and what arrives meanwhile is coalesced
into the next event. That is ordering, back-pressure and adaptive batching in one: at low load every chunk is its
own event; under pressure events grow.
"""

import asyncio
import hashlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import msgspec
from opentelemetry import metrics
from tapeline import limits, subjects
from tapeline.append import Chain
from tapeline.events import Delta, Step, Thinking, Token, ToolInput

from .conclude import Spoken

_meter = metrics.get_meter("tapeline")
_chunks: Final = _meter.create_counter("tapeline.deltas.chunks", "1", "Chunks received from providers")
_events: Final = _meter.create_counter(
    "tapeline.deltas.events", "1", "Delta events appended; chunks over events is the coalescing ratio"
)


@dataclass
class _Piece:
    """Text of one kind that waits to become one event."""

    kind: type[Delta]
    call: str
    tool: str
    chars: int = 0
    texts: list[str] = field(default_factory=list)


class Full(Exception):
    """The answer has as many bytes as an event can hold."""


class Deltas:
    """One attempt's deltas. `put` what arrives, `pump` in a task of its own, `flush` before the answer."""

    def __init__(self, chain: Chain, claim: Step, clock: Callable[[], int]) -> None:
        self._chain = chain
        self._run, self._step, self._attempt = claim.run, claim.step, claim.attempt
        self._clock = clock
        self._waiting: deque[_Piece] = deque()
        self._chars = 0
        self.bytes = len(msgspec.json.encode(claim.text + claim.thinking))
        """Of all that was put, as JSON, and of what the claim has kept."""
        self._stirred = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._room = asyncio.Event()
        self._room.set()
        self._digest = hashlib.sha256()
        self._text = [claim.text]
        self._thinking = [claim.thinking]
        self._first_token_ts: int | None = None
        self.count = 0
        """Events appended."""

    def said(self) -> Spoken:
        """What was put, once `flush` has returned: what is on the tape."""
        text, thinking = "".join(self._text), "".join(self._thinking)
        return Spoken(text, thinking, self.count, self._digest.hexdigest(), self._first_token_ts)

    async def put(self, kind: type[Delta], text: str, call: str = "", tool: str = "") -> None:
        """Takes one chunk; waits while too much is waiting already, so that the provider is not read.

        Raises `Full`; then nothing of the chunk is taken.
        """
        _chunks.add(1)
        text = _encodable(text)
        self.bytes += len(msgspec.json.encode(text))
        if self.bytes > limits.ANSWER_BYTES_MAX:
            raise Full
        self._note(kind, text)
        for start in range(0, len(text), limits.DELTA_CHARS_MAX):
            await self._room.wait()
            self._add(kind, text[start : start + limits.DELTA_CHARS_MAX], call, tool)

    async def flush(self) -> None:
        """Returns when all that was put is durable."""
        await self._idle.wait()

    async def pump(self) -> None:
        """Appends what waits, one event at a time, until cancelled. Raises what `Chain.append` raises."""
        while True:
            await self._stirred.wait()
            piece = self._waiting.popleft()
            self._chars -= piece.chars
            if not self._waiting:
                self._stirred.clear()
            if self._chars < limits.PENDING_CHARS_MAX:
                self._room.set()
            await self._chain.append(subjects.MODEL_DELTA, self._event(piece))
            self.count += 1
            _events.add(1)
            if piece.kind is Token and self._first_token_ts is None:
                self._first_token_ts = self._clock()
            if not self._waiting:
                self._idle.set()

    def _note(self, kind: type[Delta], text: str) -> None:
        self._digest.update(text.encode())
        if kind is Token:
            self._text.append(text)
        elif kind is Thinking:
            self._thinking.append(text)

    def _add(self, kind: type[Delta], text: str, call: str, tool: str) -> None:
        last = self._waiting[-1] if self._waiting else None
        if last is None or (last.kind, last.call) != (kind, call) or last.chars + len(text) > limits.DELTA_CHARS_MAX:
            last = _Piece(kind, call, tool)
            self._waiting.append(last)
        last.texts.append(text)
        last.chars += len(text)
        self._chars += len(text)
        if self._chars >= limits.PENDING_CHARS_MAX:
            self._room.clear()
        self._idle.clear()
        self._stirred.set()

    def _event(self, piece: _Piece) -> Delta:
        text, ts = "".join(piece.texts), self._clock()
        if piece.kind is ToolInput:
            return ToolInput(
                run=self._run,
                ts=ts,
                step=self._step,
                attempt=self._attempt,
                call=piece.call,
                tool=piece.tool,
                text=text,
            )
        kind = Token if piece.kind is Token else Thinking
        return kind(run=self._run, ts=ts, step=self._step, attempt=self._attempt, text=text)


def _encodable(text: str) -> str:
    """A provider can send half of a surrogate pair, which no UTF-8 can carry: it becomes U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
