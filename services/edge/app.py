"""The edge, wired: HTTP in, the tape behind, nothing kept here that another edge would need."""

import asyncio
import logging
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import FrameType
from typing import Any, Final

import msgspec
import uvicorn
from opentelemetry import trace
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp
from tapeline import limits, provision, telemetry
from tapeline.connection import Refused, Unavailable
from tapeline.settings import ConfigError, Settings
from tapeline.tape import Tape, find

from . import body
from .auth import Auth, is_loopback
from .conversations import Conversations, run_in
from .feed import Feeds
from .meters import Meters
from .problem import Problem, unavailable
from .stream import Events, Lines, Reading

log = logging.getLogger(__name__)
_tracer = trace.get_tracer("tapeline")

PAGE: Final = Path(__file__).parent / "page"
CSP: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Nothing but what this edge serves; no inline script or style."""


class Edge:
    """One edge: its handlers, over one tape."""

    def __init__(self, tape: Tape, auth: Auth, heartbeat_s: float) -> None:
        self.tape = tape
        self.auth = auth
        self.heartbeat_s = heartbeat_s
        self.draining = asyncio.Event()
        self.conversations = Conversations(tape)
        self.meters = Meters()
        self.feeds = Feeds(tape, self.meters)
        self._drift: tuple[float, list[str]] = (0.0, [])

    async def create(self, request: Request) -> Response:
        user = self.auth.user(request)
        new = await body.read(request, body.NewConversation)
        if len(msgspec.json.encode(new.metadata)) > limits.METADATA_BYTES_MAX:
            raise Problem(422, "invalid", f"`metadata` may have {limits.METADATA_BYTES_MAX} bytes at most.")
        conversation, seq = await self.conversations.create(user, new)
        url = f"/v1/conversations/{conversation}"
        return _json(
            {"id": conversation, "event_id": seq, "url": url, "events_url": f"{url}/events"},
            201,
            {"Location": url},
        )

    async def show(self, request: Request) -> Response:
        user = self.auth.user(request)
        return _json(await self.conversations.shown(user, body.conversation(request)))

    async def post(self, request: Request) -> ASGIApp:
        user = self.auth.user(request)
        conversation = body.conversation(request)
        key = body.idempotency_key(request)
        new = await body.read(request, body.NewMessage)
        with _tracer.start_as_current_span(
            "post message",
            context=telemetry.context(request.headers),
            kind=trace.SpanKind.SERVER,
            attributes={"gen_ai.conversation.id": conversation},
        ) as span:
            posted = await self.conversations.post(user, conversation, new, key)
            span.set_attribute("tapeline.run", posted.run)
        before = posted.event_id - 1
        if "text/event-stream" in request.headers.get("accept", ""):
            return self._events(Reading(conversation, before, posted.run))
        events_url = f"/v1/conversations/{conversation}/events?run={posted.run}&after={before}"
        return _json({"run": posted.run, "event_id": posted.event_id, "events_url": events_url}, 202)

    async def events(self, request: Request) -> ASGIApp:
        user = self.auth.user(request)
        conversation = body.conversation(request)
        after, view, run = body.cursor(request), body.view(request), request.query_params.get("run")
        state = await self.conversations.owned(user, conversation)
        if after > state.last_event_id:
            raise Problem(
                410,
                "cursor_ahead",
                "This cursor is newer than the log. Load the snapshot and follow after its `last_event_id`.",
                earliest=0,
                snapshot=f"/v1/conversations/{conversation}",
            )
        reading = Reading(conversation, after, run, view == "compact", resumed="last-event-id" in request.headers)
        ended = run_in(state, run).ended_event_id if run is not None else None
        if "application/x-ndjson" in request.headers.get("accept", ""):
            return Lines(reading, self.tape)
        if ended is not None and after >= ended:
            return Response(status_code=204)
        return self._events(reading)

    async def stop(self, request: Request) -> Response:
        user = self.auth.user(request)
        conversation, run = body.conversation(request), request.path_params["run"]
        new = await body.read(request, body.NewStop)
        await self.conversations.stop(user, conversation, run, new.reason)
        return _json({"run": run}, 202)

    async def healthz(self, _: Request) -> Response:
        return _json({"status": "ok"})

    async def readyz(self, _: Request) -> Response:
        if self.draining.is_set():
            why = ["draining"]
        elif not self.tape.connected:
            why = ["NATS is not connected"]
        else:
            why = await self._drifted()
        return _json({"status": "not ready" if why else "ready", "why": why}, 503 if why else 200)

    async def metrics(self, _: Request) -> Response:
        exposition, media_type = telemetry.exposition()
        return Response(exposition, media_type=media_type)

    async def page(self, _: Request) -> Response:
        return FileResponse(
            PAGE / "index.html",
            headers={"Content-Security-Policy": CSP, "Cache-Control": "no-cache", "Referrer-Policy": "same-origin"},
        )

    def _events(self, reading: Reading) -> Events:
        if self.draining.is_set():
            raise unavailable("this edge is going away; another one answers.")
        return Events(reading, self.feeds, self.meters, self.draining, self.heartbeat_s)

    async def _drifted(self) -> list[str]:
        """What is not as provisioned; asked of NATS at most once in a while."""
        asked, lines = self._drift
        if time.monotonic() - asked > limits.READINESS_CACHE_S or lines:
            try:
                lines = await provision.drift(self.tape.nc, await find(self.tape.nc))
            except (Unavailable, Refused) as error:
                lines = [str(error)]
            self._drift = (time.monotonic(), lines)
        return lines


def application(edge: Edge) -> Starlette:
    """The routes, and what errors look like."""
    one = "/v1/conversations/{conversation}"
    routes = [
        Route("/v1/conversations", _endpoint(edge.create), methods=["POST"]),
        Route(one, _endpoint(edge.show), methods=["GET"]),
        Route(f"{one}/messages", _endpoint(edge.post), methods=["POST"]),
        Route(f"{one}/events", _endpoint(edge.events), methods=["GET"]),
        Route(f"{one}/runs/{{run}}/stop", _endpoint(edge.stop), methods=["POST"]),
        Route("/healthz", edge.healthz),
        Route("/readyz", edge.readyz),
        Route("/metrics", edge.metrics),
        Route("/", edge.page),
        Mount("/page", PageFiles(directory=PAGE)),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _http_error, Exception: _internal_error})
    app.router.redirect_slashes = False  # it would name this edge as it sees itself, behind a proxy
    return app


Handler = Callable[[Request], Awaitable[Any]]


def _endpoint(handler: Handler) -> Handler:
    """The handler, its expected failures being answers."""

    async def endpoint(request: Request) -> Any:
        try:
            if request.headers.get("sec-fetch-site") == "cross-site" and request.method != "GET":
                raise Problem(403, "cross_site", "A page of another site may not do this.")
            return await handler(request)
        except Problem as problem:
            return problem.response()
        except Unavailable as error:
            return unavailable(str(error)).response()

    return endpoint


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return Problem(404, "no_such_path", "There is nothing here; the API is under /v1.").response()
    code = "method_not_allowed" if error.status_code == 405 else "http_error"
    return Problem(error.status_code, code, error.detail, error.headers).response()


async def _internal_error(_: Request, __: Exception) -> Response:
    return Problem(500, "internal", "Something went wrong here; the log of this edge says what.").response()


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, "application/json")


class PageFiles(StaticFiles):
    """The page's files: asked for again each time, and answered 304 while they are the same."""

    def file_response(self, *args: Any, **more: Any) -> Response:
        """As Starlette makes it, and never taken for what it is not."""
        response = super().file_response(*args, **more)
        response.headers["Cache-Control"] = "no-cache"
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response


class Server(uvicorn.Server):
    """Uvicorn waits for open responses when it is asked to end, so these are told first."""

    def __init__(self, config: uvicorn.Config, draining: asyncio.Event) -> None:
        super().__init__(config)
        self._draining = draining

    def handle_exit(self, sig: int, _: FrameType | None) -> None:
        """Not ready, no new stream, and the open ones end. A second Ctrl-C does not wait for that.

        Uvicorn's own would raise the signal again in the end, which kills the process before it has cleaned up.
        """
        self._draining.set()
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


async def main(settings: Settings) -> None:
    """Runs the edge until SIGTERM or SIGINT."""
    telemetry.setup("edge")
    host = settings.text("TAPELINE_HOST", "127.0.0.1")
    auth = Auth.configured(settings)
    if auth.open and not is_loopback(host):
        raise ConfigError(f"TAPELINE_HOST={host} would let anyone in; set TAPELINE_API_KEYS, or stay on 127.0.0.1")
    heartbeat_s = settings.number("TAPELINE_HEARTBEAT_S", int(limits.HEARTBEAT_S), least=1, most=3600)
    tape = await Tape.open(settings.nats_url, "tapeline-edge")
    await provision.verify_patiently(tape)
    edge = Edge(tape, auth, heartbeat_s)
    config = uvicorn.Config(
        application(edge),
        host=host,
        port=settings.number("TAPELINE_PORT", 8080, least=0, most=65535),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=int(limits.DRAIN_S),
    )
    try:
        await Server(config, edge.draining).serve()
    finally:
        edge.feeds.close()
        await tape.close()
        telemetry.shutdown()
