"""`python -m tapeline.tools my_package.tools [more modules]`: a worker for the tools in these modules.

Every tool that is a name of a module is served, those it imports from elsewhere included. Settings:
`TAPELINE_NATS_URL` and, optionally, `TAPELINE_POOL`.
"""

import importlib
import sys
from collections.abc import Iterable

from tapeline.settings import EX_CONFIG, ConfigError

from .definition import AnyTool, Tool
from .worker import serve


def load(modules: Iterable[str]) -> list[AnyTool]:
    """The tools in these modules. Raises `ConfigError` where there is no such module, or no tool in it."""
    tools: dict[int, AnyTool] = {}
    for name in modules:
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


def main() -> None:
    """The command line."""
    if not sys.argv[1:] or sys.argv[1].startswith("-"):
        print("usage: python -m tapeline.tools MODULE [MODULE ...]", file=sys.stderr)
        sys.exit(2)
    try:
        tools = load(sys.argv[1:])
    except ConfigError as error:
        print(f"tools: {error}", file=sys.stderr)
        sys.exit(EX_CONFIG)
    serve(tools)


if __name__ == "__main__":
    main()
