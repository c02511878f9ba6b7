"""What one call returned, whole: as one body of JSON, from its event or from where it is stored beside the tape."""

import hashlib
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Send
from tapeline import results
from tapeline.connection import Unavailable
from tapeline.fold import CallState
from tapeline.results import Broken
from tapeline.tape import Tape

log = logging.getLogger(__name__)


def response(request: Request, tape: Tape, conversation: str, call: CallState) -> Response:
    """The answer with all of it; 304 where the client has it. It never changes, and is asked for each time all the
    same, since the conversation may be deleted.
    """
    stored = call.stored
    content = b"" if stored else msgspec.json.encode(call.content)
    etag = f'"{stored.sha256 if stored else hashlib.sha256(content).hexdigest()}"'
    headers = {"ETag": etag, "Cache-Control": "private, no-cache", "X-Content-Type-Options": "nosniff"}
    if etag in (request.headers.get("if-none-match") or ""):
        return Response(status_code=304, headers=headers)
    media_type = "application/json"
    if stored is None:
        return Response(content, headers=headers, media_type=media_type)
    headers["Content-Length"] = str(stored.bytes)
    if request.method == "HEAD":
        return Response(headers=headers, media_type=media_type)
    return _Stored(call.call, results.chunks(tape, conversation, call.call, stored), headers)


class _Stored(StreamingResponse):
    """Sends a chunk when the one before it has been taken. What is broken is cut off before its end."""

    body_iterator: AsyncGenerator[bytes]

    def __init__(self, call: str, chunks: AsyncGenerator[bytes], headers: dict[str, str]) -> None:
        super().__init__(chunks, headers=headers, media_type="application/json")
        self._call = call

    async def stream_response(self, send: Send) -> None:
        """Returns without an end where there is none, at which the connection is cut."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with aclosing(self.body_iterator) as chunks:
                async for chunk in chunks:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except (Broken, Unavailable) as error:
            log.error("call %s: its result was cut off: %s", self._call, error)  # noqa: TRY400 - it says all there is
        else:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
