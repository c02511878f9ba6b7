"""One connection: how a request comes in, and how its answer is taken.

Uvicorn's protocol over httptools takes any number of bytes, headers and requests, and any time; and closing a
connection, it waits for ever for a reader who takes nothing of what is left. Here all have an end, and what is too much
gets an answer where that is still possible.
"""

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Final, NoReturn

import httptools
from starlette.types import Scope
from tapeline import limits
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from .problem import Problem
from .refusal import Refusals
from .stream import CONNECTION

_MALFORMED: Final = Problem(400, "bad_request", "This is not HTTP.")
_SLOW: Final = Problem(408, "request_timeout", f"A request has to be here within {limits.REQUEST_S:g} s.")
_LONG_URL: Final = Problem(414, "url_too_long", f"A URL may have {limits.URL_BYTES_MAX} bytes at most.")
_LARGE_HEAD: Final = Problem(
    431,
    "headers_too_large",
    f"The headers of a request may be {limits.HEADERS_MAX}, and have {limits.HEAD_BYTES_MAX} bytes at most.",
)
_MANY_WAIT: Final = Problem(400, "too_many_pipelined", "Wait for answers before you send more requests.")


class Intake(HttpToolsProtocol):
    """One connection."""

    # With these in its `__dict__`, that would have more than the 30 names up to which CPython shares them among
    # instances: a KiB more for every idle stream.
    __slots__ = (
        "_answering",
        "_dropped_bytes",
        "_ended",
        "_has_spoken",
        "_head_bytes",
        "_refusals",
        "_refused",
        "_silent_bytes",
        "_taken_at",
        "_timer",
        "_told",
        "_unsent_bytes",
    )

    def __init__(self, *args: Any, refusals: Refusals, **more: Any) -> None:
        super().__init__(*args, **more)
        self._refusals = refusals
        self._head_bytes = 0
        """Of the request line and headers that are coming in, or of the trailers."""
        self._silent_bytes = 0
        """Since the parser last told of anything: it keeps a header to itself until it has all of it."""
        self._has_spoken = False
        self._refused: Problem | None = None
        self._dropped_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._answering: RequestResponseCycle | None = None
        """What is answered, which uvicorn loses sight of when the next request comes in behind it."""
        self._ended: str | None = None
        self._told: Callable[[str], None] | None = None
        self._unsent_bytes = 0
        """What the reader had not taken at the last look, whoever writes more waiting for that."""
        self._taken_at = 0.0

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel()
        self._leave("left")
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parses; drops what a client that was refused goes on sending."""
        if self._refused is not None:
            self._dropped_bytes += len(data)
            if self._dropped_bytes > limits.BODY_DROPPED_BYTES_MAX:
                self.transport.abort()
            return
        if self._timer is None and not self._is_answering:
            self._expect()  # uvicorn's own timer ends with the first byte, which need not be one of a request
        self._has_spoken = True
        self._silent_bytes += len(data)
        self._unset_keepalive_if_required()
        self._parse(data)
        if self._silent_bytes > limits.HEAD_BYTES_MAX and self._refused is None:
            self._refuse(_LARGE_HEAD)

    def _parse(self, data: bytes) -> None:
        """As uvicorn does, which warns of each stranger's nonsense, however many there are."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # we speak nothing else, and answer in HTTP
        except httptools.HttpParserError:  # also how a refusal in the middle of parsing ends it
            self._refuse(self._refused or _MALFORMED)

    # What the parser tells

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope[CONNECTION] = self  # type: ignore[typeddict-unknown-key]
        self._silent_bytes = self._head_bytes = 0
        if len(self.pipeline) >= limits.REQUESTS_WAITING_MAX:
            self._stop(_MANY_WAIT)
        if self._timer is None:
            self._expect()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._take(len(url))
        if len(self.url) > limits.URL_BYTES_MAX:
            self._stop(_LONG_URL)

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._take(len(name) + len(value) + 4)  # a colon, a space, and the end of the line
        if len(self.headers) > limits.HEADERS_MAX or self._head_bytes > limits.HEAD_BYTES_MAX:
            self._stop(_LARGE_HEAD)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._head_bytes = 0  # what still comes as a header is a trailer
        self._listen()

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._silent_bytes = 0

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._silent_bytes = 0
        self._cancel()

    def _take(self, count: int) -> None:
        self._silent_bytes = 0
        self._head_bytes += count

    # How the answer is taken

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answering, self._told = cycle, None
        super()._start_asgi_task(cycle, app)

    @property
    def _is_answering(self) -> bool:
        return self._answering is not None and not self._answering.response_complete

    @property
    def _is_under_way(self) -> bool:
        cycle = self._answering
        return cycle is not None and cycle.response_started and not cycle.response_complete

    @property
    def owes(self) -> bool:
        """Whether an answer has begun that its reader does not have all of."""
        return self._is_under_way or self.transport.get_write_buffer_size() > 0

    def tell(self, told: Callable[[str], None]) -> None:
        """Has `told` called when the connection ends, and how: its reader `left`, or was `slow`. Lighter than a task
        that waits for it, of which every idle stream would have one.
        """
        if self._ended is None:
            self._told = told
            self._listen()
        else:
            told(self._ended)

    def _listen(self) -> None:
        """Uvicorn reads nothing while a request waits behind another, and would not see that its reader leaves."""
        if self._told is not None:
            self.flow.resume_reading()

    def returned(self, scope: Scope) -> None:
        """Who answers the request of `scope` has come to an end. An answer without one is cut off, and nothing of it
        waits to be taken. It may be the next request that is answered by now, which is none of their business.
        """
        if self._is_under_way and self._answering is not None and self._answering.scope is scope:
            self.cut("left")

    def look(self, now: float) -> None:
        """Cuts off a reader who has taken nothing for `WRITE_TIMEOUT_S`, `now` by the loop's clock.

        It counts while whoever writes waits, or the connection is to be closed: nobody adds to what is unsent then.
        """
        is_waited_for = self.flow.write_paused or self.transport.is_closing()
        unsent = self.transport.get_write_buffer_size() if is_waited_for else 0
        if not 0 < self._unsent_bytes <= unsent:
            self._unsent_bytes, self._taken_at = unsent, now
        elif now - self._taken_at > limits.WRITE_TIMEOUT_S:
            self.cut("slow")

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unsent_bytes = 0

    def cut(self, how: str) -> None:
        """Ends the connection now, and drops what was not taken: to close it would be to wait for that."""
        self._leave(how)
        self.transport.abort()

    # The end of it

    def _leave(self, how: str) -> None:
        """Tells who answers that nobody listens any more."""
        self.pipeline.clear()
        if self._answering is not None and not self._answering.response_complete:
            self._answering.disconnected = True
            self._answering.message_event.set()
        if self._ended is None:
            self._ended = how
            if self._told is not None:
                self._told(how)

    def _expect(self) -> None:
        """A request has to be complete by then."""
        self._timer = self.loop.call_later(limits.REQUEST_S, self._late)

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        if self.pipeline:  # it is us who do not read on, while an earlier request is answered
            self._expect()
        else:
            self._refuse(_SLOW)

    def _stop(self, problem: Problem) -> NoReturn:
        """Refuses from within the parser."""
        self._refused = problem
        raise ValueError(problem.code)

    def _refuse(self, problem: Problem) -> None:
        """Answers, unless another answer has begun, and closes the connection when the client has had time to see it:
        closing it on bytes that were not read would take the answer back.
        """
        self._refused = problem
        self._cancel()
        if self._has_spoken:  # it is no crime to say nothing
            self._refusals.connection(self.client, problem)
        has_begun = self._is_under_way
        self._leave("left")
        if has_begun or self.transport.is_closing():
            self.transport.abort()
            return
        response = problem.response()
        fields = [*self.server_state.default_headers, *response.raw_headers, (b"connection", b"close")]
        head = b"".join(b"%s: %s\r\n" % field for field in fields)
        status = f"HTTP/1.1 {problem.status} {HTTPStatus(problem.status).phrase}\r\n".encode()
        self.transport.write(status + head + b"\r\n" + bytes(response.body))
        self.transport.write_eof()
        self.flow.resume_reading()
        self._timer = self.loop.call_later(limits.LINGER_S, self.transport.abort)
