"""Stand-ins for a model provider.

`ModelServer` is aimock, a model server others wrote (npm `@copilotkit/aimock`), as a process of its own: it speaks
OpenAI's Chat Completions and Responses and Anthropic's Messages. `RawServer` sends exactly the bytes a test gives
it, for the faults aimock cannot make, and sees when its client hangs up. Neither knows Tapeline.
"""

import asyncio
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import httpx
import pytest

from tests import PATIENT_S

AIMOCK: Final = Path(__file__).parent / "node" / "node_modules" / ".bin" / "aimock"
START_POLL_S: Final = 0.02
STOP_S: Final = 5.0

Fixture = dict[str, Any]


def answers(
    said: str,
    text: str = "",
    *,
    thinking: str = "",
    calls: Sequence[tuple[str, Mapping[str, Any] | str]] = (),
    after_results: bool | None = None,
    result: str | None = None,
    chunk_chars: int | None = None,
    first_ms: float | None = None,
    chunks_per_s: float | None = None,
    delay_ms: int | None = None,
    cut_after_chunks: int | None = None,
    **more: Any,
) -> Fixture:
    """To a conversation whose last user message contains `said`, answer this; the first match added wins.

    Steps of one run are told apart by `after_results` (whether results follow the last user message) and `result`
    (what the newest result contains). Pace: `delay_ms` between chunks, or `first_ms` before the first and then
    `chunks_per_s`. `cut_after_chunks` needs a delay of some ms, or the cut overtakes the chunks. `more` goes into
    the response, such as `finishReason="length"`, or `finishReason=""` for a stream that ends without one (OpenAI).
    """
    response: Fixture = {**more}
    if text or not calls:
        response["content"] = text
    if thinking:
        response["reasoning"] = thinking
    if calls:
        response["toolCalls"] = [
            {"name": tool, "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments)}
            for tool, arguments in calls
        ]
    match = {"userMessage": said, "hasToolResult": after_results, "toolResultContains": result}
    profile = {"ttft": first_ms, "tps": chunks_per_s}
    fixture = {
        "match": _given(match),
        "response": response,
        "chunkSize": chunk_chars,
        "latency": delay_ms,
        "truncateAfterChunks": cut_after_chunks,
        "streamingProfile": _given(profile) or None,
    }
    return _given(fixture)


def refuses(said: str, status: int, message: str, *, retry_after_s: int | None = None) -> Fixture:
    """To a conversation whose last user message contains `said`, answer with an HTTP error."""
    response = {"error": {"message": message, "type": "error"}, "status": status, "retryAfter": retry_after_s}
    return {"match": {"userMessage": said}, "response": _given(response)}


def _given(values: Mapping[str, Any]) -> Fixture:
    return {name: value for name, value in values.items() if value is not None}


class ModelServer:
    """aimock as a process, on a free port. `with ModelServer() as server: server.add(answers("hi", "Hello."))`."""

    def __init__(self, *fixtures: Fixture, chunk_chars: int = 8) -> None:
        """Answers known from the start; only these may hold arguments that are no JSON."""
        self._fixtures = fixtures
        self._chunk_chars = chunk_chars
        self._directory = tempfile.TemporaryDirectory(prefix="tapeline-model-")
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    @property
    def environ(self) -> dict[str, str]:
        """What points a service at this server."""
        return {
            "OPENAI_BASE_URL": f"{self.url}/v1",
            "OPENAI_API_KEY": "sk-stand-in-openai",
            "ANTHROPIC_BASE_URL": self.url,
            "ANTHROPIC_API_KEY": "sk-stand-in-anthropic",
        }

    def start(self) -> Self:
        """Starts it. Skips the test where aimock is not installed, but fails in CI."""
        if not AIMOCK.exists():
            missing = "aimock is not installed: run `npm ci` in tests/node"
            if os.environ.get("CI") == "true":
                pytest.fail(missing)
            pytest.skip(missing)
        directory = Path(self._directory.name)
        fixtures, config = directory / "fixtures.json", directory / "config.json"
        fixtures.write_text(json.dumps({"fixtures": self._fixtures}))
        llm = {"fixtures": str(fixtures), "chunkSize": self._chunk_chars, "logLevel": "warn"}
        config.write_text(json.dumps({"port": 0, "llm": llm}))
        log = directory / "log"
        with log.open("wb") as out:
            command = [str(AIMOCK), "--config", str(config)]
            self._process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + PATIENT_S
        while not (listening := re.search(r"listening on (\S+)\n", log.read_text())):
            if self._process.poll() is not None or time.monotonic() > deadline:
                said = log.read_text()
                self.stop()
                raise AssertionError(f"aimock did not start: {said}")
            time.sleep(START_POLL_S)
        self.url = listening[1]
        return self

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()  # it keeps nothing, and on SIGTERM it waits for its connections
            self._process.wait(STOP_S)
            self._process = None
        self._directory.cleanup()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def add(self, *fixtures: Fixture) -> None:
        """Answers from now on, after those it has."""
        self._control("POST", "fixtures", {"fixtures": fixtures})

    def fail_next(self, status: int, message: str) -> None:
        """The next request, whatever it asks, gets this error; only that one."""
        self._control("POST", "error", {"status": status, "body": {"message": message, "type": "error"}})

    def journal(self) -> list[dict[str, Any]]:
        """Every request it got, oldest first: `path`, `headers`, `body` (as Chat Completions), `response`."""
        entries: list[dict[str, Any]] = self._control("GET", "journal")
        return entries

    def reset(self) -> None:
        """Forgets all answers and the journal."""
        self._control("POST", "reset")

    def _control(self, method: str, path: str, body: object = None) -> Any:
        response = httpx.request(method, f"{self.url}/__aimock/{path}", json=body, timeout=PATIENT_S)
        assert response.is_success, response.text
        return response.json()


Handler = Callable[["RawServer", asyncio.StreamWriter], Awaitable[None]]


class RawServer:
    """Answers each request as `handler` says, in bytes, and closes the connection after it."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._server: asyncio.Server | None = None
        self.url = ""
        self.requests: list[Any] = []
        """The bodies it got."""
        self.hung_up = asyncio.Event()
        """A client closed its connection before the answer was over."""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.partition(b":")[2]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")
        )
        self.requests.append(json.loads(await reader.readexactly(length)))
        answering = asyncio.ensure_future(self._handler(self, writer))
        hanging_up = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait((answering, hanging_up), return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
            else:
                self.hung_up.set()
        finally:
            answering.cancel()
            hanging_up.cancel()
            writer.close()


def sse(*data: Mapping[str, Any] | str) -> bytes:
    """Server-sent events, each named by its `type` if it has one; a string goes out as it is."""
    frames = []
    for item in data:
        name = f"event: {item['type']}\n" if isinstance(item, Mapping) and "type" in item else ""
        frames.append(f"{name}data: {item if isinstance(item, str) else json.dumps(item)}\n\n")
    return "".join(frames).encode()


STREAM_HEAD: Final = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
"""Without a length or chunks: the end of the connection is the end of the body, and no error."""
