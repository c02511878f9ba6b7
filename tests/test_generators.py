"""Generators as tools, and output that streams, without a server: what is yielded, what comes of it, how it ends."""

import asyncio
import itertools
import os
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any

import pytest
from tapeline import limits
from tapeline.tools import Context, Progress, Return, tool
from tapeline.tools.report import CUT, Report
from tapeline.tools.testing import Called, call_tool


def lines() -> Iterator[str | float | Progress]:
    yield "one\n"
    yield 0.5
    yield Progress(0.75, "nearly")
    yield "two \ud800\n"
    yield 1


async def lines_async() -> AsyncIterator[str | float | Progress]:
    for one in lines():
        yield one
        await asyncio.sleep(0)


def returns(value: Any) -> Generator[str, None, Any]:
    yield "text"
    return value


def marks(value: Any) -> Iterator[str | Return]:
    yield "text"
    yield Return(value)
    pytest.fail("it is over")


async def marks_async(value: Any) -> AsyncIterator[str | Return]:
    yield "text"
    yield Return(value)
    pytest.fail("it is over")


def silent(value: Any) -> Iterator[float]:
    yield 0.5


@pytest.mark.parametrize("function", [lines, lines_async])
async def test_what_a_generator_yields_is_told_and_its_text_is_the_result(function: Callable[..., Any]) -> None:
    assert await call_tool(tool(function)) == Called(
        "ok",
        content="one\ntwo ?\n",
        progress=[(0.5, ""), (0.75, "nearly"), (1.0, "")],
        output="one\ntwo ?\n",
    )


@pytest.mark.parametrize(
    ("function", "value", "content"),
    [
        (returns, {"a": 1}, {"a": 1}),
        (returns, None, "text"),
        (returns, 0, 0),
        (marks, [1], [1]),
        (marks, None, None),
        (marks_async, {"a": 1}, {"a": 1}),
        (silent, 1, None),
    ],
)
async def test_what_a_generator_returns_is_the_result(function: Callable[..., Any], value: Any, content: Any) -> None:
    called = await call_tool(tool(function), {"value": value})
    assert (called.outcome, called.content) == ("ok", content)


@pytest.mark.parametrize("wrong", [None, True, b"bytes", ["text"], {"fraction": 1}])
@pytest.mark.parametrize("is_async", [False, True])
async def test_what_nobody_can_be_told_is_an_error(
    wrong: Any, is_async: bool, caplog: pytest.LogCaptureFixture
) -> None:
    ended: list[str] = []

    @tool(name="odd")
    def odd() -> Iterator[Any]:
        try:
            yield "begun"
            yield wrong
        finally:
            ended.append("odd")

    @tool(name="odd")
    async def odd_async() -> AsyncIterator[Any]:
        for one in odd():
            yield one

    called = await call_tool(odd_async if is_async else odd)
    assert (called.outcome, called.message, called.output) == ("error", "the tool odd failed: TypeError", "begun")
    assert f"Progress(…) or Return(…), not {type(wrong).__name__}" in caplog.text
    assert is_async or ended, "it was closed"


async def test_a_stop_closes_a_generator_where_it_yields() -> None:
    ended: list[str] = []

    @tool
    def count() -> Iterator[str]:
        try:
            for number in itertools.count():
                yield f"{number} "
        finally:
            ended.append("count")

    @tool
    async def count_async(context: Context) -> AsyncIterator[str]:
        try:
            for number in itertools.count():
                yield f"{number} "
                if number == 2:
                    await context.stopped.wait()
        finally:
            ended.append("count_async")

    called = await call_tool(count, stop_after=3)
    assert (called.outcome, called.content, called.output) == ("stopped", "0 1 2 ", "0 1 2 ")
    called = await call_tool(count_async, stop_after=3)
    assert (called.outcome, called.content) == ("stopped", "0 1 2 ")
    assert ended == ["count", "count_async"]


@tool(process=True)
def recite_apart(lines: int) -> Iterator[str]:
    for number in range(lines):
        yield f"line {number}\n"


def process_id() -> int:
    return os.getpid()


process_id_apart = tool(process=True, name="process_id_apart")(process_id)


async def test_a_function_that_keeps_its_name_runs_in_a_process_too() -> None:
    called = await call_tool(process_id_apart)
    assert called.outcome == "ok"
    assert called.content != process_id()


async def test_a_generator_in_a_process_of_its_own_is_heard_and_stopped() -> None:
    called = await call_tool(recite_apart, {"lines": 2_000})
    assert called.output == called.content == "".join(f"line {number}\n" for number in range(2_000))
    called = await call_tool(recite_apart, {"lines": 1_000_000}, stop_after=3)
    assert (called.outcome, called.content) == ("stopped", called.output)
    assert called.output.startswith("line 0\nline 1\nline 2\n")


async def test_the_end_of_its_time_closes_a_generator() -> None:
    ended: list[str] = []
    late, closed, cancelled = threading.Event(), threading.Event(), threading.Event()

    @tool
    def endless() -> Iterator[float]:
        try:
            while True:
                yield 0.5
        finally:
            cancelled.set()

    @tool
    async def sleeper() -> AsyncIterator[str]:
        try:
            yield "asleep"
            await asyncio.sleep(60)
        finally:
            ended.append("sleeper")

    @tool
    def holder() -> Iterator[str]:
        try:
            yield "held"
            late.wait(10)
            yield "late"
            yield "later still"
        finally:
            closed.set()

    called, held = await asyncio.gather(call_tool(sleeper, timeout_s=0.1), call_tool(holder, timeout_s=0.1))
    assert (called.outcome, called.output, ended) == ("timeout", "asleep", ["sleeper"])
    assert (held.outcome, held.output, closed.is_set()) == ("timeout", "held", False)
    late.set()
    assert await asyncio.to_thread(closed.wait, 5), "left behind, it ends where it next yields"
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(call_tool(endless), 0.05)
    assert await asyncio.to_thread(cancelled.wait, 5), "so it does when nobody waits for it any more"


async def test_an_endless_text_is_no_result() -> None:
    @tool
    def pour() -> Iterator[str]:
        for _ in range(100):
            yield "x" * (limits.TOOL_STORED_BYTES_MAX // 10)

    called = await call_tool(pour)
    assert called.outcome == "error"
    assert called.message.startswith("the tool pour returned ")


async def test_a_plain_function_can_put_out_text_too() -> None:
    @tool
    def threaded(context: Context) -> int:
        context.output("in a thread ")
        return 1

    @tool
    async def awaited(context: Context) -> int:
        await context.output("on the loop ")
        context.output("at once")
        return 2

    one, other = await call_tool(threaded), await call_tool(awaited)
    assert (one.content, one.output) == (1, "in a thread ")
    assert (other.content, other.output) == (2, "on the loop at once")


# On its way to the tape


async def test_a_report_joins_what_waits_and_loses_no_character() -> None:
    report = Report()
    said = [f"{number}\n" for number in range(10_000)]
    for number, text in enumerate(said):
        report.say(text)
        report.say(Progress(number / len(said), text))
    taken = report.take()
    assert "".join(text for _, text in taken) == "".join(said)
    assert {progress for progress, _ in taken} == {Progress(0.9999, "9999\n")}
    assert max(len(text) for _, text in taken) == limits.DELTA_CHARS_MAX
    assert report.take() == []
    report.say(Progress(1))
    assert report.take() == [(Progress(1), "")]
    report.say(Progress(1))
    report.end()
    report.say("more")
    assert report.take() == [], "the result comes next, and says more"


@pytest.mark.parametrize("more", [0, 1, 5])
async def test_what_is_too_much_is_not_shown_and_the_reader_is_told(more: int) -> None:
    report = Report()
    report.say("x" * (limits.TOOL_OUTPUT_CHARS_MAX - 1))
    report.say("y" + "z" * more)
    report.say("z" if more else "")
    report.say("z" if more else "")
    shown = "".join(text for _, text in report.take())
    assert shown == "x" * (limits.TOOL_OUTPUT_CHARS_MAX - 1) + "y" + (CUT if more else "")
    assert report.room.is_set()


async def test_who_says_too_much_waits_until_it_is_taken() -> None:
    report = Report()
    context = Context(tool="t", call="c", deadline=0, say=report.say, room=report.room)
    much = "x" * limits.PENDING_CHARS_MAX
    thread = threading.Thread(target=context.output, args=(much,), daemon=True)
    thread.start()
    on_loop = asyncio.ensure_future(asyncio.wait_for(_awaited(context, much), 5))
    await asyncio.wait({on_loop}, timeout=0.1)
    assert thread.is_alive()
    assert not on_loop.done()
    assert len(report.take()) == 2 * limits.PENDING_CHARS_MAX / limits.DELTA_CHARS_MAX
    await on_loop
    await asyncio.to_thread(thread.join, 5)
    assert not thread.is_alive()
    waiting = threading.Thread(target=context.output, args=(much,), daemon=True)
    waiting.start()
    report.end()
    await asyncio.to_thread(waiting.join, 5)
    assert not waiting.is_alive(), "nobody waits for what has ended"


async def test_what_could_not_be_written_is_given_up() -> None:
    report = Report()
    report.cut()
    assert report.take() == [], "there was no output to give up"
    report.say("written, or not")
    report.take()
    report.say("waiting")
    report.cut()
    report.say("more")
    assert [text for _, text in report.take()] == [CUT]


async def _awaited(context: Context, text: str) -> None:
    await context.output(text)
