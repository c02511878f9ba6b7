"""A typed Python function as a tool: what the decorator makes of it. Nothing here runs a call: see `execution`."""

import inspect
import os
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypedDict, TypeVar, Unpack, overload

from tapeline import limits, subjects
from tapeline.registry import ToolSpec

from .schema import Arguments, Given

P = ParamSpec("P")
R = TypeVar("R")


class Tool(Generic[P, R]):
    """A function that the model may call. Calling it from Python calls the function, unchecked."""

    def __init__(
        self,
        function: Callable[P, R],
        *,
        name: str | None = None,
        timeout_s: float = limits.TOOL_TIMEOUT_S_DEFAULT,
        idempotent: bool = False,
        needs_approval: bool = False,
        process: bool = False,
        max_concurrency: int | None = None,
        arguments: Given | None = None,
    ) -> None:
        if not inspect.isroutine(function):
            raise TypeError(f"@tool is for functions, with its options by name, and {function!r} is none")
        self.function: Callable[P, R] = function
        self.name: str = name or function.__name__
        self.timeout_s = timeout_s
        self.idempotent = idempotent
        self.needs_approval = needs_approval
        self.process = process
        self.max_concurrency = max_concurrency or ((os.cpu_count() or 1) if process else limits.TOOL_CALLS_PER_WORKER)
        if not subjects.is_tool(self.name):
            raise ValueError(f"tool {self.name!r}: a name is 1 to 64 letters, digits, _ or -")
        if not 0 < timeout_s <= limits.TOOL_TIMEOUT_S_MAX:
            raise ValueError(
                f"tool {self.name}: timeout_s is {timeout_s}, not within {limits.TOOL_TIMEOUT_S_MAX:.0f} s"
            )
        if max_concurrency is not None and max_concurrency < 1:
            raise ValueError(f"tool {self.name}: max_concurrency is {max_concurrency}, and 1 is the least")
        if process and ("<locals>" in function.__qualname__ or inspect.ismethod(function)):
            raise ValueError(f"tool {self.name}: process=True is for functions of a module, which a process can import")
        try:
            self.arguments: Arguments | Given = arguments or Arguments(function)
        except (TypeError, NameError) as error:
            raise TypeError(f"tool {self.name}: {error}") from error
        self.is_async = inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)
        self.__name__ = self.name
        self.__doc__ = function.__doc__

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<tool {self.name}>"

    def spec(self, pool: str = "") -> ToolSpec:
        """The tool as it is announced."""
        return ToolSpec(
            name=self.name,
            description=self.arguments.description,
            parameters=self.arguments.schema,
            timeout_s=self.timeout_s,
            idempotent=self.idempotent,
            needs_approval=self.needs_approval,
            pool=pool,
        )


AnyTool = Tool[..., Any]


class Options(TypedDict, total=False):
    """What `@tool` takes by name: see there."""

    name: str | None
    timeout_s: float
    idempotent: bool
    needs_approval: bool
    process: bool
    max_concurrency: int | None


@overload
def tool(function: Callable[P, R], /) -> Tool[P, R]: ...
@overload
def tool(**options: Unpack[Options]) -> Callable[[Callable[P, R]], Tool[P, R]]: ...
def tool(
    function: Callable[P, R] | None = None, /, **options: Unpack[Options]
) -> Tool[P, R] | Callable[[Callable[P, R]], Tool[P, R]]:
    """Makes a typed function a tool, sync or async, or a generator of either kind: `@tool`, or `@tool(timeout_s=10)`.

    Its docstring is what the model reads, its type hints are the schema of its arguments.

    Args:
        name: Instead of the function's own.
        timeout_s: A call that takes longer, waiting for a worker included, ends as `timeout`.
        idempotent: It may be run again when its worker was lost half-way. Otherwise such a call ends as
            `unknown`, because nobody can tell whether it had its effect.
        needs_approval: A person must approve each call.
        process: Runs each call in a process of its own, for what keeps a CPU busy or might crash. It can be killed.
        max_concurrency: How many calls of it one worker runs at a time; by default 32, and with `process` as many
            as there are CPUs.

    Raises `TypeError` or `ValueError` for a function that cannot be a tool.
    """

    def make(function: Callable[P, R]) -> Tool[P, R]:
        return Tool(function, **options)

    return make if function is None else make(function)
