"""The calls of the native API, and the OpenAPI 3.1 document about them: one table, from which the routes are made too,
and the types that the handlers take and answer with, so that the bounds are the ones that are enforced.

What the table alone says, parameters and refusals, `test_openapi` holds against a running edge.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec
import tapeline
from tapeline import events, limits

from . import answer, body

_JSON: Final = "application/json"
_PROBLEM: Final = "application/problem+json"
_SSE: Final = "text/event-stream"
_NDJSON: Final = "application/x-ndjson"
_TEXT: Final = "text/plain"

_STREAM: Final = "The events, one after the other: the schema is of each."
_MEDIA: Final = {
    _SSE: {"$ref": "#/components/schemas/Frame"},
    _NDJSON: {"$ref": "#/components/schemas/Line"},
    _JSON: {},
    _TEXT: {"type": "string"},
}
_EVENT: Final = {"$ref": "#/components/schemas/Event"}
_STREAMED: Final = {
    "Frame": {
        "description": "A server-sent event.",
        "type": "object",
        "properties": {
            "id": {"type": "string", "pattern": "^[0-9]+$", "description": "The cursor."},
            "event": {"type": "string", "description": "The `type` of `data`."},
            "data": {"type": "string", "contentMediaType": _JSON, "contentSchema": _EVENT},
            "retry": {"type": "integer", "description": "ms to wait before a reconnect."},
        },
        "required": ["id", "event", "data"],
    },
    "Line": {
        "description": "A stored event, with its place in the log.",
        "allOf": [_EVENT],
        "properties": {
            "id": {"type": "integer", "description": "The cursor."},
            "prev": {"type": ["integer", "null"], "description": "The `id` of the event before it."},
        },
        "required": ["id", "prev"],
    },
}
_CURSOR: Final = {"type": "integer", "format": "int64", "minimum": 0, "maximum": body.CURSOR_MAX}
_ABOUT: Final = (
    "AI answers over a durable tape. Errors are `application/problem+json` with a stable `code`. The events of a "
    "stream are `Event`; readers pass over what they do not know."
)

# What a call refuses, by status and code

_ALWAYS: Final = ("403 host_refused", "500 internal", "503 unavailable")
_ASKED: Final = ("401 unauthorized", *_ALWAYS)
_CHANGES: Final = (*_ASKED, "403 cross_site")
_BODY: Final = ("400 bad_json", "413 too_large", "415 unsupported_media_type", "422 invalid")
_ONE: Final = ("404 not_found", "404 no_such_path")  # no such path: a name with a slash in it

_PARAMETERS: Final[Mapping[str, Mapping[str, Any]]] = {
    "conversation": {"in": "path", "schema": {"type": "string"}, "description": "Its id."},
    "run": {"in": "path", "schema": {"type": "string"}, "description": "The run's id."},
    "call": {"in": "path", "schema": {"type": "string"}, "description": "The call's id."},
    "limit": {
        "in": "query",
        "schema": {
            "type": "integer",
            "minimum": 1,
            "maximum": limits.LIST_ENTRIES_MAX,
            "default": limits.LIST_ENTRIES_DEFAULT,
        },
        "description": "How many at most.",
    },
    "before": {"in": "query", "schema": _CURSOR, "description": "The `next` of an earlier page."},
    "of": {
        "name": "run",
        "in": "query",
        "schema": {"type": "string"},
        "description": "This run's events only; the stream ends when the run has.",
    },
    "after": {
        "in": "query",
        "schema": _CURSOR,
        "description": "The `id` of the last event seen; 0: from the beginning.",
    },
    "Last-Event-ID": {"in": "header", "schema": _CURSOR, "description": "As `after`, and goes before it."},
    "view": {
        "in": "query",
        "schema": {"enum": ["full", "compact"], "default": "full"},
        "description": "`compact` leaves out deltas.",
    },
    "pace": {
        "in": "query",
        "schema": {"type": "number", "minimum": limits.PACE_MIN, "maximum": limits.PACE_MAX},
        "description": "Replay what is stored so many times as fast as it came, then end.",
    },
    "Idempotency-Key": {
        "in": "header",
        "schema": {"type": "string", "pattern": rf"^[\x21-\x7e]{{1,{limits.IDEMPOTENCY_KEY_CHARS_MAX}}}$"},
        "description": "A repeated POST with the same key is the same run.",
    },
}

_HEADERS: Final[Mapping[str, Mapping[str, Any]]] = {
    "Location": {"required": True, "schema": {"type": "string"}, "description": "Where it is."},
    "Retry-After": {"required": True, "schema": {"type": "integer", "minimum": 0}, "description": "Seconds."},
    "WWW-Authenticate": {"required": True, "schema": {"type": "string"}},
}
_HEADERS_OF: Final[Mapping[object, Sequence[str]]] = {
    answer.Created: ("Location",),
    401: ("WWW-Authenticate",),
    429: ("Retry-After",),
    503: ("Retry-After",),
}


class Call(NamedTuple):
    """One route, to the edge's handler of this name.

    `gives` has what each good status answers with: a Struct, media types, or nothing.
    """

    method: str
    path: str
    name: str
    summary: str
    gives: Mapping[int, type | Sequence[str] | None]
    refuses: Sequence[str] = ()
    takes: type | None = None
    parameters: Sequence[str] = ()
    links: Mapping[str, Mapping[str, str]] = {}
    """Calls that what it answers leads to, and what they are given of it."""
    ticket: bool = False
    """A ticket will do in place of a key."""


_ALL: Final = "/v1/conversations"
_THIS: Final = f"{_ALL}/{{conversation}}"
_MADE: Final = {"conversation": "$response.body#/id"}
_RUN: Final = {"conversation": "$request.path.conversation", "run": "$response.body#/run"}

CALLS: Final = (
    Call(
        "POST",
        _ALL,
        "create",
        "Begin a conversation",
        {201: answer.Created},
        (*_CHANGES, *_BODY, "409 exists", "422 unknown_model"),
        body.NewConversation,
        links=dict.fromkeys(("show", "rename", "delete", "post", "events", "ticket"), _MADE),
    ),
    Call(
        "GET",
        _ALL,
        "index",
        "List my conversations, newest first",
        {200: answer.Page},
        (*_ASKED, "400 bad_limit", "422 bad_limit", "400 bad_cursor"),
        parameters=("limit", "before"),
    ),
    Call("GET", _THIS, "show", "The conversation as it is", {200: answer.Snapshot}, (*_ASKED, *_ONE)),
    Call(
        "PATCH",
        _THIS,
        "rename",
        "Give it another title",
        {200: answer.Entry},
        (*_CHANGES, *_ONE, *_BODY),
        body.NewTitle,
    ),
    Call("DELETE", _THIS, "delete", "Delete it, for everybody and for good", {204: None}, (*_CHANGES, *_ONE)),
    Call(
        "POST",
        f"{_THIS}/messages",
        "post",
        f"Say something; with `Accept: {_SSE}` the answer is the run",
        {202: answer.Posted, 200: (_SSE,)},
        (
            *(*_CHANGES, *_ONE, *_BODY, "400 bad_idempotency_key", "404 unknown_run", "409 busy"),
            *(
                "422 unknown_model",
                "422 idempotency_mismatch",
                "429 too_many_messages",
                "429 too_many_tokens",
                "429 too_many_streams",
            ),
        ),
        body.NewMessage,
        ("Idempotency-Key",),
        links={"events": _RUN, "stop": _RUN},
    ),
    Call(
        "GET",
        f"{_THIS}/events",
        "events",
        f"Follow it; with `Accept: {_NDJSON}` what is stored, as lines",
        {200: (_SSE, _NDJSON), 204: None},
        (
            *(*_ASKED, *_ONE, "400 bad_cursor", "400 bad_view", "400 bad_pace", "404 unknown_run"),
            *("410 cursor_ahead", "410 cursor_expired", "429 too_many_streams"),
        ),
        parameters=("of", "after", "Last-Event-ID", "view", "pace"),
        ticket=True,
    ),
    Call(
        "POST",
        f"{_THIS}/ticket",
        "ticket",
        "A ticket for an EventSource",
        {201: answer.Ticket},
        (*_CHANGES, *_ONE, "501 tickets_off"),
    ),
    Call(
        "POST",
        f"{_THIS}/runs/{{run}}/stop",
        "stop",
        "Stop a run",
        {202: answer.Stopped},
        (*_CHANGES, *_ONE, *_BODY, "404 unknown_run"),
        body.NewStop,
    ),
    Call(
        "GET",
        f"{_THIS}/runs/{{run}}/calls/{{call}}/result",
        "result",
        "What a call returned, whole",
        {200: (_JSON,), 304: None},
        (*_ASKED, *_ONE, "404 unknown_run", "404 unknown_call", "404 no_result", "404 call_failed"),
    ),
    Call(
        "POST",
        f"{_THIS}/runs/{{run}}/calls/{{call}}/approval",
        "approve",
        "Approve a call that waits for it, or deny it",
        {202: answer.Decided},
        (
            *(*_CHANGES, *_ONE, *_BODY, "404 unknown_run", "404 unknown_call"),
            *("409 already_decided", "409 not_waiting"),
        ),
        body.NewApproval,
    ),
    Call("GET", "/v1/models", "models", "The models to choose from", {200: answer.Models}, _ASKED),
    Call("GET", "/healthz", "healthz", "Whether the process lives", {200: answer.Health}),
    Call(
        "GET",
        "/readyz",
        "readyz",
        "Whether it may be given traffic",
        {200: answer.Readiness, 503: answer.Readiness},
    ),
    Call("GET", "/metrics", "metrics", "For Prometheus", {200: (_TEXT,)}),
    Call("GET", "/openapi.json", "openapi", "This document", {200: (_JSON,)}),
)


def document(*, secured: bool) -> bytes:
    """The document of an edge, as JSON; `secured`: it asks who is asking."""
    paths: dict[str, dict[str, Any]] = {}
    for call in CALLS:
        paths.setdefault(call.path, {})[call.method.lower()] = _operation(call, secured=secured)
    whole = {
        "openapi": "3.1.0",
        "info": {
            "title": "Tapeline",
            "version": tapeline.__version__,
            "description": _ABOUT,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": _schemas(),
            "headers": _HEADERS,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "A key or a token of the deployment."},
                "ticket": {"type": "apiKey", "in": "query", "name": "ticket", "description": "Of `POST …/ticket`."},
            },
        },
    }
    return msgspec.json.encode(whole)


def _operation(call: Call, *, secured: bool) -> dict[str, Any]:
    named = [*(name for name in ("conversation", "run", "call") if f"{{{name}}}" in call.path), *call.parameters]
    refused: dict[int, list[str]] = {}
    for line in call.refuses:
        status, _, code = line.partition(" ")
        refused.setdefault(int(status), []).append(code)
    operation: dict[str, Any] = {
        "operationId": call.name,
        "summary": call.summary,
        "parameters": [
            {"name": name, "required": _PARAMETERS[name]["in"] == "path", **_PARAMETERS[name]} for name in named
        ],
        "responses": {str(status): _good(call, status) for status in call.gives}
        | {str(status): _refusal(status, refused[status]) for status in sorted(refused)},
    }
    if call.takes is not None:
        operation["requestBody"] = {
            "required": call.takes is not body.NewStop,
            "content": {_JSON: {"schema": _ref(call.takes)}},
        }
    if call.path.startswith("/v1"):
        ways: list[dict[str, list[str]]] = [{"bearer": []} if secured else {}]
        operation["security"] = [*ways, {"ticket": []}] if call.ticket else ways
    return operation


def _good(call: Call, status: int) -> dict[str, Any]:
    """What a call answers when it is done."""
    match call.gives[status]:
        case None:
            return {"description": "Done; there is nothing to say."}
        case type() as kind:
            answered: dict[str, Any] = {
                "description": kind.__doc__,
                "headers": _headers(kind),
                "content": {_JSON: {"schema": _ref(kind)}},
            }
        case media_types:
            answered = {
                "description": _STREAM if _SSE in media_types else call.summary,
                "content": {media_type: {"schema": _MEDIA[media_type]} for media_type in media_types},
            }
    if call.links and status != 200:
        answered["links"] = {
            name: {"operationId": name, "parameters": parameters} for name, parameters in call.links.items()
        }
    return answered


def _refusal(status: int, codes: Sequence[str]) -> dict[str, Any]:
    schema = {"allOf": [_ref(answer.Failure), {"properties": {"status": {"const": status}, "code": {"enum": codes}}}]}
    return {
        "description": " or ".join(f"`{code}`" for code in codes),
        "headers": _headers(status),
        "content": {_PROBLEM: {"schema": schema}},
    }


def _headers(of: object) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in _HEADERS_OF.get(of, ())}


def _ref(kind: type) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}


def _schemas() -> dict[str, Any]:
    """All types by their names: what is taken, what is answered, what is on the tape."""
    _, taken = _components(call.takes for call in CALLS if call.takes is not None)
    _, given = _components(
        [*(kind for call in CALLS for kind in call.gives.values() if isinstance(kind, type)), answer.Failure]
    )
    (event,), taped = _components([events.AnyEvent])
    for schema in given.values():  # what has a default is answered all the same
        for name, field in schema["properties"].items():
            if "default" in field:
                del field["default"]
                schema["required"].append(name)
    return dict(sorted({**given, **taken, **taped, **_STREAMED, "Event": event}.items()))


def _components(kinds: Iterable[Any]) -> tuple[tuple[dict[str, Any], ...], dict[str, Any]]:
    """Their schemas; `$` ends a pattern here as `\\Z` does in Python, where `$` would let a newline through."""
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    return schemas, msgspec.json.decode(msgspec.json.encode(components).replace(rb"\\Z", b"$"))
