"""What the edge answers, as it is encoded: the same types are in the OpenAPI document."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType
from tapeline.fold import RunState


class Created(msgspec.Struct):
    """A conversation that has begun."""

    id: str
    event_id: Annotated[int, Meta(description="Of its first event.")]
    url: str
    events_url: str


class Entry(msgspec.Struct):
    """A conversation in its owner's list."""

    id: str
    title: str
    created_ts: Annotated[int, Meta(description="ms since the epoch.")]
    url: str


class Page(msgspec.Struct):
    """A part of a user's list, newest first."""

    conversations: list[Entry]
    next: Annotated[str | None, Meta(description="For `before`, to go on; null: that was all.")]


class Model(msgspec.Struct):
    """A model to choose."""

    id: Annotated[str, Meta(description="For `model` of a conversation or a message.")]
    default: Annotated[bool, Meta(description="It answers where nobody chooses.")]
    scripted: Annotated[bool, Meta(description="No AI: a script that shows what Tapeline carries.")]


class Models(msgspec.Struct):
    """What a user may choose."""

    models: list[Model]


class Said(msgspec.Struct):
    """What one side said."""

    role: Literal["user", "assistant"]
    content: str
    run: str
    ts: Annotated[int | UnsetType, Meta(description="Of what the user said, ms since the epoch.")] = UNSET


class Snapshot(msgspec.Struct):
    """A conversation as it is: follow after `last_event_id`."""

    id: str
    title: str
    owner: str
    system: str
    model: str
    tools: list[str] | None
    metadata: dict[str, Any]
    created_ts: Annotated[int, Meta(description="ms since the epoch.")]
    last_event_id: int
    messages: Annotated[list[Said], Meta(description="Of the runs that count: those that no other has replaced.")]
    runs: list[RunState]


class Posted(msgspec.Struct):
    """A message that is on the tape, and the run it started."""

    run: str
    event_id: int
    events_url: str


class Ticket(msgspec.Struct):
    """What opens the events of one conversation for a while."""

    ticket: str
    expires_ts: Annotated[int, Meta(description="ms since the epoch.")]
    events_url: str


class Stopped(msgspec.Struct):
    """A run that is stopped, or had ended already."""

    run: str


class Decided(msgspec.Struct):
    """A call that was decided on."""

    run: str
    call: str
    approved: bool


class Health(msgspec.Struct):
    """The process lives."""

    status: Literal["ok"] = "ok"


class Readiness(msgspec.Struct):
    """Whether this edge may be given traffic; `why` not."""

    status: Literal["ready", "not ready"]
    why: list[str]


class Failure(msgspec.Struct):
    """What went wrong, as RFC 9457 has it, with a stable `code`. `Problem` makes it."""

    type: str
    title: str
    status: int
    code: str
    detail: Annotated[str, Meta(description="For people.")]
    run: Annotated[str | UnsetType, Meta(description="With `busy`: the run that is active.")] = UNSET
    earliest: Annotated[int | UnsetType, Meta(description="With 410: a cursor that is still good.")] = UNSET
    snapshot: Annotated[str | UnsetType, Meta(description="With 410: where to begin again.")] = UNSET
