"""MCP servers as tools of a worker: one that others wrote, over stdio and HTTP, and one that crashes when told to."""

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import mcp_types
import pytest
from tapeline import limits, subjects
from tapeline.clock import now_ms
from tapeline.connection import api
from tapeline.events import AnswerCall, Stop, ToolProgress, ToolStarted
from tapeline.fold import CallState, MessageState, RunState, State, StepState
from tapeline.registry import Registry
from tapeline.settings import ConfigError
from tapeline.tape import Tape
from tapeline.tools import consumer
from tapeline.tools.context import Context, Flag
from tapeline.tools.definition import AnyTool
from tapeline.tools.mcp import Servers
from tapeline.tools.mcp_tool import content, tool_name, tools
from tapeline.tools.servers import ServerConfig, parse
from tapeline.tools.testing import call_tool

from services.inference.history import prompt_of
from services.inference.prompt import ResultTurn
from tests import PATIENT_S, ROOT
from tests.mcp_server import Web
from tests.stack import free_port, until, wait_until
from tests.test_clients import node
from tests.workers import Asked, Start, Worker

__all__ = ["node"]  # a fixture of others

EVERYTHING: Final = ROOT / "tests/node/node_modules/@modelcontextprotocol/server-everything/dist/index.js"


def trouble(journal: Path) -> dict[str, Any]:
    """The configuration of tests/mcp_server.py."""
    env = {"JOURNAL": str(journal), "PYTHONPATH": str(ROOT)}
    return {"command": sys.executable, "args": ["-m", "tests.mcp_server"], "env": env, "cwd": str(ROOT)}


@asynccontextmanager
async def serving(**configs: dict[str, Any]) -> AsyncIterator[Servers]:
    """These servers without a worker."""
    servers = Servers(parse(json.dumps({"mcpServers": configs}).encode(), "servers.json", {}), lambda: None)
    life = asyncio.create_task(servers.live())
    try:
        yield servers
    finally:
        life.cancel()
        with pytest.raises(asyncio.CancelledError):
            await life


async def offered(servers: Servers, name: str) -> AnyTool:
    async def find() -> AnyTool | None:
        return next((tool for tool in servers.offered() if tool.name == name), None)

    tool: AnyTool = await until(f"{name} is offered", find)
    return tool


def children(pid: int) -> list[int]:
    return [
        int(child) for listed in Path(f"/proc/{pid}/task").glob("*/children") for child in listed.read_text().split()
    ]


def lives(pid: int) -> bool:
    """Whether there is such a process; one that waits to be reaped is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# The configuration


def test_a_configuration_as_every_client_has_it() -> None:
    env = {"TOKEN": "s3cret", "HOME_DIR": "/srv"}
    known = {
        "files": {"command": "npx", "args": ["server-files", "${HOME_DIR}/a"], "env": {"KEY": "${TOKEN}"}},
        "web": {"type": "http", "url": "https://x/${TOKEN}", "headers": {"Authorization": "Bearer ${TOKEN}"}},
        "bare": {"command": "x", "prefix": "", "idempotent": True, "needs_approval": ["a"], "timeout_s": 5},
    }
    servers = parse(json.dumps({"mcpServers": known}).encode(), "servers.json", env)
    assert servers["files"] == ServerConfig(
        command="npx", args=["server-files", "/srv/a"], env={"KEY": "s3cret"}, prefix="files_"
    )
    assert (servers["web"].url, servers["web"].headers) == ("https://x/s3cret", {"Authorization": "Bearer s3cret"})
    bare = servers["bare"]
    assert (bare.prefix, bare.idempotent, bare.needs_approval, bare.timeout_s) == ("", True, ["a"], 5)


@pytest.mark.parametrize(
    ("server", "problem"),
    [
        ({}, "needs either a command or a url"),
        ({"command": "x", "url": "http://y"}, "needs either a command or a url"),
        ({"command": "x", "comand": "y"}, "unknown field `comand`"),
        ({"command": 1}, "Expected `str | null`, got `int` - at `$.command`"),
        ({"command": "x", "headers": {"a": "b"}}, "headers mean nothing"),
        ({"url": "http://y", "args": ["a"]}, "args, env and cwd mean nothing"),
        ({"url": "ftp://y"}, "must begin with http:// or https://"),
        ({"type": "http", "command": "x"}, "is of type http, which has a url"),
        ({"type": "stdio", "url": "http://y"}, "is of type stdio, which has a command"),
        ({"type": "sse", "url": "http://y"}, "Invalid enum value 'sse'"),
        ({"command": "x", "timeout_s": 0}, "timeout_s is 0"),
        ({"command": "x", "timeout_s": 1e9}, "timeout_s is 1e+09"),
        ({"command": "x", "max_concurrency": 0}, "max_concurrency is 0"),
        ({"command": "x", "env": {"A": "${MISSING}"}}, "MISSING is not set in the environment"),
        ({"command": "x", "args": ["${A:-b}"]}, "'${A:-b}' is not of the form ${NAME}"),
        ({"command": "x", "args": ["${A"]}, "'${A' is not of the form ${NAME}"),
    ],
)
def test_a_server_that_is_configured_wrongly_is_named_with_what_is_wrong(server: Any, problem: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(json.dumps({"mcpServers": {"one": server}}).encode(), "servers.json", {"A": "a"})
    assert str(raised.value).startswith("servers.json: server 'one'")
    assert problem in str(raised.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "truncated"),
        ("{}", "missing required field `mcpServers`"),
        ('{"servers": {}}', "unknown field `servers`"),
        ('{"mcpServers": {}}', "names no servers"),
        ('{"mcpServers": {"a": 1}}', "Expected `object`, got `int`"),
    ],
)
def test_a_file_that_is_none(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"servers.json.*{problem}"):
        parse(text.encode(), "servers.json", {})


async def test_a_worker_says_in_a_line_what_is_wrong_with_its_servers(tmp_path: Path, workers: Start) -> None:
    worker = await workers("--mcp", str(tmp_path / "none.json"), ready=False, url="nats://127.0.0.1:1")
    assert await worker.ended(15) == 78
    assert worker.said() == f"tools: {tmp_path / 'none.json'} cannot be read: No such file or directory\n"


def test_a_worker_without_the_extra_says_how_to_get_it(tmp_path: Path) -> None:
    file = tmp_path / "servers.json"
    file.write_text('{"mcpServers": {"a": {"command": "b"}}}')
    code = (
        "import sys, runpy; sys.modules['mcp'] = None; sys.argv[1:] = ['--mcp', sys.argv[1]]; "
        "runpy.run_module('tapeline.tools', run_name='__main__')"
    )
    env = os.environ | {"TAPELINE_NATS_URL": "nats://127.0.0.1:1"}
    ended = subprocess.run([sys.executable, "-c", code, str(file)], env=env, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 78, ended.stderr
    assert ended.stderr == f"tools: {file} names MCP servers, which needs: pip install 'tapeline[mcp]'\n"


# What a server lists


def listed(name: str, schema: dict[str, Any] | None = None, **more: Any) -> mcp_types.Tool:
    return mcp_types.Tool(name=name, input_schema=schema or {"type": "object"}, **more)


async def nothing(name: str, arguments: dict[str, Any], context: Context) -> str:
    return name


def test_names_are_such_as_providers_take() -> None:
    assert tool_name("github_", "search/issues.v2") == "github_search_issues_v2"
    assert tool_name("", "ünï") == "_n_"
    long = tool_name("files_", "read" * 20)
    assert len(long) == 64 == len(tool_name("x" * 70, "y"))
    assert long == tool_name("files_", "read" * 20) != tool_name("files_", "read" * 21)
    assert all(subjects.is_tool(name) for name in (long, tool_name("a b", "c"), tool_name("", "é" * 100)))


def test_what_cannot_be_a_tool_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    found = [
        listed("a.b", description="kept"),
        listed("a_b"),
        listed(""),
        listed("list", {"type": "array"}),
        listed("odd", {"type": "object", "properties": 7}),
        listed("huge", {"type": "object", "description": "x" * limits.MCP_TOOL_BYTES_MAX}),
        listed("task", execution=mcp_types.ToolExecution(task_support="required")),
        *(listed(f"t{number}") for number in range(limits.MCP_TOOLS_MAX)),
    ]
    made = tools("s", ServerConfig(prefix="p_"), found, nothing)
    assert [tool.name for tool in made[:2]] == ["p_a_b", "p_t0"]
    assert len(made) == 1 + limits.MCP_TOOLS_MAX - len(found) + limits.MCP_TOOLS_MAX + 1 - 1
    for words in (
        "'a_b' is left out: another has become p_a_b too",
        "'' is left out: it has no name",
        "'list' is left out: its arguments are no object",
        "'odd' is left out: its schema is none",
        f"'huge' is left out: its description and schema are more than {limits.MCP_TOOL_BYTES_MAX} bytes",
        "'task' is left out: it runs only as a task",
        f"'t{limits.MCP_TOOLS_MAX - 1}' is left out: a server has {limits.MCP_TOOLS_MAX} at most",
    ):
        assert words in caplog.text


async def test_tools_are_chosen_from_a_long_listing(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    names = [f"t{number}" for number in range(3 * limits.MCP_TOOLS_MAX)]

    async def page(params: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        first = int(params.get("cursor") or 0)
        more = first + 100
        found = [{"name": name, "inputSchema": {"type": "object"}} for name in names[first:more]]
        return 200, {"result": {"tools": found} | ({"nextCursor": str(more)} if more < len(names) else {})}

    async with Web() as site:
        site.says["tools/list"] = page
        async with serving(web={"url": site.url, "tools": [names[-1]]}) as servers:
            await offered(servers, f"web_{names[-1]}")
            assert len(servers.offered()) == 1
        assert "has no tools" not in caplog.text
        monkeypatch.setattr(limits, "MCP_LISTED_MAX", 150)
        async with serving(web={"url": site.url}) as servers:
            await offered(servers, "web_t0")
    assert "lists more than 150 tools; the rest is not looked at" in caplog.text


def test_annotations_and_lists_say_what_may_be_run_again_and_what_is_asked_first(
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = [
        listed("read", annotations=mcp_types.ToolAnnotations(read_only_hint=True)),
        listed("put", annotations=mcp_types.ToolAnnotations(idempotent_hint=True)),
        listed("send"),
    ]

    def flags(**more: Any) -> dict[str, tuple[bool, bool]]:
        made = tools("s", ServerConfig(prefix="", **more), found, nothing)
        return {tool.name: (tool.idempotent, tool.needs_approval) for tool in made}

    assert flags() == {"read": (True, False), "put": (True, False), "send": (False, False)}
    assert flags(idempotent=["send"], needs_approval=["put"]) == {
        "read": (False, False),
        "put": (False, True),
        "send": (True, False),
    }
    assert flags(idempotent=False, needs_approval=True, tools=["put"]) == {"put": (False, True)}
    assert "has no tools" not in caplog.text
    flags(needs_approval=["sned"])
    assert "MCP server s has no tools sned, which its configuration names" in caplog.text


async def test_arguments_are_held_to_the_server_s_schema() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    (tool,) = tools("s", ServerConfig(prefix=""), [listed("t", schema)], nothing)
    remote = {"type": "object", "properties": {"n": {"$ref": "http://127.0.0.1:1/schema"}}}
    (unknown,) = tools("s", ServerConfig(prefix=""), [listed("t", remote)], nothing)
    assert tool.spec().parameters == schema
    assert (await call_tool(tool, {"n": 1, "more": 2})).content == "t"
    for arguments, problem in (
        ({"n": "1"}, "'1' is not of type 'integer' - at `$.n`"),
        ({}, "'n' is a required property - at `$`"),
        ([1], "not a JSON object"),
    ):
        called = await call_tool(tool, arguments)
        assert called.outcome == "error"
        assert problem in called.message
    assert "cannot be resolved" in (await call_tool(unknown, {"n": 1})).message


async def test_what_a_regular_expression_says_is_left_to_the_server() -> None:
    named = {"type": "string", "pattern": r"^(?<first>\p{L}+)+$"}  # ECMA's, which Python's cannot even read
    slow = {"type": "string", "pattern": "^(a+)+$"}  # no answer before the sun goes out
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "properties": {"name": named, "slow": slow, "pattern": {"type": "integer"}, "more": {"$ref": "#"}},
        "patternProperties": {r"^\p{Lu}": {"type": "string"}},
        "additionalProperties": False,
    }
    (tool,) = tools("s", ServerConfig(prefix=""), [listed("t", schema)], nothing)
    assert tool.spec().parameters == schema
    known = {"name": "1", "slow": "a" * 60 + "!", "pattern": 1, "X": "y"}
    assert (await call_tool(tool, known | {"more": known})).content == "t"
    refused = await call_tool(tool, {"more": {"pattern": "x"}})
    assert refused.message == "invalid arguments: 'x' is not of type 'integer' - at `$.more.pattern`"
    strict = {"type": "object", "properties": {"name": named}, "additionalProperties": False}
    (tool,) = tools("s", ServerConfig(prefix=""), [listed("t", strict)], nothing)
    assert "'nmae' was unexpected" in (await call_tool(tool, {"nmae": "x"})).message


def test_results_are_structured_or_text_or_blocks() -> None:
    text = mcp_types.TextContent(type="text", text="a")
    image = mcp_types.ImageContent(type="image", data="eA==", mime_type="image/png")
    assert content(mcp_types.CallToolResult(content=[text], structured_content={"b": 1})) == {"b": 1}
    assert content(mcp_types.CallToolResult(content=[text, text])) == "a\na"
    assert content(mcp_types.CallToolResult(content=[])) == ""
    assert content(mcp_types.CallToolResult(content=[text, image])) == [
        {"type": "text", "text": "a"},
        {"type": "image", "data": "eA==", "mimeType": "image/png"},
    ]


def test_the_model_is_told_of_an_image_without_its_base64() -> None:
    known = {"type": "text", "text": "a chart"}, {"type": "image", "mimeType": "image/png"}, {"type": "resource"}
    long = "iVBORw0KGgo" * 20_000
    text, image, blob = known[0], known[1] | {"data": long}, known[2] | {"resource": {"uri": "u", "blob": long}}
    content = [text, image, blob]
    call = CallState(call="c", tool="t", arguments={}, deadline=1, status="done", outcome="ok", content=content)
    asked = [AnswerCall(call="c", tool="t", arguments={})]
    step = StepState(step=1, attempt=1, event_id=3, finish="tool_calls", asked=asked, calls=[call])
    run = RunState(run="r", status="active", message=MessageState(content="go", by="", ts=0, event_id=2), steps=[step])
    told = prompt_of(State(runs={"r": run}), run, "demo", []).turns[-1]
    assert isinstance(told, ResultTurn)
    note = f"({len(long)} characters, which are not shown to you)"
    assert json.loads(told.content) == [
        text,
        known[1] | {"data": note},
        known[2] | {"resource": {"uri": "u", "blob": note}},
    ]
    assert call.content[1]["data"] == long, "the reader has it"


# Servers in trouble


async def test_a_server_in_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "tapeline.tools.mcp")
    journal = tmp_path / "journal"
    monkeypatch.setattr(limits, "MCP_ANSWER_S", 1.0)
    monkeypatch.setattr(limits, "MCP_CHECK_S", 60.0)
    monkeypatch.setattr(limits, "MCP_RETRY_S", (0.2,))
    async with serving(
        t=trouble(journal) | {"timeout_s": 2},
        absent={"command": "no-such-program"},
        broken={"command": "false"},
    ) as servers:
        wait = await offered(servers, "t_wait")
        assert "MCP server absent is not up: [Errno 2] No such file or directory: 'no-such-program'" in caplog.text
        assert "MCP server broken is not up: Connection closed" in caplog.text
        assert "MCP server t wrote what is no message: " in caplog.text
        spoken = [record.getMessage() for record in caplog.records if "t says: " in record.getMessage()]
        assert spoken[0].startswith("MCP server t says: in trouble xxx"), "its standard error is logged"
        assert max(map(len, spoken)) < limits.MCP_LOG_BYTES_MAX + 100, "in pieces"

        failed = await call_tool(await offered(servers, "t_fail"))
        assert (failed.outcome, "no such luck" in failed.message) == ("error", True)

        # A stop and a deadline reach the server.
        flag = Flag()
        stopped = asyncio.create_task(call_tool(wait, {"seconds": 60}, stopped=flag))
        late = asyncio.create_task(call_tool(wait, {"seconds": 60}, timeout_s=3))
        await until("both wait", lambda: counted(journal, "waits", 2))
        flag.set()
        assert (await stopped).outcome == "stopped"
        assert (await late).outcome == "timeout"
        await until("the server knows", lambda: counted(journal, "cancelled", 2))

        # Its tools change, and it says so.
        assert (await call_tool(await offered(servers, "t_grow"))).outcome == "ok"
        await offered(servers, "t_wait_again")

        monkeypatch.setattr(limits, "MCP_CHECK_S", 1.0)
        # It crashes: what ran is unknown; what comes next waits until it is there again.
        lost, other = await asyncio.gather(
            call_tool(await offered(servers, "t_crash")), call_tool(wait, {"seconds": 60}, timeout_s=20)
        )
        assert (lost.outcome, other.outcome) == ("unknown", "unknown")
        assert "the MCP server was lost while it ran" in lost.message
        assert (await call_tool(wait, {"seconds": 0}, timeout_s=30)).content == {"result": "done"}
        assert "t_wait_again" not in {tool.name for tool in servers.offered()}, "a new process has not grown"

        # It hangs, with a call in it: when it has been silent for longer than a call may take, it is started again.
        assert (await call_tool(await offered(servers, "t_hang"))).outcome == "ok"
        await until("it hangs", lambda: counted(journal, "hangs", 1))
        assert (await call_tool(wait, {"seconds": 0}, timeout_s=30)).outcome == "unknown"
        assert (await call_tool(wait, {"seconds": 0}, timeout_s=30)).content == {"result": "done"}


@pytest.mark.parametrize("code", [-32603, mcp_types.CONNECTION_CLOSED])
async def test_a_server_that_has_had_enough_of_questions_keeps_its_calls(
    monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(limits, "MCP_CHECK_S", 0.05)
    monkeypatch.setattr(limits, "MCP_LAST_WORDS_S", 0.05)
    enough, ends = asyncio.Event(), asyncio.Event()

    async def work(_: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        enough.set()
        await ends.wait()
        return 200, {"result": {"content": [{"type": "text", "text": "done"}]}}

    async def refuse(params: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if not enough.is_set():
            return await site.list(params)
        return 429, {"error": {"code": code, "message": "too many requests"}}

    async with Web("work") as site:
        site.says |= {"tools/call": work, "tools/list": refuse}
        async with serving(web={"url": site.url}) as servers:
            tool = await offered(servers, "web_work")
            call = asyncio.create_task(call_tool(tool))
            await enough.wait()
            before = site.asked["tools/list"]
            await until("it was asked again and again", lambda: site.asked["tools/list"] >= before + 5)
            assert [one.name for one in servers.offered()] == ["web_work"]
            ends.set()
            called = await call
        assert (called.outcome, called.content) == ("ok", "done")
        assert site.asked["initialize"] == 1


@pytest.mark.parametrize("status", [400, 404])
async def test_a_call_that_a_server_does_not_like_is_an_error_and_no_new_session(status: int) -> None:
    async def refuse(_: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return status, {"error": {"code": mcp_types.INVALID_PARAMS, "message": "no such city"}}

    async with Web("weather") as site:
        site.says["tools/call"] = refuse
        async with serving(web={"url": site.url}) as servers:
            called = await call_tool(await offered(servers, "web_weather"))
        assert (called.outcome, called.message) == ("error", "no such city")
        assert (site.asked["tools/call"], site.asked["initialize"]) == (1, 1)


async def test_a_server_that_does_not_know_its_session_gets_the_call_in_a_new_one() -> None:
    async def forget(params: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if site.asked["initialize"] == 1 and site.asked["tools/call"]:
            return 404, {"error": {"code": mcp_types.CONNECTION_CLOSED, "message": "no such session"}}
        return await site.list(params)

    async def work(params: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if site.asked["initialize"] == 1:
            return await forget(params)
        return 200, {"result": {"content": [{"type": "text", "text": "done"}]}}

    async with Web("work") as site:
        site.says |= {"tools/call": work, "tools/list": forget}
        async with serving(web={"url": site.url}) as servers:
            called = await call_tool(await offered(servers, "web_work"))
        assert (called.outcome, called.content) == ("ok", "done")
        assert (site.asked["tools/call"], site.asked["initialize"]) == (2, 2)


async def test_an_answer_that_is_too_large_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def flood(_: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return 200, {"result": {"content": [{"type": "text", "text": "x" * 20_000}]}}

    monkeypatch.setattr(limits, "MCP_MESSAGE_BYTES_MAX", 10_000)
    async with Web("flood") as site:
        site.says["tools/call"] = flood
        async with serving(web={"url": site.url}) as servers:
            called = await call_tool(await offered(servers, "web_flood"))
            assert called.outcome == "error"
            assert "more than 10000 bytes" in called.message
            assert [one.name for one in servers.offered()] == ["web_flood"]


async def test_a_server_that_says_nothing_is_given_up_and_ended(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(limits, "MCP_START_S", 0.3)
    before = set(children(os.getpid()))
    async with serving(mute={"command": "sleep", "args": ["3600"]}) as servers:
        await until("it was given up", lambda: logged(caplog, "MCP server mute is not up: it did not answer in time"))
        assert servers.offered() == []
    assert set(children(os.getpid())) <= before, "its process has ended although it ignores the end of its input"


async def counted(journal: Path, word: str, times: int) -> bool:
    return await asyncio.to_thread(lambda: journal.exists() and journal.read_text().split().count(word) >= times)


async def logged(caplog: pytest.LogCaptureFixture, words: str) -> bool:
    return words in caplog.text


# On a worker


class Called:
    """A run per call, as inference would write it."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape

    async def begin(self, tool: str, timeout_s: float = 60.0, **arguments: Any) -> tuple[Asked, str]:
        asked = Asked(self.tape)
        (call,) = await asked.call(tool, arguments, timeout_s)
        return asked, call

    async def __call__(self, tool: str, **arguments: Any) -> tuple[str, Any]:
        """The outcome, and the content or the message."""
        asked, call = await self.begin(tool, **arguments)
        result = await asked.result(call, PATIENT_S)
        return result.outcome, result.message if result.is_error else result.content


async def is_offered(tape: Tape, *names: str) -> bool:
    return set(names) <= set(await Registry(tape).offered())


async def is_withdrawn(tape: Tape, name: str) -> bool:
    return not await is_offered(tape, name)


async def progressed(asked: Asked, call: str) -> bool:
    return bool(await asked.of(ToolProgress, call))


def pid(worker: Worker) -> int:
    return worker.process.pid


def everything_of(worker: Worker) -> int:
    """The process of server-everything that this worker started."""
    (found,) = (
        child for child in children(pid(worker)) if b"server-everything" in Path(f"/proc/{child}/cmdline").read_bytes()
    )
    return found


async def test_a_tool_that_cannot_be_served_keeps_no_other_from_being(
    tape: Tape, workers: Start, tmp_path: Path
) -> None:
    stream, name = subjects.stream(0), subjects.tool_consumer("trouble_wait")
    await consumer.ensure(tape, "trouble_wait", 0)
    found = (await api(tape.nc, f"CONSUMER.INFO.{stream}.{name}"))["config"]
    changed = {"stream_name": stream, "config": found | {"ack_wait": 1_000_000_000}}
    await api(tape.nc, f"CONSUMER.CREATE.{stream}.{name}.{found['filter_subject']}", changed)
    file = tmp_path / "servers.json"
    file.write_text(json.dumps({"mcpServers": {"trouble": trouble(tmp_path / "trouble")}}))
    worker = await workers("tests.toolbox", "--mcp", str(file))
    await until("offered", lambda: is_offered(tape, "trouble_fail"))
    problem = "tool trouble_wait is not offered: consumer tool_trouble_wait of TAPE_0 has ack_wait"
    await until("it is tried again", lambda: worker.said().count(problem) >= 2, limits.REGISTRY_REFRESH_S + PATIENT_S)
    assert await is_withdrawn(tape, "trouble_wait")
    assert await Called(tape)("add", a=1, b=2) == ("ok", 3)
    await api(tape.nc, f"CONSUMER.DELETE.{stream}.{name}")
    await until("offered too", lambda: is_offered(tape, "trouble_wait"), limits.REGISTRY_REFRESH_S + PATIENT_S)


async def test_servers_over_stdio(tape: Tape, workers: Start, node: str, tmp_path: Path) -> None:
    file = tmp_path / "servers.json"
    known = {
        "everything": {"command": node, "args": [str(EVERYTHING)], "needs_approval": ["get-resource-links"]},
        "trouble": trouble(tmp_path / "trouble"),
    }
    file.write_text(json.dumps({"mcpServers": known}))
    worker = await workers("tests.toolbox", "--mcp", str(file))
    called = Called(tape)
    assert await called("add", a=1, b=2) == ("ok", 3), "the tools of modules wait for no server"
    await until("offered", lambda: is_offered(tape, "add", "everything_echo", "trouble_crash"))
    offers = await Registry(tape).offered()
    echo = offers["everything_echo"]
    assert (echo.description, list(echo.parameters["properties"])) == ("Echoes back the input string", ["message"])
    assert (echo.idempotent, offers["trouble_crash"].idempotent) == (True, False)
    assert (echo.needs_approval, offers["everything_get-resource-links"].needs_approval) == (False, True)
    refused = "a person must approve calls of this tool now, and was not asked; call it again"
    assert await called("everything_get-resource-links") == ("error", refused)

    # Results, errors, progress, a stop; what a server sees of the worker's environment.
    assert await called("everything_echo", message="hi") == ("ok", "Echo: hi")
    assert await called("everything_get-sum", a=2, b=3) == ("ok", "The sum of 2 and 3 is 5.")
    outcome, weather = await called("everything_get-structured-content", location="Chicago")
    assert (outcome, weather["temperature"]) == ("ok", 36)
    outcome, image = await called("everything_get-tiny-image")
    assert (outcome, image[1]["type"], image[1]["mimeType"]) == ("ok", "image", "image/png")
    problem = "invalid arguments: 1 is not of type 'string' - at `$.message`"
    assert await called("everything_echo", message=1) == ("error", problem)
    outcome, variables = await called("everything_get-env")
    assert outcome == "ok"
    assert set(json.loads(variables)) <= {"HOME", "LOGNAME", "PATH", "SHELL", "TERM", "USER"}

    asked, call = await called.begin("everything_trigger-long-running-operation", duration=1, steps=4)
    assert (await asked.result(call, PATIENT_S)).outcome == "ok"
    told = [event.fraction for event in await asked.of(ToolProgress, call)]
    assert told, "the newest, now and then"
    assert told == sorted(set(told) & {0.25, 0.5, 0.75, 1.0})
    asked, call = await called.begin("everything_trigger-long-running-operation", duration=60, steps=60)
    await asked.started(call)
    await asked.append(subjects.INPUT, Stop(run="r", ts=now_ms()))
    assert (await asked.result(call, limits.TOOL_GRACE_S)).outcome == "stopped"

    # A crash half-way: unknown, or another attempt. The worker serves the others.
    outcome, message = await called("trouble_crash")
    assert (outcome, message) == ("unknown", "the MCP server was lost while it ran: Connection closed")
    await until("it is there again", lambda: is_offered(tape, "trouble_crash_once"))
    asked, call = await called.begin("trouble_crash_once")
    result = await asked.result(call, PATIENT_S)
    assert (result.outcome, result.content) == ("ok", {"result": "survived"})
    assert [started.attempt for started in await asked.of(ToolStarted, call)] == [1, 2]

    # Killed while nothing runs: withdrawn, started again, offered again.
    os.kill(everything_of(worker), signal.SIGKILL)
    await until("withdrawn", lambda: is_withdrawn(tape, "everything_echo"))
    assert await is_offered(tape, "add")
    await until("offered again", lambda: is_offered(tape, "everything_echo"))
    assert await called("everything_echo", message="again") == ("ok", "Echo: again")

    # No process is left behind, however the worker ends.
    servers = children(pid(worker))
    assert len(servers) == 2
    assert await worker.end(signal.SIGTERM) == 0
    assert not any(map(lives, servers))
    assert await is_withdrawn(tape, "everything_echo")
    other = await workers("--mcp", str(file))
    await until("offered by another", lambda: is_offered(tape, "everything_echo", "trouble_crash"))
    servers = children(pid(other))
    await other.end(signal.SIGKILL)
    await asyncio.to_thread(wait_until, "the servers of a killed worker end", lambda: not any(map(lives, servers)))


class Everything:
    """server-everything over streamable HTTP, on a port that it keeps."""

    def __init__(self, node: str) -> None:
        self.node = node
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            [self.node, str(EVERYTHING), "streamableHttp"],
            env={"PORT": str(self.port), "PATH": os.environ["PATH"]},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until("the server listens", self.listens)

    def listens(self) -> bool:
        with socket.socket() as one:
            return one.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def web(node: str) -> Iterator[Everything]:
    web = Everything(node)
    web.start()
    yield web
    web.kill()


async def test_a_server_over_http(tape: Tape, workers: Start, web: Everything, tmp_path: Path) -> None:
    file = tmp_path / "servers.json"
    file.write_text(json.dumps({"mcpServers": {"web": {"url": f"http://127.0.0.1:{web.port}/mcp"}}}))
    worker = await workers("--mcp", str(file))
    called = Called(tape)
    assert await called("web_echo", message="hi") == ("ok", "Echo: hi")
    asked, call = await called.begin("web_trigger-long-running-operation", duration=0.5, steps=2)
    assert (await asked.result(call, PATIENT_S)).outcome == "ok"
    assert await progressed(asked, call)
    asked, call = await called.begin("web_trigger-long-running-operation", duration=60, steps=60)
    await asked.started(call)
    await asked.append(subjects.INPUT, Stop(run="r", ts=now_ms()))
    assert (await asked.result(call, limits.TOOL_GRACE_S)).outcome == "stopped"

    # Restarted while nothing runs: it does not know its session any more, and the call is made in a new one.
    web.kill()
    web.start()
    outcome, said = await called("web_toggle-simulated-logging")
    assert (outcome, said[:17]) == ("ok", "Started simulated")

    # Lost while a call runs that may be run again: another attempt is made where it is back.
    asked, call = await called.begin("web_trigger-long-running-operation", duration=1, steps=10)
    await until("it runs", lambda: progressed(asked, call))
    web.kill()
    await until("withdrawn", lambda: is_withdrawn(tape, "web_echo"))
    web.start()
    assert (await asked.result(call, 2 * PATIENT_S)).outcome == "ok"
    assert [started.attempt for started in await asked.of(ToolStarted, call)] == [1, 2]
    assert await worker.end(signal.SIGTERM) == 0
