"""MCP servers that get into trouble when they are told to.

`python -m tests.mcp_server` is one on the SDK of PyPI's `mcp`; what it does, it writes to the file that JOURNAL names.
`Web` is one over HTTP that answers as a test wants, for what no SDK answers.
"""

import asyncio
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import ToolAnnotations

server = MCPServer("trouble")


def note(word: str) -> None:
    with Path(os.environ["JOURNAL"]).open("a") as journal:
        journal.write(f"{word}\n")


@server.tool()
async def wait(seconds: float) -> str:
    """Waits, and notes whether it was cancelled."""
    note("waits")
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        note("cancelled")
        raise
    return "done"


@server.tool()
def crash() -> str:
    """Ends the whole server, half-way through an effect."""
    note("crash")
    os._exit(9)


@server.tool(annotations=ToolAnnotations(idempotent_hint=True))
def crash_once() -> str:
    """Ends the whole server the first time."""
    note("crash_once")
    if Path(os.environ["JOURNAL"]).read_text().split().count("crash_once") == 1:
        os._exit(9)
    return "survived"


@server.tool()
async def hang() -> str:
    """The server answers nothing any more."""

    def sleep() -> None:
        note("hangs")
        time.sleep(3600)

    asyncio.get_running_loop().call_later(0.1, sleep)
    return "from now on"


@server.tool()
async def grow(context: Context) -> str:
    """Offers one tool more."""
    server.add_tool(wait, name="wait.again")
    await context.notify_tools_changed()
    return "grown"


@server.tool()
def fail() -> str:
    """Fails."""
    raise ToolError("no such luck")


Say = Callable[[dict[str, Any]], Awaitable[tuple[int, dict[str, Any]]]]
"""The HTTP status and the body's `result` or `error`, given a request's `params`."""


class Web:
    """Streamable HTTP with a session: `says` what it answers to which method, `asked` counts those."""

    def __init__(self, *tools: str) -> None:
        self.asked: Counter[str] = Counter()
        self.tools = [{"name": tool, "inputSchema": {"type": "object"}} for tool in tools]
        self.says: dict[str, Say] = {"initialize": self.initialize, "tools/list": self.list}
        self.url = ""
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = "http://{}:{}/mcp".format(*self._server.sockets[0].getsockname())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()

    async def initialize(self, params: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        about = {"capabilities": {"tools": {}}, "serverInfo": {"name": "web", "version": "1"}}
        return 200, {"result": {"protocolVersion": params["protocolVersion"], **about}}

    async def list(self, _: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return 200, {"result": {"tools": self.tools}}

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        status, body = 405, b""
        if head.startswith(b"post"):
            (length,) = (line for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
            message = json.loads(await reader.readexactly(int(length.partition(b":")[2])))
            status, body = await self._said(message) if "id" in message else (202, b"")
        headers = f"content-type: application/json\r\nmcp-session-id: one\r\ncontent-length: {len(body)}"
        writer.write(f"HTTP/1.1 {status} said\r\n{headers}\r\nconnection: close\r\n\r\n".encode() + body)
        writer.close()

    async def _said(self, message: dict[str, Any]) -> tuple[int, bytes]:
        method = message["method"]
        self.asked[method] += 1
        if method in self.says:
            status, answer = await self.says[method](message.get("params") or {})
        else:
            status, answer = 200, {"error": {"code": -32601, "message": "no such method"}}
        return status, json.dumps({"jsonrpc": "2.0", "id": message["id"], **answer}).encode()


if __name__ == "__main__":
    print("a banner where only messages belong", flush=True)
    print("in trouble", "x" * 5_000, file=sys.stderr)
    server.run()
