"""What can be on the tape: one tagged union, its codec, and who may write what of it.

JSON on the wire. Every event has `type` (the tag), `run` and `ts`; model events also `step` and `attempt`.
New fields need defaults; a tag is never reused. What a reader does not know it passes through: see `Unknown`.
"""

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from . import subjects

NO_RUN: Final = "-"  # the run of events that belong to the conversation itself
UNDECODABLE: Final = "undecodable"  # the type by which readers know what is no event at all
MISPLACED: Final = "misplaced"  # the type by which readers know what its writer had no right to write

JsonObject = Annotated[dict[str, Any], Meta(extra_json_schema={"additionalProperties": True})]
Arguments = Annotated[
    Any,
    Meta(
        description="An object; a string where the model wrote no JSON object.",
        extra_json_schema={"type": ["object", "string"]},
    ),
]
AnyJson = Annotated[Any, Meta(extra_json_schema={"type": ["null", "boolean", "number", "string", "array", "object"]})]
Outcome = Literal["ok", "error", "timeout", "denied", "stopped", "unknown"]
Resume = Literal["", "restart", "continue"]
OnBusy = Literal["reject", "queue", "interrupt"]


class Event(msgspec.Struct, kw_only=True, tag_field="type", omit_defaults=True):
    """What every event carries."""

    run: str
    """The run it belongs to; `-` for the conversation itself."""
    ts: Annotated[int, Meta(description="Written at, ms since the epoch, by the writer's clock.")]


class ModelEvent(Event):
    """What every event of the model's side carries."""

    step: int
    attempt: int


# fact.input: the edge


class Conversation(Event, tag="conversation"):
    """A conversation begins. Always the first event; its run is `-`."""

    owner: str
    title: str = ""
    system: Annotated[str, Meta(description="System prompt.")] = ""
    model: Annotated[str, Meta(description="`provider:name`; empty: the deployment's default.")] = ""
    tools: Annotated[list[str] | None, Meta(description="Tools allowed; null: all that are offered.")] = None
    metadata: JsonObject = {}


class Title(Event, tag="title"):
    """Somebody named the conversation, which has this title from here on; its run is `-`."""

    title: str
    by: str = ""


class Deleted(Event, tag="deleted"):
    """Somebody deleted the conversation: nothing follows, and all of it is purged; its run is `-`."""

    by: str = ""


class Message(Event, tag="message"):
    """The user says something; this starts the run."""

    content: str
    by: str = ""
    model: str = ""
    on_busy: OnBusy = "reject"
    replaces: Annotated[
        str, Meta(description="A run before it: that one and all after it no longer count; empty: it adds to them.")
    ] = ""


class Stop(Event, tag="stop"):
    """Somebody stopped the run."""

    by: str = ""
    reason: str = ""


class Approval(Event, tag="approval"):
    """Somebody decided on a call that waits for approval."""

    call: str
    approved: bool
    arguments: Annotated[JsonObject | None, Meta(description="Edited arguments, if any.")] = None
    reason: str = ""
    by: str = ""


# fact.model, fact.call.<tool>, delta.model: inference


class Superseded(msgspec.Struct, kw_only=True):
    """The events of an attempt that no longer count: `first` to `last`, both included, model deltas only."""

    attempt: int
    first: int
    last: int


class Step(ModelEvent, tag="step"):
    """A worker claims step `step`, attempt `attempt`."""

    worker: str
    trigger: Annotated[
        int,
        Meta(
            description="Sequence of the event that woke the worker; its redelivery hands the step over. "
            "Below 0: a timer's, among the timers."
        ),
    ]
    delivery: Annotated[int, Meta(description="Which delivery of the trigger; only a later one may take over.")] = 1
    model: str = ""
    supersedes: Superseded | None = None
    resume: Resume = ""
    text: Annotated[
        str, Meta(description="Where `resume` is `continue`: what counts of the superseded text; tokens follow it.")
    ] = ""
    thinking: Annotated[str, Meta(description="Likewise.")] = ""


class Thinking(ModelEvent, tag="thinking"):
    """Reasoning text, as it comes."""

    text: str


class Token(ModelEvent, tag="token"):
    """Answer text, as it comes."""

    text: str


class ToolInput(ModelEvent, tag="tool_input"):
    """A fragment of a call's arguments, as the model writes them."""

    call: str
    tool: str
    text: str


class AnswerCall(msgspec.Struct, kw_only=True):
    """A call as the model asked for it."""

    call: str
    tool: str
    arguments: Arguments


class Answer(ModelEvent, tag="answer"):
    """The step's full content. Partial where `finish` is `stopped` or `error`."""

    finish: Annotated[str, Meta(description="stop, length, tool_calls, content_filter, stopped or error.")]
    text: str = ""
    thinking: str = ""
    calls: list[AnswerCall] = []
    usage: dict[str, int] = {}
    deltas: Annotated[int, Meta(description="How many delta events this attempt has.")] = 0
    sha256: Annotated[
        str,
        Meta(description="Hex digest of this attempt's own `thinking`, `token` and `tool_input` text, in order."),
    ] = ""
    first_token_ms: Annotated[
        int | None, Meta(description="From the run's turn to this step's first token; null: it had none.")
    ] = None


class ToolCall(ModelEvent, tag="tool_call"):
    """A tool is to be run. One that needs approval is written twice: to ask a person, and once approved for workers."""

    call: Annotated[str, Meta(description="Unique in the deployment: the tool's idempotency key.")]
    tool: str
    arguments: Arguments
    deadline: Annotated[
        int, Meta(description="ms since the epoch: of the call; where it asks for approval, of the decision.")
    ]
    needs_approval: bool = False
    timeout_ms: Annotated[int, Meta(description="What the call will have from its approval on; 0: it needs none.")] = 0


class Error(ModelEvent, tag="error"):
    """Terminal: the run failed. What was shown of it stays."""

    code: str
    message: str
    retryable: bool = False
    usage: dict[str, int] = {}
    first_token_ms: Annotated[int | None, Meta(description="From the message to the first token.")] = None
    duration_ms: int = 0


class Done(ModelEvent, tag="done"):
    """Terminal: the run is complete."""

    reason: Annotated[str, Meta(description="stop, length, content_filter, stopped or max_steps.")]
    usage: dict[str, int] = {}
    first_token_ms: Annotated[int | None, Meta(description="From the message to the first token.")] = None
    duration_ms: int = 0
    facts: Annotated[
        int, Meta(description="Facts of this run so far, this one included; each `answer` counts its deltas.")
    ] = 0


# fact.tool, delta.tool: tool workers (inference settles a call whose worker cannot)


class ToolEvent(Event):
    """What every event of a tool call carries."""

    call: str
    tool: str


class ToolStarted(ToolEvent, tag="tool_started"):
    """A worker claims the call."""

    worker: str
    attempt: int = 1
    delivery: Annotated[int, Meta(description="Which delivery of the `tool_call`; only a later one may take over.")] = 1
    idempotent: Annotated[bool, Meta(description="Whether what the worker begins may be run again, were it lost.")] = (
        False
    )


class ToolProgress(ToolEvent, tag="tool_progress"):
    """How far a running call is: the newest counts. `text` is output, as it comes: all of it counts, in order."""

    fraction: Annotated[float, Meta(ge=0, le=1)] | None = None
    message: str = ""
    text: str = ""


class Stored(msgspec.Struct, kw_only=True):
    """A result too large for an event: it is kept beside the tape, and `GET …/calls/{call}/result` has all of it."""

    bytes: Annotated[int, Meta(ge=1, description="Of the whole content as JSON.")]
    sha256: Annotated[
        str, Meta(pattern="^[0-9a-f]{64}$", max_length=64, description="Hex digest of the whole content as JSON.")
    ]
    chunks: Annotated[int, Meta(ge=1, description="Messages in the stream RESULTS.")]
    attempt: Annotated[int, Meta(ge=1, description="Which stored it.")]
    preview: Annotated[
        str, Meta(description="The beginning of the content: of its text where it is a string, else of its JSON.")
    ]


class ToolResult(ToolEvent, tag="tool_result"):
    """How the call ended. Exactly one per call."""

    outcome: Outcome
    is_error: bool = False
    content: Annotated[AnyJson, Meta(description="What the tool returned; null where it is `stored`.")] = None
    stored: Stored | None = None
    message: Annotated[str, Meta(description="What went wrong, where `is_error`.")] = ""
    duration_ms: int = 0


class Unknown(msgspec.Struct, kw_only=True):
    """An event of a type, or with fields, that this version does not know. Readers pass it on untouched."""

    type: str
    run: str = NO_RUN
    ts: int = 0


Delta = Thinking | Token | ToolInput
Terminal = Done | Error
AnyEvent = (
    Conversation
    | Title
    | Deleted
    | Message
    | Stop
    | Approval
    | Step
    | Thinking
    | Token
    | ToolInput
    | Answer
    | ToolCall
    | ToolStarted
    | ToolProgress
    | ToolResult
    | Error
    | Done
)


_PLACES: Final = {
    subjects.INPUT: {"conversation", "title", "deleted", "message", "stop", "approval"},
    # A call that goes to no worker is settled by inference, which is why it may write a result.
    subjects.MODEL: {"step", "answer", "tool_call", "tool_result", "error", "done"},
    subjects.MODEL_DELTA: {"thinking", "token", "tool_input"},
    subjects.TOOL: {"tool_started", "tool_result"},
    subjects.TOOL_DELTA: {"tool_progress"},
}
_CALL: Final = {"tool_call"}
_KNOWN: Final = set().union(*_PLACES.values())


def belongs(type: str, kind: str) -> bool:  # noqa: A002 - what it is called on the wire
    """Whether an event of this type may stand on a subject of this kind. NATS lets a service write to its own subjects
    only, and this is what that is worth: a tool worker's `token` is no token. A type nobody knows may stand anywhere.
    """
    return type not in _KNOWN or type in _PLACES.get(kind, _CALL)


class Undecodable(ValueError):
    """Not an event at all: no JSON object, or one without a `type`."""


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(AnyEvent)
_unknown = msgspec.json.Decoder(Unknown)

encode = _encoder.encode


def decode(data: bytes) -> AnyEvent | Unknown:
    """The event in `data`; `Unknown` where this version does not know it. Raises `Undecodable`."""
    try:
        event: AnyEvent = _decoder.decode(data)
        return event
    except msgspec.ValidationError:
        return peek(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Undecodable(str(error)) from error


def tag(event: AnyEvent) -> str:
    """The event's type."""
    return str(event.__struct_config__.tag)


def peek(data: bytes) -> Unknown:
    """Only `type`, `run` and `ts`: several times cheaper than `decode`. Raises `Undecodable`."""
    try:
        return _unknown.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Undecodable(str(error)) from error
