"""A connection to NATS: made, kept, asked. What nats-py does by surprise about that is known here.

It knows nothing of streams and subjects: `tape` does.
"""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

import msgspec
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from . import limits

log = logging.getLogger(__name__)

PASSING_CODES: Final = (
    10005,  # no suitable peers for placement: the others may still be starting
    10118,  # stream offline
    10119,  # consumer offline
    10176,  # a batch of which this leader has not seen every message
)
ADDED: Final = frozenset(
    ("Nats-Stream", "Nats-Subject", "Nats-Sequence", "Nats-Time-Stamp", "Nats-Last-Sequence", "Nats-Num-Pending")
)
"""Headers with which the server delivers a message: all that we read of those it adds to the writer's."""


class Unavailable(Exception):
    """NATS or the stream did not answer. What was sent may have been stored: look before sending it again."""


class Refused(Exception):
    """The server will not do this, now or later."""


class Denied(Refused):
    """The credentials that we were given do not allow this."""


class ApiError(msgspec.Struct):
    """What the server says went wrong."""

    code: int = 0
    err_code: int = 0
    description: str = ""


class Pulse:
    """Whether leaders answer on a connection. It moves to another server where one has not for `MOVE_AFTER_S` because
    the server is cut off from its cluster: such a server goes on taking connections, and nothing comes of what is asked
    there.
    """

    def __init__(self, nc: Client) -> None:
        self._nc = nc
        self._silent_since: dict[str, float] = {}
        self._look_at = 0.0

    def felt(self, whom: str) -> None:
        """It was asked, and has answered."""
        self._silent_since.pop(whom, None)

    async def missed(self, whom: str) -> None:
        """It was asked, and has not answered."""
        now = asyncio.get_running_loop().time()
        silent_s = now - self._silent_since.setdefault(whom, now)
        if silent_s < limits.MOVE_AFTER_S or now < self._look_at or len(self._nc.servers) == 1:
            return
        self._look_at = now + limits.MOVE_AGAIN_S
        try:
            await api(self._nc, "INFO")  # it is a leader that answers this, so the server is in touch with its cluster
        except Unavailable:
            log.warning("nats: no answer from %s for %.0f s; trying another server", whom, silent_s)
            await self._nc.force_reconnect()

    async def take(self) -> None:
        """Asks, for a connection on which nothing else is asked that would show."""
        whom = "JetStream"
        try:
            await api(self._nc, "INFO")
        except Unavailable:
            await self.missed(whom)
        else:
            self.felt(whom)


class Connection(Client):
    """nats-py's client, but for the headers of what it receives."""

    @staticmethod
    def _parse_header_lines(raw: bytes) -> dict[str, str]:
        # nats-py looks at every character of every name: measured, more than a third of what an edge did.
        headers = {}
        for line in raw.decode("utf-8", "replace").split("\r\n"):
            name, colon, value = line.partition(":")
            name = name.strip()
            # Of a writer's own the server heeds the first, and so do we; what it adds comes last, and counts.
            if colon and (name not in headers or name in ADDED):
                headers[name] = value.strip()
        return headers


# Requests under way, each with its subject, lest one that is denied wait for an answer that cannot come.
_waiting: Final[WeakKeyDictionary[Client, dict[asyncio.Timeout, str]]] = WeakKeyDictionary()
_DENIED: Final = re.compile(r'permissions violation for publish to "(.+)"')  # nats-py says it in lower case

Doubts = set[Callable[[], None]]  # who wants to know that the connection was lost and is back


async def connect(url: str, name: str, doubts: Doubts | None = None) -> Client:
    """A connection that comes back by itself for as long as it lives. Raises `Unavailable`, `Denied`."""
    nc = Connection()
    refused: Exception | None = None

    async def on_error(error: Exception) -> None:
        nonlocal refused
        if is_denial(error):
            log.error("these credentials do not allow it: %s", reason(error))
            _deny(nc, error)
        elif nc.is_connected:
            log.warning("nats: %s", reason(error))
        else:
            if not (refused and _is_rejection(refused)):  # after which the server may just hang up on us
                refused = error  # one more try that failed: that the connection is lost has been said
            log.debug("nats: %s", reason(error))

    async def on_disconnect() -> None:
        if not nc.is_closed:
            log.warning("nats: connection lost")

    async def on_reconnect() -> None:
        log.warning("nats: connected again")
        for doubt in tuple(doubts or ()):
            doubt()

    named, known = login(url)
    try:
        await _within(
            limits.CONNECT_TIMEOUT_S * len(named) + 1,
            nc.connect(
                named,
                user=known[0] if known else None,
                password=known[1] if known else None,
                name=name,
                error_cb=on_error,
                disconnected_cb=on_disconnect,
                reconnected_cb=on_reconnect,
                connect_timeout=limits.CONNECT_TIMEOUT_S,
                max_reconnect_attempts=-1,
                reconnect_time_wait=0.2,  # type: ignore[arg-type] # seconds to sleep, and a fraction will do
                ping_interval=10,
                max_outstanding_pings=2,
            ),
        )
    except (OSError, TimeoutError, nats.errors.Error) as error:
        if nc._transport is not None:  # noqa: SLF001 - of the last try, which nobody else would close
            nc._transport.close()  # type: ignore[no-untyped-call] # noqa: SLF001
        if _is_rejection(refused or error):
            raise Denied(f"NATS at {_redacted(url)} does not accept these credentials") from error
        raise Unavailable(f"cannot reach NATS at {_redacted(url)}: {reason(refused or error)}") from error
    return nc


async def _within(timeout_s: float, work: Coroutine[Any, Any, None]) -> None:
    """Waits for the work for so long. Raises `TimeoutError`.

    As `asyncio.timeout`, for what has nats-py's `wait_for` in a loop that tries again: that may swallow a cancellation,
    and the loop would go on for ever. So it is cancelled until it has ended.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=timeout_s)
        if not task.done():
            raise TimeoutError(f"not within {timeout_s:g} s")
        task.result()
    finally:
        while not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=limits.CANCEL_AGAIN_S)


class _Straight:
    """Stands where a subscription of nats-py has its queue."""

    def __init__(self, take: Callable[[Msg], None]) -> None:
        self._take = take

    def put_nowait(self, message: Msg) -> None:
        try:
            self._take(message)
        except Exception:  # it would end the connection's read loop
            log.exception("a message on %s could not be taken", message.subject)


async def listen(nc: Client, subject: str, take: Callable[[Msg], None]) -> Subscription:
    """Has `take` called with each message as it is read, before anything else is; it must not wait, and bounds what it
    keeps. nats-py itself has a queue and a task for each subscription: 4 KiB, and one more turn of the loop a message.
    """
    subscription = await nc.subscribe(subject, pending_bytes_limit=0)
    subscription._pending_queue = _Straight(take)  # type: ignore[assignment] # noqa: SLF001 - see above
    subscription._message_iterator = None  # noqa: SLF001 - it has the queue
    return subscription


async def api(nc: Client, method: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Calls the JetStream API with plain JSON: nats-py's own types drop settings they do not know.

    Raises `Refused` with the server's words, `Unavailable`.
    """
    answered = await request(nc, f"$JS.API.{method}", msgspec.json.encode(body) if body else b"")
    answer: dict[str, Any] = msgspec.json.decode(answered.data)
    if error := answer.get("error"):
        raise failure(msgspec.convert(error, ApiError), f"{method}: {error.get('description', error)}")
    return answer


def failure(error: ApiError, words: str) -> Unavailable | Refused:
    """What an error of the server means to us: a cluster that elects a leader is away, it does not refuse."""
    passing = error.code in (429, 503) or error.err_code in PASSING_CODES
    return Unavailable(words) if passing else Refused(words)


async def reply(nc: Client, subject: str, body: bytes, timeout_s: float, headers: dict[str, str] | None = None) -> Msg:
    """Sends a request and waits for its reply. Raises what nats-py raises, `TimeoutError`, `Denied`."""
    # Not nats-py's own timeout: that is `wait_for`, which in Python 3.11 can swallow a cancellation when the reply
    # comes at the same moment, and then whoever cancelled waits for ever.
    async with answered(nc, subject, timeout_s):
        return await nc.request(subject, body, timeout=None, headers=headers)  # type: ignore[arg-type]


@asynccontextmanager
async def answered(nc: Client, subject: str, timeout_s: float) -> AsyncIterator[None]:
    """For what is sent to `subject` within and waits for an answer. Raises `TimeoutError`, and `Denied` at once."""
    waiting = _waiting.setdefault(nc, {})
    limit = asyncio.timeout(timeout_s)
    try:
        async with limit:
            waiting[limit] = subject
            yield
    except TimeoutError:
        if limit not in waiting:
            raise Denied(f"these credentials do not allow publishing to {subject}") from None
        raise
    finally:
        waiting.pop(limit, None)


def is_denial(error: Exception) -> bool:
    """Whether the server says that our credentials do not allow something."""
    return "permissions violation" in reason(error).lower()


def _is_rejection(error: Exception) -> bool:
    """Whether the server says that it does not know our credentials."""
    return "authorization violation" in reason(error).lower()


def _deny(nc: Client, error: Exception) -> None:
    """Ends the wait of every request to the subject that was denied."""
    if denied := _DENIED.search(reason(error).lower()):
        waiting = _waiting.get(nc, {})
        for limit in [limit for limit, subject in waiting.items() if subject.lower() == denied[1]]:
            if not limit.expired():
                del waiting[limit]
                limit.reschedule(asyncio.get_running_loop().time())


async def request(nc: Client, subject: str, body: bytes) -> Msg:
    """Asks JetStream something that changes nothing. Raises `Unavailable`, `Denied`."""
    try:
        return await reply(nc, subject, body, limits.READ_TIMEOUT_S)
    except (nats.errors.Error, TimeoutError) as error:
        raise Unavailable(f"no answer from JetStream: {reason(error)}") from error


def reason(error: Exception) -> str:
    """The error in words, also where it has none."""
    return str(error) or type(error).__name__


def servers(url: str) -> list[str]:
    """The servers that a setting names, separated by commas."""
    return [server.strip() for server in url.split(",") if server.strip()]


def login(url: str) -> tuple[list[str], tuple[str, str] | None]:
    """The servers that a setting names, and the user and the password where it names one for all of them.

    These are then no part of a server's address, so that one comes in also at a server of which only the others told
    us, and knows that one for the same which is told of twice.
    """
    named = servers(url)
    found = {(parts.username, parts.password) for parts in map(urlsplit, named)}
    user, password = found.pop() if len(found) == 1 else (None, None)
    if user is None or password is None:
        return named, None
    return list(map(_without_credentials, named)), (user, password)


def _redacted(url: str) -> str:
    return ", ".join(_without_credentials(server) for server in servers(url))


def _without_credentials(server: str) -> str:
    scheme, at, host = server.rpartition("@")
    return f"{scheme.partition('://')[0]}://{host}" if at else server
