"""Generator functions as tools: what they yield is told while they run, and what they return is the result.

A function made of one runs wherever a plain one would, and needs only the call's `Context`.
"""

import dataclasses
import inspect
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing, closing
from typing import Any

from tapeline import limits

from .context import Context, Progress, Said, unicode


@dataclasses.dataclass(frozen=True)
class Return:
    """Yielded last, it is the call's result: an async generator cannot return one."""

    value: Any


def plain(function: Callable[..., Any], context: Context) -> Callable[..., Any]:
    """A function that goes through the generator for this call; one that makes no generator as it is.

    A stop closes the generator where it next yields; so does the end of the call's time, where it is in a thread.
    """
    if inspect.isgeneratorfunction(function):
        return lambda **values: _run(function(**values), context)
    if inspect.isasyncgenfunction(function):
        return lambda **values: _run_async(function(**values), context)
    return function


def _run(generator: Generator[Any, None, Any], context: Context) -> Any:
    told = _Told(context)
    with closing(generator):
        while not context.stopped:
            try:
                item = next(generator)
            except StopIteration as end:
                return told.text if end.value is None else end.value
            if isinstance(item, Return):
                return item.value
            told.tell(item)
    return told.text


async def _run_async(generator: AsyncGenerator[Any, None], context: Context) -> Any:
    told = _Told(context)
    async with aclosing(generator):
        async for item in generator:
            if isinstance(item, Return):
                return item.value
            await told.tell(item)
            if context.stopped:
                break
    return told.text


class _Told:
    """What a generator has yielded."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._texts: list[str] = []
        self._chars = 0

    @property
    def text(self) -> str | None:
        """All the text, or more of it than a result may have; None: there was none."""
        return "".join(self._texts) if self._texts else None

    def tell(self, item: Any) -> Said:
        """Tells the reader. Raises `TypeError` for what nobody can be told."""
        match item:
            case str():
                text = unicode(item)
                if self._chars <= limits.TOOL_STORED_BYTES_MAX:  # beyond it, it can be no result any more
                    self._texts.append(text)
                    self._chars += len(text)
                return self._context.output(text)
            case Progress(fraction, message):
                return self._context.progress(fraction, message)
            case int() | float() if not isinstance(item, bool):
                return self._context.progress(item)
            case _:
                allowed = "text, a fraction from 0 to 1, Progress(…) or Return(…)"
                raise TypeError(f"a tool may yield {allowed}, not {type(item).__name__}")
