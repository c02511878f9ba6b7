"""What went wrong, as `application/problem+json` (RFC 9457) with a stable `code`."""

from collections.abc import Mapping
from typing import Any, Final

import msgspec
from starlette.responses import Response

NOT_FOUND: Final = "not_found"


class Problem(Exception):
    """An answer that is an error: `code` is stable and for programs, `detail` is for people and says what to do."""

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        headers: Mapping[str, str] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.headers = headers
        self.body = {
            "type": f"urn:tapeline:{code}",
            "title": code.replace("_", " "),
            "status": status,
            "code": code,
            "detail": detail,
            **more,
        }

    def response(self) -> Response:
        """As it is sent."""
        return Response(
            msgspec.json.encode(self.body),
            self.status,
            headers=dict(self.headers or {}),
            media_type="application/problem+json",
        )


def not_found() -> Problem:
    """The same for a conversation that is not there and for one that is not yours."""
    return Problem(404, NOT_FOUND, "There is no such conversation.")


def unavailable(why: str) -> Problem:
    """NATS is away; the same request may succeed in a moment."""
    return Problem(503, "unavailable", f"The tape cannot be reached right now: {why}", {"Retry-After": "1"})
