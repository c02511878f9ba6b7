"""The vectors in `shared/tapeline/schema/vectors`: events as readers get them, and the snapshot they add up to. Whoever
folds events in another language can hold their fold against these; `scripts/generate` writes the snapshots.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
from tapeline import events, subjects
from tapeline.fold import State, fold
from tapeline.record import Record

from services.edge.conversations import described

VECTORS: Final = Path(__file__).resolve().parent.parent / "shared/tapeline/schema/vectors"
LINE_CHARS_MAX: Final = 120
CONVERSATION: Final = "c"

Event = dict[str, Any]


def records(stored: Iterable[Event]) -> Iterator[Record]:
    """Events as they are on the tape, each once: a reader drops what is not newer than all it has."""
    last = 0
    for event in stored:
        seq = event["id"]
        if seq <= last:
            continue
        data = json.dumps({key: value for key, value in event.items() if key != "id"}).encode()
        yield Record(seq, last, subjects.chain(0, CONVERSATION, _kind(event["type"])), data, {})
        last = seq


def snapshot(stored: Iterable[Event]) -> Any:
    """What `GET /v1/conversations/{id}` answers; null where that is 404."""
    state = fold(records(stored))
    return None if state.deleted or state.about is None else shown(state)


def shown(state: State) -> Any:
    """The state in the snapshot's shape, as JSON has it."""
    return json.loads(msgspec.json.encode(described(CONVERSATION, state)))


def text(vector: dict[str, Any]) -> str:
    """A vector as its file has it: one event to a line, and its snapshot made anew."""
    return _laid_out({**vector, "snapshot": snapshot(vector["events"])}, "") + "\n"


def _kind(type: str) -> str:  # noqa: A002 - what it is called on the wire
    kinds = (subjects.INPUT, subjects.MODEL, subjects.MODEL_DELTA, subjects.TOOL, subjects.TOOL_DELTA)
    return next(kind for kind in kinds if events.belongs(type, kind))


def _laid_out(value: Any, indent: str) -> str:
    """JSON for people: what fits into a line is on one."""
    line = json.dumps(value, ensure_ascii=False)
    is_event = isinstance(value, dict) and "type" in value
    if is_event or not isinstance(value, dict | list) or len(indent) + len(line) <= LINE_CHARS_MAX - 20:
        return line
    deeper = indent + "  "
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}: {_laid_out(part, deeper)}" for key, part in value.items()]
        return "{\n" + ",\n".join(deeper + part for part in parts) + f"\n{indent}}}"
    return "[\n" + ",\n".join(deeper + _laid_out(part, deeper) for part in value) + f"\n{indent}]"
