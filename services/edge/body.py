"""What a request may carry: bodies, cursors and names, each with its bounds. Wrong ones are a clear 4xx."""

import re
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import Meta
from starlette.requests import Request
from tapeline import limits, subjects
from tapeline.events import OnBusy

from .problem import Problem, not_found

T = TypeVar("T")

CURSOR_MAX: Final = 2**63 - 1  # a sequence of JetStream
MODEL: Final = r"^[A-Za-z0-9._:/@-]*\Z"  # `$` would let a newline through at the end

_CURSOR: Final = re.compile(r"[0-9]{1,19}")
_NUMBER: Final = re.compile(r"[+-]?[0-9]+")
_PACE: Final = re.compile(r"[0-9]{1,6}(\.[0-9]{1,20})?", re.ASCII)
_KEY: Final = re.compile(rf"[\x21-\x7e]{{1,{limits.IDEMPOTENCY_KEY_CHARS_MAX}}}")
_SHOWN: Final = r"[^\s\x1c-\x1f\x85\ufeff]"  # of what is no space to Python, nor to who checks by /openapi.json


class NewConversation(msgspec.Struct, forbid_unknown_fields=True):
    """`POST /v1/conversations`."""

    id: Annotated[str, Meta(pattern=rf"^[A-Za-z0-9_-]{{1,{limits.CONVERSATION_ID_CHARS_MAX}}}\Z")] | None = None
    title: Annotated[str, Meta(max_length=limits.TITLE_CHARS_MAX)] = ""
    system: Annotated[str, Meta(max_length=limits.SYSTEM_CHARS_MAX)] = ""
    model: Annotated[str, Meta(max_length=limits.MODEL_CHARS_MAX, pattern=MODEL)] = ""
    tools: Annotated[list[Annotated[str, Meta(max_length=64)]], Meta(max_length=256)] | None = None
    metadata: dict[str, Any] = {}


class NewTitle(msgspec.Struct, forbid_unknown_fields=True):
    """`PATCH /v1/conversations/{id}`."""

    title: Annotated[str, Meta(min_length=1, max_length=limits.TITLE_CHARS_MAX, pattern=_SHOWN)]


class NewMessage(msgspec.Struct, forbid_unknown_fields=True):
    """`POST /v1/conversations/{id}/messages`."""

    content: Annotated[str, Meta(min_length=1, max_length=limits.CONTENT_CHARS_MAX, pattern=_SHOWN)]  # providers too
    model: Annotated[str, Meta(max_length=limits.MODEL_CHARS_MAX, pattern=MODEL)] = ""
    on_busy: OnBusy = "reject"
    replaces: Annotated[
        str, Meta(max_length=64, description="A run: go on from just before it. It and all after it no longer count.")
    ] = ""


class NewStop(msgspec.Struct, forbid_unknown_fields=True):
    """`POST …/stop`; the body may be left out."""

    reason: Annotated[str, Meta(max_length=limits.TITLE_CHARS_MAX)] = ""


class NewApproval(msgspec.Struct, forbid_unknown_fields=True):
    """`POST …/approval`: a person's decision on a call."""

    approved: bool
    arguments: Annotated[dict[str, Any] | None, Meta(description="With `approved` only: in place of the model's.")] = (
        None
    )
    reason: Annotated[str, Meta(max_length=limits.TITLE_CHARS_MAX, description="The model is told it.")] = ""


async def read(request: Request, kind: type[T]) -> T:
    """The request's JSON body. Raises `Problem` 400, 413, 415, 422."""
    body = await _bounded(request)
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not body and kind is NewStop:
        return kind()
    if media != "application/json":  # a form or plain text could come from any web page
        raise Problem(415, "unsupported_media_type", "Send the body as `Content-Type: application/json`.")
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise Problem(422, "invalid", f"The body is not what this call takes: {_brief(error)}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(400, "bad_json", f"The body is not JSON: {_brief(error)}") from error


def _brief(error: Exception) -> str:
    """What is wrong with a body. It quotes what was sent, however long that is."""
    text = str(error)
    return text if len(text) <= limits.DETAIL_CHARS_MAX else text[: limits.DETAIL_CHARS_MAX] + "…"


async def _bounded(request: Request) -> bytes:
    """The body, or 413. What is too much is read and dropped for a while, so that the sender sees the answer."""
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= limits.BODY_BYTES_MAX:
            chunks.append(chunk)
        elif size > limits.BODY_DROPPED_BYTES_MAX:
            break
    if size > limits.BODY_BYTES_MAX:
        raise Problem(413, "too_large", f"A body may have {limits.BODY_BYTES_MAX} bytes at most.")
    return b"".join(chunks)


def conversation(request: Request) -> str:
    """The conversation named in the path; one that cannot exist is answered like one that does not."""
    name: str = request.path_params["conversation"]
    if not subjects.is_conversation(name):
        raise not_found()
    return name


def cursor(request: Request) -> int:
    """Where the reader is: `Last-Event-ID`, else `?after=`, else the beginning. Raises `Problem` 400."""
    given = (request.headers.get("last-event-id"), request.query_params.get("after"))
    cursors = [text for text in given if text is not None]
    if not all(_CURSOR.fullmatch(text) and int(text) <= CURSOR_MAX for text in cursors):
        raise Problem(400, "bad_cursor", "A cursor is the `id` of an event: a whole number.")
    return int(cursors[0]) if cursors else 0


def pace(request: Request) -> float | None:
    """How many times as fast as recorded a replay is wanted; None: as fast as it goes. Raises `Problem` 400."""
    text = request.query_params.get("pace")
    if text is None:
        return None
    if not _PACE.fullmatch(text) or not limits.PACE_MIN <= float(text) <= limits.PACE_MAX:
        raise Problem(
            400, "bad_pace", f"`pace` is a number from {limits.PACE_MIN} to {limits.PACE_MAX:g}; 1 is as it was."
        )
    return float(text)


def page(request: Request) -> tuple[int, int | None]:
    """How many conversations to list, and below which `next` of an earlier page. Raises `Problem` 400, 422."""
    query = request.query_params
    limit = query.get("limit", str(limits.LIST_ENTRIES_DEFAULT))
    bounds = f"`limit` is a whole number from 1 to {limits.LIST_ENTRIES_MAX}."
    if not _NUMBER.fullmatch(limit):
        raise Problem(400, "bad_limit", bounds)
    if not _CURSOR.fullmatch(limit) or not 1 <= int(limit) <= limits.LIST_ENTRIES_MAX:
        raise Problem(422, "bad_limit", bounds)
    before = query.get("before")
    if before is None:
        return int(limit), None
    if not _CURSOR.fullmatch(before) or int(before) > CURSOR_MAX:
        raise Problem(400, "bad_cursor", "`before` is the `next` of an earlier page.")
    return int(limit), int(before)


def view(request: Request) -> Literal["full", "compact"]:
    """All events, or facts only. Raises `Problem` 400."""
    text = request.query_params.get("view", "full")
    if text not in ("full", "compact"):
        raise Problem(400, "bad_view", "`view` is `full` or `compact`.")
    return "compact" if text == "compact" else "full"


def idempotency_key(request: Request) -> str | None:
    """What makes a second POST of the same message the same run. Raises `Problem` 400."""
    key = request.headers.get("idempotency-key")
    if key is not None and not _KEY.fullmatch(key):
        most = limits.IDEMPOTENCY_KEY_CHARS_MAX
        raise Problem(400, "bad_idempotency_key", f"An `Idempotency-Key` is 1 to {most} visible ASCII characters.")
    return key
