"""What each call of the HTTP API does: who asks, what for, and which answer that gets.

A handler reads a request and makes an answer. What happens in between is for the modules it asks.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable
from typing import Any

import msgspec
from opentelemetry import trace
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp
from tapeline import limits, provision, telemetry
from tapeline.connection import Refused, Unavailable
from tapeline.depth import is_too_deep
from tapeline.tape import Tape, find

from . import answer, body, openapi, result
from .auth import Auth, Caller
from .conversations import Conversations, about_of, url
from .feed import Feeds, View
from .lease import Leases
from .meters import Meters
from .models import Models
from .problem import Problem, unavailable
from .quota import Quota
from .stream import Events, Lines, Reading, Replay, Streams
from .ticket import Tickets

_tracer = trace.get_tracer("tapeline")


class Calls:
    """The calls of the API, over one tape; what each looks like from outside is in `openapi`."""

    def __init__(
        self,
        tape: Tape,
        auth: Auth,
        tickets: Tickets,
        choice: Models,
        quota: Quota,
        leases: Leases,
        heartbeat_s: float,
    ) -> None:
        self.tape = tape
        self.auth = auth
        self.tickets = tickets
        self.leases = leases
        self.choice = choice
        self.conversations = Conversations(tape, choice, quota)
        meters = Meters()
        self.streams = Streams(Feeds(tape, meters), meters, heartbeat_s)
        self._document = openapi.document(secured=not auth.open)
        self._drift: tuple[float, list[str]] = (-math.inf, [])
        self._looking = asyncio.Lock()

    async def create(self, request: Request) -> Response:
        caller = await self.auth.caller(request)
        new = await body.read(request, body.NewConversation)
        _check_bounds("metadata", new.metadata, limits.METADATA_BYTES_MAX)
        conversation, seq = await self.conversations.create(caller.user, new)
        here = url(conversation)
        return _json(answer.Created(conversation, seq, here, f"{here}/events"), 201, {"Location": here})

    async def index(self, request: Request) -> Response:
        caller = await self.auth.caller(request)
        limit, before = body.page(request)
        found, following = await self.conversations.listing.page(caller.user, limit, before)
        mine = [answer.Entry(one.id, one.title, one.created_ts, url(one.id)) for one in found]
        return _json(answer.Page(mine, None if following is None else str(following)))

    async def rename(self, request: Request) -> Response:
        caller = await self.auth.caller(request)
        conversation = body.conversation(request)
        new = await body.read(request, body.NewTitle)
        return _json(await self.conversations.rename(caller.user, conversation, new.title))

    async def delete(self, request: Request) -> Response:
        caller = await self.auth.caller(request)
        await self.conversations.delete(caller.user, body.conversation(request))
        return Response(status_code=204)

    async def show(self, request: Request) -> Response:
        caller = await self.auth.caller(request)
        return _json(await self.conversations.shown(caller.user, body.conversation(request)))

    async def post(self, request: Request) -> ASGIApp:
        caller = await self.auth.caller(request)
        conversation = body.conversation(request)
        key = body.idempotency_key(request)
        new = await body.read(request, body.NewMessage)
        is_streamed = "text/event-stream" in request.headers.get("accept", "")
        with contextlib.ExitStack() as undo:
            if is_streamed:  # before the message is on the tape
                undo.callback(await self._place(caller))
            with _tracer.start_as_current_span(
                "post message",
                context=telemetry.context(request.headers),
                kind=trace.SpanKind.SERVER,
                attributes={"gen_ai.conversation.id": conversation},
            ) as span:
                posted = await self.conversations.post(caller.user, conversation, new, key)
                span.set_attribute("tapeline.run", posted.run)
            before = posted.event_id - 1
            if is_streamed:
                reading = Reading(conversation, posted.about, before, View(posted.run), until=caller.expires_at)
                return Events(reading, self.streams, undo.pop_all().close)
        events_url = f"{url(conversation)}/events?run={posted.run}&after={before}"
        return _json(answer.Posted(posted.run, posted.event_id, events_url), 202)

    async def events(self, request: Request) -> ASGIApp:
        caller = await self._reader(request)
        conversation = body.conversation(request)
        after, view, run = body.cursor(request), body.view(request), request.query_params.get("run")
        pace = body.pace(request)
        about = self.streams.feeds.about(conversation, caller.user, after, run)
        if about is None:  # a thousand who lost their edge come at once, and need not all ask
            about = about_of(await self.conversations.owned(caller.user, conversation), run)
        end = None
        if about.span is not None:
            after, end = max(after, about.span.first - 1), about.span.ended
        await self.conversations.check_cursor(conversation, about, after, full=view == "full")
        if pace and end is None:  # of what is stored, which may be all of a run that goes on
            end = about.last_event_id
        resumed = "last-event-id" in request.headers
        reading = Reading(conversation, about, after, View(run, view == "compact"), resumed, caller.expires_at)
        is_lines = "application/x-ndjson" in request.headers.get("accept", "")
        if end is not None and after >= end and not is_lines:
            return Response(status_code=204)  # at which an EventSource stops
        release = await self._place(caller, may_end_at_once=not is_lines)
        if is_lines:
            return Lines(reading, self.streams, release, self.tape, pace)
        if pace:
            return Replay(reading, self.streams, release, self.tape, pace)
        return Events(reading, self.streams, release)

    async def ticket(self, request: Request) -> Response:
        caller = await self.auth.caller(request)
        conversation = body.conversation(request)
        if self.streams.feeds.about(conversation, caller.user) is None:
            await self.conversations.owned(caller.user, conversation)
        ticket, expires_ts = self.tickets.issue(caller, conversation)
        events_url = f"{url(conversation)}/events?ticket={ticket}"
        return _json(answer.Ticket(ticket, expires_ts, events_url), 201, {"Cache-Control": "no-store"})

    async def stop(self, request: Request) -> Response:
        caller = await self.auth.caller(request)
        conversation, run = body.conversation(request), request.path_params["run"]
        new = await body.read(request, body.NewStop)
        await self.conversations.stop(caller.user, conversation, run, new.reason)
        return _json(answer.Stopped(run), 202)

    async def result(self, request: Request) -> Response:
        caller = await self.auth.caller(request)
        conversation, named = body.conversation(request), request.path_params
        call = await self.conversations.returned(caller.user, conversation, named["run"], named["call"])
        return result.response(request, self.tape, conversation, call)

    async def approve(self, request: Request) -> Response:
        caller = await self.auth.caller(request)
        conversation, run = body.conversation(request), request.path_params["run"]
        call = request.path_params["call"]
        new = await body.read(request, body.NewApproval)
        if new.arguments is not None:
            if not new.approved:
                raise Problem(422, "invalid", "`arguments` are for a call that is approved.")
            _check_bounds("arguments", new.arguments, limits.ARGUMENTS_BYTES_MAX)
        await self.conversations.approve(caller.user, conversation, run, call, new)
        return _json(answer.Decided(run, call, new.approved), 202)

    async def models(self, request: Request) -> Response:
        await self.auth.caller(request)
        return _json(self.choice.listed())

    async def healthz(self, _: Request) -> Response:
        return _json(answer.Health())

    async def readyz(self, _: Request) -> Response:
        if self.streams.draining:
            why = ["draining"]
        elif not self.tape.connected:
            why = ["NATS is not connected"]
        else:
            why = await self._drifted()
        return _json(answer.Readiness("not ready" if why else "ready", why), 503 if why else 200)

    async def metrics(self, _: Request) -> Response:
        exposition, media_type = telemetry.exposition()
        return Response(exposition, media_type=media_type)

    async def openapi(self, _: Request) -> Response:
        headers = {"Cache-Control": f"public, max-age={limits.DOCUMENT_CACHE_S}"}
        return Response(self._document, headers=headers, media_type="application/json")

    async def _reader(self, request: Request) -> Caller:
        """Who asks for events: by a ticket, where there is one, which is good for nothing else."""
        ticket = request.query_params.get("ticket")
        if ticket is None:
            return await self.auth.caller(request)
        self.auth.check_host(request)
        return self.tickets.caller(ticket, request.path_params["conversation"])

    async def _place(self, caller: Caller, *, may_end_at_once: bool = False) -> Callable[[], None]:
        """A place for one more stream; what gives it back. Raises `Problem` 429 and 503, `Unavailable`.

        An EventSource gives up on a 503, and comes back to another edge after a stream that ends as it begins.
        """
        if self.streams.draining and not may_end_at_once:
            raise unavailable("this edge is going away; another one answers.")
        return await self.leases.take(caller.user)

    async def _drifted(self) -> list[str]:
        """What is not as provisioned; asked of NATS at most once in a while, whoever else asks us meanwhile."""
        async with self._looking:
            asked, lines = self._drift
            if time.monotonic() - asked > limits.READINESS_CACHE_S:
                try:
                    lines = await provision.drift(self.tape.nc, await find(self.tape.nc))
                except (Unavailable, Refused) as error:
                    lines = [str(error)]
                self._drift = (time.monotonic(), lines)
            return lines


def _check_bounds(field: str, content: dict[str, Any], bytes_max: int) -> None:
    """Refuses what would be too much for the tape, or for whoever reads it."""
    if len(msgspec.json.encode(content)) > bytes_max:
        raise Problem(422, "invalid", f"`{field}` may have {bytes_max} bytes at most.")
    if is_too_deep(content):
        raise Problem(422, "invalid", f"`{field}` may be nested {limits.JSON_DEPTH_MAX} deep at most.")


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, "application/json")
