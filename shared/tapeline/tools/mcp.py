"""MCP servers whose tools a worker offers: kept running, asked for their tools, called.

A server is one task that starts it, lists its tools again and again, and starts over when it is lost. What it offers
is empty until it has answered, and again as soon as it no longer does. Needs `tapeline[mcp]`.
"""

import asyncio
import contextlib
import contextvars
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, NoReturn, TextIO

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

_statuses: contextvars.ContextVar[list[int]] = contextvars.ContextVar("statuses")
"""Of the HTTP answers to the call under way: a transport sends each request in its caller's context."""


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
        self._session: _Session | None = None
        self._up = asyncio.Event()
        self._look = asyncio.Event()  # for its tools, now rather than in a while

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
        async with contextlib.AsyncExitStack() as stack:
            async with asyncio.timeout(limits.MCP_START_S):
                client = await stack.enter_async_context(self._connected())
                listed = await self._list(client)
            listening = asyncio.create_task(self._listen(client))
            stack.callback(listening.cancel)
            session = self._session = _Session(client)
            stack.callback(self._go_down)  # before the process is waited for
            log.info("MCP server %s is up with %d tools", self.name, len(listed))
            while True:
                if not session.over.is_set():
                    self._up.set()
                    self._offer(listed)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(limits.MCP_CHECK_S):
                        await self._look.wait()
                self._look.clear()
                try:
                    async with asyncio.timeout(limits.MCP_ANSWER_S):
                        listed = await self._list(client)
                    session.heard = time.monotonic()
                except TimeoutError:
                    # It may do one thing at a time, and then it is silent for as long as a call may take.
                    if not session.calls or time.monotonic() - session.heard > self.config.timeout_s:
                        raise
                except MCPError:
                    self._go_down()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(limits.MCP_LAST_WORDS_S):
                            await session.idle.wait()  # a call may be refused as well, which is better than lost
                    raise

    def _go_down(self) -> None:
        self._up.clear()
        if self._session is not None:
            self._session.over.set()
            self._session = None
        self._offer([])

    def _ended(self) -> None:
        self._go_down()
        self._look.set()

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[Client]:
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
                    headers=self.config.headers,
                    timeout=httpx2.Timeout(limits.MCP_CONNECT_S, read=None),  # a call may be silent until its deadline
                    event_hooks={"response": [self._answered]},
                )
                await stack.enter_async_context(http)
                transport = streamable_http_client(
                    self.config.url, http_client=http, max_sse_event_size=limits.MCP_MESSAGE_BYTES_MAX
                )
            client = await stack.enter_async_context(
                Client(_watched(transport, self._ended), cache=None, message_handler=self._told)
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
            if cursor is None or len(listed) > limits.MCP_TOOLS_MAX:
                return listed

    def _offer(self, listed: list[mcp_types.Tool]) -> None:
        if listed != self._listed:
            self._listed = listed
            self.tools = tools(self.name, self.config, listed, self._call) if listed else []
            self._changed()

    async def _listen(self, client: Client) -> None:
        """Newer servers tell of changes only to whoever asks."""
        with contextlib.suppress(ListenNotSupportedError, SubscriptionLost, MCPError):
            async with client.listen(tools_list_changed=True) as changes:
                async for _ in changes:
                    self._look.set()

    async def _told(self, message: IncomingMessage) -> None:
        if isinstance(message, mcp_types.ToolListChangedNotification):
            self._look.set()
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

    async def _answered(self, response: httpx2.Response) -> None:
        if response.status_code in _REFUSALS and MCP_SESSION_ID in response.request.headers:
            self._look.set()
            if response.request.method == "POST":
                _statuses.get([]).append(response.status_code)

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
            while (session := self._session) is None or not self._up.is_set():
                await self._up.wait()
            try:
                answer = await session.call(name, arguments, say)
            except _Refused:
                self._look.set()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(limits.MCP_ANSWER_S):
                        await session.over.wait()
            except MCPError as error:
                if error.code == mcp_types.CONNECTION_CLOSED:
                    self._up.clear()  # until it has answered, or another session has begun
                    self._look.set()
                    raise Lost(f"the MCP server was lost while it ran: {error.message}") from error
                raise ToolError(error.message or f"the MCP server answered with the error {error.code}") from error
            except (RuntimeError, pydantic.ValidationError) as error:  # an answer that is none
                raise ToolError(str(error)) from error
            else:
                if answer.is_error:
                    raise ToolError(readable(text(answer)) or "the tool failed")
                return content(answer)
        raise ToolError("the MCP server did not take the call, in a new session neither")


class _Refused(Exception):
    """A server does not know the session any more, so it has not run the call."""


class _Session:
    """One connection to a server, until it is `over`: how many calls it has, and when it last answered."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.over = asyncio.Event()
        self.calls = 0
        self.idle = asyncio.Event()
        self.idle.set()
        self.heard = time.monotonic()

    async def call(self, name: str, arguments: dict[str, Any], say: ProgressFnT) -> mcp_types.CallToolResult:
        """The server's answer. Raises `_Refused`, `MCPError`, and what an answer that is none makes of itself."""
        statuses: list[int] = []
        _statuses.set(statuses)
        self.calls += 1
        self.idle.clear()
        try:
            answer = await self.client.call_tool(name, arguments, progress_callback=say)
        except MCPError as error:
            if statuses:
                raise _Refused from error
            raise
        finally:
            self.calls -= 1
            if not self.calls:
                self.idle.set()
        self.heard = time.monotonic()
        return answer


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
