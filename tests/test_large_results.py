"""Results too large for an event: stored beside the tape, whole over HTTP, gone with their conversation, and never
taken for what they are not. The worker has the credentials of its role."""

import asyncio
import contextlib
import json
import random
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from tapeline import limits, results, subjects
from tapeline.connection import Refused, api
from tapeline.depth import is_json_too_deep, is_too_deep
from tapeline.events import Conversation, ToolResult
from tapeline.fold import fold
from tapeline.replay import load
from tapeline.results import Broken
from tapeline.tape import Tape

from services.inference.history import prompt_of
from tests.client import Client, opened, problem
from tests.stack import Process, Stack, until
from tests.toolbox import rows
from tests.workers import Asked

LARGE: Final = 20_000_000
ENCODED_S: Final = 60.0


@pytest.fixture(scope="module")
def boxed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The whole of Tapeline with the workers of `toolbox`."""
    folder = tmp_path_factory.mktemp("boxed")
    stack = Stack(folder, {"TOOLBOX_JOURNAL": str(folder / "journal")})
    try:
        stack.start_inference()
        boxes(stack)
        stack.add_edge()
        yield stack
    finally:
        stack.stop()


def boxes(stack: Stack) -> Process:
    return stack.start_worker(module="tapeline.tools tests.toolbox")


@pytest.fixture
async def root(boxed: Stack) -> AsyncIterator[Tape]:
    tape = await opened(boxed.nats.url)
    yield tape
    await tape.close()


@pytest.fixture
async def client(boxed: Stack) -> AsyncIterator[Client]:
    async with Client(boxed.url) as client:
        yield client


def encoded(size: int) -> bytes:
    return json.dumps(rows(size), ensure_ascii=False, separators=(",", ":")).encode()


def path(asked: Asked, call: str, run: str = "r") -> str:
    return f"/v1/conversations/{asked.conversation}/runs/{run}/calls/{call}/result"


async def large(root: Tape, size: int) -> tuple[Asked, str, ToolResult]:
    """A call of `large`, and its result."""
    asked = Asked(root)
    (call,) = await asked.call("large", {"size": size})
    return asked, call, await asked.result(call, ENCODED_S)


async def download(client: Client, url: str, read: list[bytes]) -> None:
    async with client.http.stream("GET", url) as answer:
        async for part in answer.aiter_raw():
            read += [part]


def megabytes(process: Process | None, what: str = "VmRSS") -> float:
    assert process is not None
    lines = Path(f"/proc/{process.popen.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1000


async def still(process: Process | None) -> float:
    """The MB it holds, once that no longer changes."""
    held: list[float] = []

    async def is_still() -> bool:
        held.append(megabytes(process))
        await asyncio.sleep(0.5)
        return len(held) > 2 and max(held[-3:]) - min(held[-3:]) < 0.5

    await until("it waits for its readers", is_still)
    return held[-1]


async def test_whatever_its_size_it_comes_back_whole(boxed: Stack, root: Tape, client: Client) -> None:
    for size in (400_000, 600_000, LARGE, limits.TOOL_STORED_BYTES_MAX - 100_000):
        asked, call, result = await large(root, size)
        whole = encoded(size)
        assert (result.outcome, result.message) == ("ok", "")
        answer = await client.http.get(path(asked, call))
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
        assert answer.headers["content-length"] == str(len(whole))
        assert answer.content == whole
        again = await client.http.get(path(asked, call), headers={"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        head = await client.http.head(path(asked, call))
        assert (head.headers["content-length"], head.content) == (str(len(whole)), b"")
        records = await root.read(asked.conversation)
        assert await results.violations(root, asked.conversation, records) == []
        if size < limits.TOOL_RESULT_BYTES_MAX:
            assert result.stored is None
            continue
        assert result.content is None
        assert result.stored is not None
        assert result.stored.preview == whole.decode()[: limits.TOOL_PREVIEW_CHARS_MAX]
        (shown,) = (await client.snapshot(asked.conversation))["runs"][0]["steps"][0]["calls"]
        assert shown["stored"]["bytes"] == len(whole)
        state = fold(records)
        told = prompt_of(state, state.runs["r"], "demo", []).turns[2]
        assert getattr(told, "content", "").startswith(result.stored.preview)
        assert f"has {len(whole)} bytes. This is only its beginning.]" in getattr(told, "content", "")


async def test_what_is_too_large_even_so_says_what_is_the_most(root: Tape, client: Client) -> None:
    asked, call, result = await large(root, 40_000_000)
    assert (result.outcome, result.stored, result.content) == ("error", None, None)
    assert result.message.endswith("and 32000000 is the most: ask for less")
    assert result.message in problem(await client.http.get(path(asked, call)), 404, "call_failed")["detail"]


async def test_nobody_else_and_nothing_else_is_found(boxed: Stack, root: Tape, client: Client) -> None:
    asked, call, _ = await large(root, 600_000)
    waits = Asked(root)
    (waiting,) = await waits.call("block", {"seconds": 60})
    problem(await client.http.get(path(waits, waiting)), 404, "no_result")
    await client.stop(waits.conversation, "r")
    problem(await client.http.get(path(asked, call, "no")), 404, "unknown_run")
    problem(await client.http.get(path(asked, "no")), 404, "unknown_call")
    async with Client(boxed.edge_url(boxed.add_edge({"TAPELINE_API_KEYS": "ann=key-of-ann"})), "key-of-ann") as ann:
        problem(await ann.http.get(path(asked, call)), 404, "not_found")
        ann.http.headers.clear()
        problem(await ann.http.get(path(asked, call)), 401, "unauthorized")


@pytest.mark.parametrize("how", ["changed", "short", "gone"])
async def test_what_is_no_longer_what_was_stored_is_never_a_whole_answer(
    boxed: Stack, root: Tape, client: Client, how: str
) -> None:
    asked, call, result = await large(root, 600_000)
    assert result.stored is not None
    subject = subjects.result(asked.conversation, call, 1)
    kept = [record.data for record in await root.stored(subjects.RESULTS, subject)]
    assert b"".join(kept) == encoded(600_000)
    await api(root.nc, f"STREAM.PURGE.{subjects.RESULTS}", {"filter": subject})
    forged = {"changed": [kept[0].replace(b"1", b"2", 1), *kept[1:]], "short": kept[:-1], "gone": []}[how]
    for chunk in forged:
        await root.put(subject, chunk)
    read: list[bytes] = []
    with pytest.raises(httpx.RemoteProtocolError, match="without sending complete message body"):
        await download(client, path(asked, call), read)
    assert sum(map(len, read)) <= sum(map(len, kept[:-1])), "not its end"
    edge = boxed.edges[0]
    assert edge is not None
    assert f"call {call}: its result was cut off" in edge.output()
    assert len(await results.violations(root, asked.conversation, await root.read(asked.conversation))) == 1


async def test_a_slow_reader_holds_a_page_and_no_more(boxed: Stack, root: Tape) -> None:
    asked, call, _ = await large(root, LARGE)
    small = httpx.AsyncHTTPTransport(socket_options=[(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)])
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(Client(boxed.url, transport=small))
        async with client.http.stream("GET", path(asked, call)) as warm:
            await warm.aread()
        before = megabytes(boxed.edges[0])
        for _ in range(20):
            answer = await stack.enter_async_context(client.http.stream("GET", path(asked, call)))
            await anext(answer.aiter_raw())
        grown = await still(boxed.edges[0]) - before
    print(f"20 readers of 20 MB that have stopped hold {grown} MB")
    assert grown < 100, "of the 300 that no kernel has; it is less than 1 as a rule"


async def test_many_at_once_are_all_stored(boxed: Stack, root: Tape) -> None:
    asked = Asked(root)
    calls = await asked.call("large", {"size": LARGE}, calls=8)
    for call in calls:
        stored = (await asked.result(call, ENCODED_S)).stored
        assert stored is not None
        assert stored.bytes == len(encoded(LARGE))
    worker = boxed.workers[-1]
    print(f"8 results of 20 MB at once: {megabytes(worker, 'VmHWM')} MB at most, {megabytes(worker)} MB after")


async def test_they_are_deleted_with_their_conversation(root: Tape, client: Client) -> None:
    asked, call, _ = await large(root, 600_000)
    other, _, _ = await large(root, 600_000)
    all_of_it = subjects.result(asked.conversation)

    async def nothing() -> bool:
        return not await root.newest(subjects.RESULTS, all_of_it)

    assert not await nothing()
    assert (await client.http.delete(f"/v1/conversations/{asked.conversation}")).status_code == 204
    await until("results are purged", nothing)
    problem(await client.http.get(path(asked, call)), 404, "not_found")

    async def purged() -> bool:
        return not await root.last(asked.conversation)

    await until("events are purged", purged)
    await root.put(subjects.result(asked.conversation, call, 2), b"of a worker that was storing at that moment")
    alarm = subjects.alarm(root.shard(asked.conversation), asked.conversation, "-")
    assert await root.newest(subjects.WAKES, alarm), "which is thought of"
    await root.set_alarm(asked.conversation, "-", 1)
    await until("the last of it is purged", nothing)
    assert len(await root.newest(subjects.RESULTS, subjects.result(other.conversation))) == 1, "and nobody else's"


async def test_a_purge_leaves_the_next_conversation_of_that_name_its_results(tape: Tape) -> None:
    asked = Asked(tape)
    await tape.put(subjects.result("c", "new", 1), b"x")
    seq = await asked.chain.append(subjects.INPUT, Conversation(run="-", ts=1, owner="local"))
    for through in (seq - 1, 0):
        await tape.purge_results(asked.conversation, through)
    kept = await results.store(tape, asked.conversation, "call", 1, b"x" * 600_000, "", 0)
    await tape.purge_results(asked.conversation, seq - 1)
    assert [one async for one in results.chunks(tape, asked.conversation, "call", kept)]
    await tape.purge(asked.conversation, seq)
    with pytest.raises(Broken):
        await anext(results.chunks(tape, asked.conversation, "call", kept))
    assert (await load(tape, asked.conversation)).about is None
    assert await tape.newest(subjects.RESULTS, subjects.result("c")), "another's"


async def test_a_chunk_whose_acknowledgement_was_lost_is_not_stored_twice(tape: Tape) -> None:
    subject = subjects.result("c", "call", 1)
    await tape.put(subject, b"x" * limits.RESULT_CHUNK_BYTES, after=0)
    kept = await results.store(tape, "c", "call", 1, b"x" * 600_000, "", 0)  # its chunks are alike
    assert [len(one.data) for one in await tape.stored(subjects.RESULTS, subject)] == [250_000, 250_000, 100_000]
    assert kept.chunks == 3
    with pytest.raises(Refused):
        await results.store(tape, "c", "call", 1, b"y" * 600_000, "", 0)


def test_depth_is_the_same_in_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "JSON_DEPTH_MAX", 4)
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)

    def some(depth: int) -> Any:
        if depth == 0 or chance.random() < 0.3:
            return chance.choice(["", '"[{', "\\", '\\"]', "]}", "é\n", 1.5, None, True])
        if chance.random() < 0.5:
            return [some(depth - 1) for _ in range(chance.randrange(3))]
        return {chance.choice(["[", '"', "\\\\", "a", '\\"{']): some(depth - 1) for _ in range(chance.randrange(3))}

    values = [some(chance.randrange(8)) for _ in range(3_000)]
    deep = [is_too_deep(value) for value in values]
    assert deep == [is_json_too_deep(json.dumps(value, ensure_ascii=False).encode()) for value in values]
    assert 30 < sum(deep) < 2_970


async def test_a_result_is_whole_though_its_worker_and_nats_are_killed_while_it_is_stored(
    boxed: Stack, root: Tape, client: Client
) -> None:
    asked = Asked(root)
    (call,) = await asked.call("large", {"size": limits.TOOL_STORED_BYTES_MAX - 100_000})

    def storing(attempt: int) -> Any:
        return lambda: root.newest(subjects.RESULTS, subjects.result(asked.conversation, call, attempt))

    first = boxed.workers[-1]
    await until("it is being stored", storing(1), ENCODED_S)
    first.send(signal.SIGSTOP)
    second = boxes(boxed)
    first.end(signal.SIGKILL)
    assert not await asked.of(ToolResult, call), "too late"
    await until("it is being stored again", storing(2), ENCODED_S)
    second.send(signal.SIGSTOP)
    assert not await asked.of(ToolResult, call), "too late"
    boxed.restart_nats()
    second.send(signal.SIGCONT)
    result = await asked.result(call, ENCODED_S)
    assert result.stored is not None
    assert result.stored.attempt == 2
    assert (await client.http.get(path(asked, call))).content == encoded(limits.TOOL_STORED_BYTES_MAX - 100_000)
