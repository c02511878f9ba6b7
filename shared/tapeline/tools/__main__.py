"""`python -m tapeline.tools my_package.tools [more modules] [--mcp servers.json]`: a worker for these tools.

Every tool that is a name of a module is served, those it imports from elsewhere included, and what the MCP servers
in the file offer. Settings: `TAPELINE_NATS_URL` and, optionally, `TAPELINE_POOL`, the pool's name unless it shall be
the first module's, and `TAPELINE_MCP`, such a file.

`python -m tapeline.tools --list`: what all workers offer at this moment, a line per tool and pool.
"""

import argparse
import importlib
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable

from tapeline import limits
from tapeline.registry import Offer, Registry
from tapeline.settings import EX_CONFIG, ConfigError, Settings, run
from tapeline.tape import Tape

from .definition import AnyTool, Tool
from .worker import MCP, serve


def load(modules: Iterable[str]) -> list[AnyTool]:
    """The tools in these modules. Raises `ConfigError` where there is no such module, or no tool in it."""
    tools: dict[int, AnyTool] = {}
    for name in modules:
        if name.endswith(".py") or not all(part.isidentifier() for part in name.split(".")):
            raise ConfigError(f"{name} is no module's name: say it as an import does, my_package.tools")
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # the module is there, and imports one that is not
            raise ConfigError(f"there is no module {name} here (no module named {error.name})") from error
        found = [value for value in vars(module).values() if isinstance(value, Tool)]
        if not found:
            raise ConfigError(f"module {name} has no tools; put @tool on a function")
        tools |= {id(value): value for value in found}
    return list(tools.values())


def pool_of(modules: list[str]) -> str:
    """The name of a pool that was given none: its first module's, as far as a pool can have it."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", modules[0])[: limits.POOL_CHARS_MAX] if modules else ""


def lines(offers: Iterable[Offer]) -> list[str]:
    """What is on offer, as a person reads it."""
    counted = Counter((offer.tool.name, offer.tool.pool or "-", offer.stands_by) for offer in offers)
    return [
        f"{name}  pool {pool}  {count} worker{'s' * (count > 1)}{', standing by: another schema' * stands_by}"
        for (name, pool, stands_by), count in counted.items()
    ]


async def show(environment: Settings) -> None:
    """Prints what is on offer. Raises `ConfigError`, `Refused`, `Unavailable`."""
    tape = await Tape.open(environment.nats_url, "tapeline-tools")
    try:
        print("\n".join(lines(await Registry(tape).offers())) or "no tools are on offer")
    finally:
        await tape.close()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tapeline.tools", description="A worker for these tools.")
    parser.add_argument("modules", metavar="MODULE", nargs="*", help="a module with tools in it")
    parser.add_argument("--mcp", metavar="FILE", default=os.environ.get(MCP, ""), help=f"MCP servers; also {MCP}")
    parser.add_argument("--list", action="store_true", help="what all workers offer at this moment")
    given = parser.parse_args()
    if given.list:
        run("tools", show)
        return
    if not given.modules and not given.mcp:
        parser.error("name a module, or MCP servers by --mcp")
    try:
        tools = load(given.modules)
    except ConfigError as error:
        print(f"tools: {error}", file=sys.stderr)
        sys.exit(EX_CONFIG)
    serve(tools, pool_of(given.modules), given.mcp)


if __name__ == "__main__":
    main()
