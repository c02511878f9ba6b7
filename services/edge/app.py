"""The edge, wired: HTTP in, the tape behind, nothing kept here that another edge would need.

Here is what all calls have in common (routes, errors, the page); what each does is in `calls`.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send
from tapeline import limits, provision, telemetry
from tapeline.connection import Unavailable
from tapeline.settings import ConfigError, Settings
from tapeline.tape import Gone, Tape

from . import openapi
from .auth import Auth
from .calls import Calls
from .host import allowed_origins, is_loopback, proxies
from .lease import Leases
from .models import Models
from .problem import NOT_FOUND, Problem, not_found, unavailable
from .quota import Quota
from .refusal import Refusals
from .server import Server
from .stream import CONNECTION, STREAM
from .ticket import Tickets

PAGE: Final = Path(__file__).parent / "page" / "dist"
"""What `scripts/page` builds."""
ON_TAPE: Final = "/v1/conversations"
"""What needs NATS to answer."""
CSP: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
"""Nothing but what this edge serves; no inline script or style, and no HTML made of strings."""


def application(calls: Calls, refusals: Refusals, origins: Sequence[str] = ()) -> ASGIApp:
    """The routes, what errors look like, and the other `origins` whose pages may use them."""
    routes: list[BaseRoute] = [
        Route(call.path, _endpoint(getattr(calls, call.name), calls.tape), methods=[call.method])
        for call in openapi.CALLS
    ]
    routes += [
        Route("/", PageFiles(directory=PAGE, check_dir=False).index),
        Mount("/page", PageFiles(directory=PAGE / "page", check_dir=False)),
    ]
    cors = Middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=["GET", "POST", "PATCH", "DELETE"],
        allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID"],
        expose_headers=["Date", "ETag", "Location", "Retry-After"],
    )
    app = Starlette(
        routes=routes,
        middleware=[cors] if origins else [],
        exception_handlers={HTTPException: _http_error, Exception: _internal_error},
    )
    app.state.origins = origins
    app.state.refusals = refusals
    app.router.redirect_slashes = False  # it would name this edge as it sees itself, behind a proxy

    async def outermost(scope: Scope, receive: Receive, send: Send) -> None:
        await app(scope, receive, send)
        if stream := scope.get(STREAM):
            await stream.run(scope, receive, send)
        if connection := scope.get(CONNECTION):
            connection.returned(scope)

    return outermost


Handler = Callable[[Request], Awaitable[Any]]


def _endpoint(handler: Handler, tape: Tape) -> Handler:
    """The handler, its expected failures being answers."""

    async def endpoint(request: Request) -> Any:
        began = time.monotonic()
        try:
            if _is_foreign(request) and request.method != "GET":
                raise Problem(403, "cross_site", "A page of another site may not do this.")
            if request.url.path.startswith(ON_TAPE):
                await _present(tape)
            return await handler(request)
        except Problem as problem:
            request.app.state.refusals.request(request.scope, problem)
            if problem.code == NOT_FOUND:
                await _on_grid(began)
            return problem.response()
        except Gone:
            await _on_grid(began)
            return not_found().response()
        except Unavailable as error:
            return unavailable(str(error)).response()
        except ClientDisconnect:
            return Response()  # to nobody

    return endpoint


async def _present(tape: Tape) -> None:
    """Returns when NATS is there, which may be in a moment. Raises `Unavailable` before clients lose their patience."""
    give_up = time.monotonic() + limits.AWAY_S
    while not tape.connected:
        if time.monotonic() > give_up:
            raise Unavailable("NATS is not connected")
        await asyncio.sleep(limits.READ_RETRY_S)


def _is_foreign(request: Request) -> bool:
    """Whether the page that asks is of another origin, which nobody allowed. Another port is the same site to a
    browser, and any program of this machine may have one.
    """
    if request.headers.get("origin") in request.app.state.origins:
        return False
    return request.headers.get("sec-fetch-site") in ("cross-site", "same-site")


async def _on_grid(began: float) -> None:
    """Waits until a whole number of `NOT_FOUND_GRID_S` since `began`, so that the time of the answer does not tell what
    was looked at on the way to it: a stranger's conversation looks like none.
    """
    clock = time.monotonic
    leave = clock() + -(clock() - began) % limits.NOT_FOUND_GRID_S
    # A timer of uvloop waits whole milliseconds, so the rest of one would still tell: measured, 0.2 ms more of work
    # were 0.13 ms more of waiting, and are 0.001 ms like this.
    await asyncio.sleep(leave - clock() - limits.NOT_FOUND_SPIN_S)
    while clock() < leave:
        await asyncio.sleep(0)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return Problem(404, "no_such_path", "There is nothing here; the API is under /v1.").response()
    if error.status_code == 405:
        # Starlette names the methods of the first route only, and here each method has its own.
        known = [route for route in request.app.routes if isinstance(route, Route)]
        here = [route for route in known if route.matches(request.scope)[0] is not Match.NONE]
        allowed = sorted({method for route in here for method in route.methods or ()})
        detail = f"This takes {', '.join(allowed)}."
        return Problem(405, "method_not_allowed", detail, {"Allow": ", ".join(allowed)}).response()
    return Problem(error.status_code, "http_error", error.detail, error.headers).response()


async def _internal_error(_: Request, __: Exception) -> Response:
    return Problem(500, "internal", "Something went wrong here; the log of this edge says what.").response()


class PageFiles(StaticFiles):
    """The page: `index.html`, asked for again each time, and files that a browser need never ask for again, for their
    names change with their content.
    """

    async def index(self, request: Request) -> Response:
        """What `/` is."""
        try:
            response = await self.get_response("index.html", request.scope)
        except HTTPException:
            detail = "The page is not built here: run scripts/page. The API under /v1 needs no page."
            return Problem(503, "page_not_built", detail).response()
        response.headers["Content-Security-Policy"] = CSP
        response.headers["Cache-Control"] = "no-cache"
        response.headers["Referrer-Policy"] = "same-origin"
        return response

    def file_response(self, *args: Any, **more: Any) -> Response:
        """As Starlette makes it, and never taken for what it is not."""
        response = super().file_response(*args, **more)
        response.headers["Cache-Control"] = "public, max-age=31536000, immutable"
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response


async def main(settings: Settings) -> None:
    """Runs the edge until SIGTERM or SIGINT."""
    telemetry.setup("edge", exposes=True)
    host = settings.text("TAPELINE_HOST", "127.0.0.1")
    auth = Auth.configured(settings)
    if auth.open and not is_loopback(host):
        ways = "TAPELINE_API_KEYS, TAPELINE_JWT_SECRET or TAPELINE_JWKS_URL"
        raise ConfigError(f"TAPELINE_HOST={host} would let anyone in; set {ways}, or stay on 127.0.0.1")
    tickets = Tickets.configured(settings, auth)
    models = Models.configured(settings)
    origins = allowed_origins(settings)
    trusted = proxies(settings)
    heartbeat_s = settings.number("TAPELINE_HEARTBEAT_S", int(limits.HEARTBEAT_S), least=1, most=3600)
    tape = await Tape.open(settings.nats_url, "tapeline-edge")
    await provision.verify_patiently(tape)
    limited = not auth.open
    quota = Quota.configured(settings, tape, limited=limited)
    leases = Leases.configured(settings, tape, limited=limited)
    calls = Calls(tape, auth, tickets, models, quota, leases, heartbeat_s)
    port = settings.number("TAPELINE_PORT", 8080, least=0, most=65535)
    refusals = Refusals()
    keeping = asyncio.create_task(auth.keep())
    try:
        app = application(calls, refusals, origins)
        await Server(app, host, port, trusted, refusals, calls.streams.drain).serve()
    finally:
        keeping.cancel()
        calls.streams.close()
        await leases.close()
        await tape.close()
        telemetry.shutdown()
