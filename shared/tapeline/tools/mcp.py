"""MCP servers whose tools a worker offers: kept running, asked for their tools, called.

A server is one task that starts it, lists its tools again and again, and starts over when it is lost. What it offers
is empty until it has answered, and again as soon as it no longer does. Needs `tapeline[mcp]`.
"""

import asyncio
import contextlib
import contextvars
import functools
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, Literal, NoReturn, TextIO, TypeVar

import anyio
import httpx2
import mcp_types
import pydantic
from mcp.client.client import Client
from mcp.client.session import IncomingMessage
from mcp.client.stdio import StdioServerParameters, stdio_client
from mcp.client.streamable_http import MCP_SESSION_ID, streamable_http_client
from mcp.client.subscriptions import ListenNotSupportedError, SubscriptionLost
from mcp.shared.dispatcher import ProgressFnT
from mcp.shared.exceptions import MCPError
from mcp.shared.message import SessionMessage

from tapeline import limits

from .context import Context, Lost, ToolError, readable
from .definition import AnyTool
from .mcp_tool import content, text, tools
from .servers import ServerConfig

log = logging.getLogger(__name__)

_REFUSALS: Final = (400, 404)  # 404 is the specification's, 400 what many servers answer to a session they do not know

_errors: contextvars.ContextVar[list[int]] = contextvars.ContextVar("errors")
"""The HTTP statuses by which what is asked fails: a transport sends each request in its caller's context."""

State = Literal["starting", "up", "doubted", "over"]
T = TypeVar("T")


class Servers:
    """All servers of a worker. `changed` is called whenever they offer others."""

    def __init__(self, configs: Mapping[str, ServerConfig], changed: Callable[[], object]) -> None:
        self._servers = [Server(name, config, changed) for name, config in configs.items()]
        self._left_out: set[str] = set()

    def offered(self, taken: Collection[str] = ()) -> list[AnyTool]:
        """What the servers that are up offer beside tools of the `taken` names. Where two have a tool of one name, the
        first in the file has it.
        """
        named: dict[str, AnyTool] = {}
        left_out = set()
        for server in self._servers:
            for tool in server.tools:
                if tool.name in taken or tool.name in named:
                    left_out.add(f"MCP server {server.name}: tool {tool.name} is left out: there is one of that name")
                else:
                    named[tool.name] = tool
        for line in sorted(left_out - self._left_out):
            log.warning("%s", line)
        self._left_out = left_out
        return list(named.values())

    async def live(self) -> None:
        """Runs them until it is cancelled, and then ends their processes. Calls must be made on the same loop."""
        logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line for each request, its URL in it
        logging.getLogger("mcp").setLevel(logging.CRITICAL)  # pages for what we say in a line
        async with asyncio.TaskGroup() as group:
            for server in self._servers:
                group.create_task(server.live())


class Server:
    """One server. `tools` are what it offers at the moment."""

    def __init__(self, name: str, config: ServerConfig, changed: Callable[[], object]) -> None:
        self.name = name
        self.config = config
        self.tools: list[AnyTool] = []
        self._changed = changed
        self._listed: list[mcp_types.Tool] = []
        self._turned = asyncio.Event()
        self._session = _Session(self._wake)

    def _wake(self) -> None:
        turned, self._turned = self._turned, asyncio.Event()
        turned.set()

    async def _until(self, is_so: Callable[[], bool], within_s: float | None = None) -> bool:
        """Returns as soon as it is so, or not within that time; whether it is. A session is what may make it so."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while not is_so():
                    await self._turned.wait()
        return is_so()

    # Its life

    async def live(self) -> NoReturn:
        """Keeps it up until it is cancelled, and then ends it."""
        failures = 0
        while True:
            began = time.monotonic()
            try:
                await self._be_up()
            except Exception as error:  # noqa: BLE001 - whatever it was, the server is started again
                if time.monotonic() - began > limits.MCP_STEADY_S:
                    failures = 0
                pause_s = limits.MCP_RETRY_S[min(failures, len(limits.MCP_RETRY_S) - 1)]
                failures += 1
                log.warning("MCP server %s is not up: %s; starting it in %g s", self.name, _reason(error), pause_s)
            await asyncio.sleep(pause_s)

    async def _be_up(self) -> NoReturn:
        """Starts it and looks after it. Returns only by what ended it."""
        session = self._session = _Session(self._wake)
        async with contextlib.AsyncExitStack() as stack:
            async with asyncio.timeout(limits.MCP_START_S):
                client = session.client = await stack.enter_async_context(self._connected(session))
                listed = await self._list(client)
            listening = asyncio.create_task(self._listen(session))
            stack.callback(listening.cancel)
            stack.callback(self._go_down, session)  # before the process is waited for
            log.info("MCP server %s is up with %d tools", self.name, len(listed))
            session.answered()
            self._offer(listed)
            while True:
                await self._until(lambda: session.look or session.state == "over", limits.MCP_CHECK_S)
                session.look = False
                try:
                    await self._check(session)
                except (_Refused, _Closed):
                    self._go_down(session)
                    # A call may be refused as well, which is better than lost.
                    await self._until(lambda: not session.calls, limits.MCP_LAST_WORDS_S)
                    raise

    async def _check(self, session: "_Session") -> None:
        """Asks it for its tools, which also says whether it is alive. Raises what gives it up."""
        try:
            async with asyncio.timeout(limits.MCP_ANSWER_S):
                listed = await session.ask(self._list(session.client))
        except (TimeoutError, MCPError):
            # It may do one thing at a time, and then it is silent for as long as a call may take; or it has had enough
            # of questions for now.
            if not session.calls or time.monotonic() - session.heard > self.config.timeout_s:
                raise
        else:
            session.answered()
            self._offer(listed)

    def _go_down(self, session: "_Session") -> None:
        session.turn("over")
        self._offer([])

    @contextlib.asynccontextmanager
    async def _connected(self, session: "_Session") -> AsyncIterator[Client]:
        """A session with it, its process or its HTTP connections included."""
        async with contextlib.AsyncExitStack() as stack:
            said: TextIO | None = None
            if self.config.command is not None:
                said = await stack.enter_async_context(_pipe(self._said))
                parameters = StdioServerParameters(
                    command=self.config.command, args=self.config.args, env=self.config.env, cwd=self.config.cwd
                )
                transport = stdio_client(parameters, said)
            else:
                assert self.config.url is not None
                http = httpx2.AsyncClient(
                    # Without compression, so that what is read is as large as what comes of it.
                    headers={"Accept-Encoding": "identity", **self.config.headers},
                    timeout=httpx2.Timeout(limits.MCP_CONNECT_S, read=None),  # a call may be silent until its deadline
                    event_hooks={"response": [session.responded]},
                )
                await stack.enter_async_context(http)
                transport = streamable_http_client(
                    self.config.url, http_client=http, max_sse_event_size=limits.MCP_MESSAGE_BYTES_MAX
                )
            client = await stack.enter_async_context(
                Client(
                    _watched(transport, session.end), cache=None, message_handler=functools.partial(self._told, session)
                )
            )
            if said is not None:
                said.close()  # its process has it now
            yield client

    async def _list(self, client: Client) -> list[mcp_types.Tool]:
        listed: list[mcp_types.Tool] = []
        cursor = None
        while True:
            page = await client.list_tools(cursor=cursor)
            listed += page.tools
            cursor = page.next_cursor
            if cursor is None or len(listed) > limits.MCP_LISTED_MAX:
                return listed

    def _offer(self, listed: list[mcp_types.Tool]) -> None:
        if listed != self._listed:
            self._listed = listed
            self.tools = tools(self.name, self.config, listed, self._call) if listed else []
            self._changed()

    async def _listen(self, session: "_Session") -> None:
        """Newer servers tell of changes only to whoever asks."""
        with contextlib.suppress(ListenNotSupportedError, SubscriptionLost, MCPError):
            async with session.client.listen(tools_list_changed=True) as changes:
                async for _ in changes:
                    session.look_at()

    async def _told(self, session: "_Session", message: IncomingMessage) -> None:
        if isinstance(message, mcp_types.ToolListChangedNotification):
            session.look_at()
        elif isinstance(message, Exception):
            log.warning("MCP server %s wrote what is no message: %s", self.name, _reason(message))

    async def _said(self, pipe: asyncio.StreamReader) -> None:
        """What its process writes to its standard error, which ends with it."""
        while True:
            try:
                line = await pipe.readuntil()
            except asyncio.LimitOverrunError as error:  # a long line, as several
                line = await pipe.read(min(error.consumed, limits.MCP_LOG_BYTES_MAX))
            except asyncio.IncompleteReadError as error:
                line = error.partial
                if not line:
                    return
            if words := line.decode(errors="replace").rstrip():
                log.info("MCP server %s says: %s", self.name, words)

    # A call

    async def _call(self, name: str, arguments: dict[str, Any], context: Context) -> Any:
        """Calls its tool of that name; a stop, and being cancelled, reach the server. Raises `ToolError`, `Lost`."""
        stop = asyncio.create_task(context.stopped.wait())
        work = asyncio.create_task(self._ask(name, arguments, context))
        try:
            await asyncio.wait({stop, work}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
        finally:
            stop.cancel()
            work.cancel()
            await asyncio.wait({work})
        raise ToolError("the run was stopped while the tool was running")

    async def _ask(self, name: str, arguments: dict[str, Any], context: Context) -> Any:
        async def say(progress: float, total: float | None, message: str | None) -> None:
            context.progress(progress / total if total else None, message or ("" if total else f"{progress:g}"))

        for _ in range(2):
            await self._until(lambda: self._session.state == "up")
            session = self._session
            try:
                answer = await session.call(name, arguments, say)
            except _Refused as refused:
                if not await self._is_over(session):  # it does not like the call
                    raise ToolError(str(refused)) from refused
            except _Closed as closed:
                raise Lost(f"the MCP server was lost while it ran: {closed}") from closed
            except MCPError as error:
                raise ToolError(error.message or f"the MCP server answered with the error {error.code}") from error
            except (RuntimeError, pydantic.ValidationError) as error:  # an answer that is none
                raise ToolError(str(error)) from error
            else:
                if answer.is_error:
                    raise ToolError(readable(text(answer)) or "the tool failed")
                return content(answer)
        raise ToolError("the MCP server did not take the call, in a new session neither")

    async def _is_over(self, session: "_Session") -> bool:
        """Whether it is, of a session that was in doubt."""
        await self._until(lambda: session.state != "doubted", limits.MCP_ANSWER_S)
        return session.state == "over"


class _Refused(Exception):
    """A server has answered that it does not take this, so it has not run it. It may not know the session any more."""


class _Closed(Exception):
    """The connection was lost before the answer came."""


class _Session:
    """One connection to a server, and what is known of it.

    `starting`, until it has said which tools it has; `up`: calls are made; `doubted`, from what may be its end until it
    has answered a question: calls wait; `over` for good. `changed` is called whenever something may wait for that.
    """

    client: Client

    def __init__(self, changed: Callable[[], None]) -> None:
        self.state: State = "starting"
        self.look = False
        """Whether it shall be asked for its tools now, rather than in a while."""
        self.calls = 0
        self.heard = time.monotonic()
        self._changed = changed

    def turn(self, state: State) -> None:
        if self.state != "over":
            self.state = state
            self._changed()

    def look_at(self) -> None:
        self.look = True
        self._changed()

    def doubt(self) -> None:
        if self.state == "up":
            self.turn("doubted")
        self.look_at()

    def answered(self) -> None:
        """It has said which tools it has."""
        self.heard = time.monotonic()
        self.turn("up")

    def end(self) -> None:
        """It says no more."""
        self.turn("over")

    async def responded(self, response: httpx2.Response) -> None:
        """Looks at each HTTP response before its body is read."""
        if response.headers.get("content-type", "").startswith("application/json"):
            response.stream = _Bounded(response.stream)
        if response.status_code >= 400 and response.request.method == "POST":
            _errors.get([]).append(response.status_code)
        if response.status_code in _REFUSALS and MCP_SESSION_ID in response.request.headers:
            self.doubt()

    async def ask(self, question: Coroutine[Any, Any, T]) -> T:
        """Its answer. Raises `_Refused`, `_Closed`, `MCPError` for an error that it says, and what an answer that is
        none makes of itself.
        """
        errors: list[int] = []
        _errors.set(errors)
        try:
            return await question
        except MCPError as error:
            if self.state in ("doubted", "over") and not set(_REFUSALS).isdisjoint(errors):
                raise _Refused(error.message) from error
            if error.code == mcp_types.CONNECTION_CLOSED and not errors:
                self.doubt()
                raise _Closed(error.message) from error
            raise

    async def call(self, name: str, arguments: dict[str, Any], say: ProgressFnT) -> mcp_types.CallToolResult:
        """As `ask`, of a tool."""
        self.calls += 1
        try:
            answer = await self.ask(self.client.call_tool(name, arguments, progress_callback=say))
        finally:
            self.calls -= 1
            self._changed()
        self.heard = time.monotonic()
        return answer


class _Bounded(httpx2.AsyncByteStream):
    """A body that ends with an error where it is too large: the library reads JSON whole."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        read = 0
        async for chunk in self._stream:
            read += len(chunk)
            if read > limits.MCP_MESSAGE_BYTES_MAX:
                raise httpx2.StreamError(f"more than {limits.MCP_MESSAGE_BYTES_MAX} bytes")
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


@contextlib.asynccontextmanager
async def _watched(
    transport: AbstractAsyncContextManager[Any], ended: Callable[[], None]
) -> AsyncIterator[tuple[Any, Any]]:
    """The same transport, which says when the server says no more: the library tells only whoever waits for answers."""
    async with transport as (reading, writing):
        passing, passed = anyio.create_memory_object_stream[SessionMessage | Exception](0)

        async def pass_on() -> None:
            with contextlib.suppress(anyio.BrokenResourceError):  # nobody reads any more
                async with passing:
                    async for message in reading:
                        await passing.send(message)
            ended()

        async with anyio.create_task_group() as group:
            group.start_soon(pass_on)
            yield passed, writing
            group.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def _pipe(read: Callable[[asyncio.StreamReader], Awaitable[None]]) -> AsyncIterator[TextIO]:
    """The writing end of a pipe whose other end is given to `read`, which shall end where the pipe does."""
    reading, writing = os.pipe()
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limits.MCP_LOG_BYTES_MAX)
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(reading, "rb", buffering=0)
    )
    task = asyncio.ensure_future(read(reader))
    try:
        with os.fdopen(writing, "w") as end:
            yield end
    finally:
        await asyncio.wait({task}, timeout=limits.MCP_LAST_WORDS_S)
        task.cancel()
        transport.close()


def _reason(error: BaseException) -> str:
    """Why, in one line: the first of those that a group of tasks failed with."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, TimeoutError):
        return "it did not answer in time"
    return " ".join(readable(error).split()) or type(error).__name__
