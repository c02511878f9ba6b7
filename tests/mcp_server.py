"""An MCP server that gets into trouble when it is told to: `python -m tests.mcp_server`, on the SDK of PyPI's `mcp`.

What it does, it writes to the file that JOURNAL names.
"""

import asyncio
import os
import sys
import time
from pathlib import Path

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
    asyncio.get_running_loop().call_later(0.1, time.sleep, 3600)
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


if __name__ == "__main__":
    print("a banner where only messages belong", flush=True)
    print("in trouble", "x" * 5_000, file=sys.stderr)
    server.run()
