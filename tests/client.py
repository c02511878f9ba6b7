"""What tests ask an edge with: Tapeline's calls over HTTP, a strict reader of its event streams, and the log itself
to compare with.

The reader takes nothing the edge should not send: no CR, no unknown field, no blank line but after an event, no event
out of order. What a cut leaves
of a frame is never counted. How lenient readers that others wrote see the same bytes is for `test_clients`.
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, TypeVar

import httpx
from prometheus_client.parser import text_string_to_metric_families
from tapeline import audit, events, limits, results, subjects
from tapeline.connection import Unavailable
from tapeline.record import Entry, Record
from tapeline.tape import Tape

from tests import PATIENT_S

T = TypeVar("T")

FLOOD_EVENTS: Final = 1_500
FLOOD_CHARS: Final = 8_000
HEARTBEAT: Final = b": hb"
SSE: Final = {"Accept": "text/event-stream"}
NDJSON: Final = {"Accept": "application/x-ndjson"}

_FIELD: Final = re.compile(rb"(id|event|data|retry): (.*)|:.*", re.DOTALL)


class Received(NamedTuple):
    """One event as a reader has it."""

    id: int
    event: str
    data: bytes


class Parser:
    """Bytes in, whole events out."""

    def __init__(self) -> None:
        self.comments: list[bytes] = []
        self.retry_ms: int | None = None
        self._line = b""
        self._fields: list[tuple[bytes, bytes]] = []
        self._last = 0

    @property
    def is_inside(self) -> bool:
        """Whether a frame has begun that is not complete."""
        return bool(self._line or self._fields)

    def feed(self, data: bytes) -> list[Received]:
        """The events that are complete with these bytes."""
        assert b"\r" not in data, "some clients take a CR for the end of a line"
        *lines, self._line = (self._line + data).split(b"\n")
        return [event for line in lines if (event := self._take(line)) is not None]

    def _take(self, line: bytes) -> Received | None:
        if line == b"":
            fields, self._fields = self._fields, []
            return self._event(fields)
        match = _FIELD.fullmatch(line)
        assert match, f"not a line of an event stream: {line!r}"
        if match[1] is None:
            self.comments.append(line)
        elif match[1] == b"retry":
            self.retry_ms = int(match[2])
        else:
            self._fields.append((match[1], match[2]))
        return None

    def _event(self, fields: list[tuple[bytes, bytes]]) -> Received:
        assert [name for name, _ in fields[:3]] == [b"id", b"event", b"data"], f"no whole event: {fields}"
        assert {name for name, _ in fields[3:]} <= {b"data"}, f"more than one event: {fields}"
        number, name, *data = (value for _, value in fields)
        assert int(number) > self._last, f"{int(number)} came after {self._last}"
        self._last = int(number)
        return Received(self._last, name.decode(), b"\n".join(data))


class Stream:
    """One open response of server-sent events, and the events it has given so far."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.parser = Parser()
        self.received: list[Received] = []
        self.bytes_read = 0
        self.ended = False
        """The server has ended it properly."""
        self._chunks: AsyncIterator[bytes] = response.aiter_raw()

    @property
    def status(self) -> int:
        return self.response.status_code

    async def more(self, bytes_max: int | None = None) -> bool:
        """Waits for the next bytes, takes at most so many of them; whether the stream goes on."""
        try:
            chunk = await anext(self._chunks)
        except StopAsyncIteration:
            self.ended = True
            return False
        chunk = chunk[:bytes_max]
        self.bytes_read += len(chunk)
        self.received += self.parser.feed(chunk)
        return True

    async def take(self, count: int) -> list[Received]:
        """The first `count` events, fewer where the stream ends before."""
        while len(self.received) < count and await self.more():
            pass
        return self.received[:count]

    async def take_bytes(self, count: int) -> list[Received]:
        """The events that are whole in the first `count` bytes."""
        while self.bytes_read < count and await self.more(count - self.bytes_read):
            pass
        return self.received

    async def until(self, *events: str) -> list[Received]:
        """The events up to the first of these types. Fails where the stream ends before."""
        while not any(one.event in events for one in self.received):
            assert await self.more(), f"ended before {events}: {[one.event for one in self.received]}"
        first = next(number for number, one in enumerate(self.received, start=1) if one.event in events)
        return self.received[:first]

    async def heartbeats(self, count: int) -> None:
        """Waits until there have been so many."""
        while self.parser.comments.count(HEARTBEAT) < count:
            assert await self.more(), "ended before there were enough heartbeats"

    async def rest(self) -> list[Received]:
        """All events, the server having ended the stream at an event boundary."""
        while await self.more():
            pass
        assert not self.parser.is_inside, "the stream ended inside a frame"
        return self.received


class Source:
    """Reads a run to its end as a browser's EventSource does: cut off, it comes back after `retry` with its cursor, and
    it fails for good at an answer that is no stream.
    """

    def __init__(self, client: "Client", conversation: str, run: str) -> None:
        self.received: list[Received] = []
        self.connections = 0
        self.pause_s = 0.0
        """The longest time between two events."""
        self.begun = asyncio.Event()
        """It has the first event."""
        self._client = client
        self._conversation = conversation
        self.run = run
        self._heard_at = 0.0

    async def follow(self) -> None:
        """Returns after the run's last event."""
        while not self.received or self.received[-1].event not in ("done", "error"):
            if self.connections:
                await asyncio.sleep(limits.RETRY_MS / 1000)
            self.connections += 1
            with contextlib.suppress(httpx.TransportError):
                await self._connection()

    async def _connection(self) -> None:
        cursor = self.received[-1].id if self.received else None
        clock = asyncio.get_running_loop().time
        async with self._client.events(self._conversation, cursor, run=self.run) as stream:
            assert stream.status == 200
            while await stream.more():
                if not stream.received:
                    continue
                now = clock()
                if self.begun.is_set():
                    self.pause_s = max(self.pause_s, now - self._heard_at)
                self._heard_at = now
                self.received += stream.received
                stream.received.clear()
                self.begun.set()


class Posted(NamedTuple):
    """A message that was taken, and its run."""

    run: str
    event_id: int


class Client:
    """A user of one edge. Its every answer is bounded in time."""

    def __init__(self, url: str, key: str = "", transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.http = httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=PATIENT_S,
            limits=httpx.Limits(max_connections=None),
            transport=transport,
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.http.aclose()

    async def create(self, **about: Any) -> str:
        """A new conversation; its id."""
        response = await self.http.post("/v1/conversations", json=about)
        assert response.status_code == 201, response.text
        conversation: str = response.json()["id"]
        return conversation

    async def send(self, conversation: str, content: str, key: str | None = None, **more: Any) -> httpx.Response:
        """Posts a message, whatever the answer."""
        headers = {} if key is None else {"Idempotency-Key": key}
        body = {"content": content, **more}
        return await self.http.post(f"/v1/conversations/{conversation}/messages", json=body, headers=headers)

    async def post(self, conversation: str, content: str, key: str | None = None, **more: Any) -> Posted:
        """Posts a message that is taken."""
        response = await self.send(conversation, content, key, **more)
        assert response.status_code == 202, response.text
        answer = response.json()
        return Posted(answer["run"], answer["event_id"])

    async def ask(self, content: str) -> tuple[str, str]:
        """Posts a message in a new conversation; the conversation and the run."""
        conversation = await self.create()
        return conversation, (await self.post(conversation, content)).run

    async def answered(self, content: str) -> tuple[str, str]:
        """As `ask`, the run having ended."""
        conversation, run = await self.ask(content)
        await self.run(conversation, run)
        return conversation, run

    async def stop(self, conversation: str, run: str) -> httpx.Response:
        return await self.http.post(f"/v1/conversations/{conversation}/runs/{run}/stop")

    async def decide(self, conversation: str, run: str, call: str, **decision: Any) -> httpx.Response:
        """Approves a call or denies it, whatever the answer."""
        path = f"/v1/conversations/{conversation}/runs/{run}/calls/{call}/approval"
        return await self.http.post(path, json=decision)

    async def metric(self, name: str) -> float:
        """What the edge says of itself under this name, all its series together; 0 where there is none yet."""
        exposition = (await self.http.get("/metrics")).text
        families = text_string_to_metric_families(exposition)
        return sum(sample.value for family in families for sample in family.samples if sample.name == name)

    async def snapshot(self, conversation: str) -> dict[str, Any]:
        response = await self.http.get(f"/v1/conversations/{conversation}")
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    async def get_events(
        self, conversation: str, cursor: str | None = None, headers: dict[str, str] | None = None, **query: Any
    ) -> httpx.Response:
        """The whole answer, where it is no stream or one that ends; `cursor` goes into `Last-Event-ID`."""
        given = {**SSE, **(headers or {})} | ({} if cursor is None else {"Last-Event-ID": cursor})
        return await self.http.get(f"/v1/conversations/{conversation}/events", params=query, headers=given)

    @asynccontextmanager
    async def stream(self, method: str, path: str, **request: Any) -> AsyncGenerator[Stream]:
        """An answer of server-sent events; leaving closes the connection, wherever the stream is."""
        async with self.http.stream(method, path, **request) as response:
            if response.status_code >= 300:
                await response.aread()
                raise AssertionError(f"{response.status_code}: {response.text}")
            yield Stream(response)

    @asynccontextmanager
    async def events(self, conversation: str, cursor: int | None = None, **query: Any) -> AsyncGenerator[Stream]:
        """A conversation's events; `cursor` goes into `Last-Event-ID`."""
        headers = SSE if cursor is None else {**SSE, "Last-Event-ID": str(cursor)}
        path = f"/v1/conversations/{conversation}/events"
        async with self.stream("GET", path, params=query, headers=headers) as stream:
            yield stream

    async def run(self, conversation: str, run: str, cursor: int | None = None) -> list[Received]:
        """A run's events after the cursor, to its end; none where the edge says that it is over (204)."""
        async with self.events(conversation, cursor, run=run) as stream:
            received = await stream.rest()
            assert stream.status == 200 or not received
            return received

    async def lines(self, conversation: str, **query: Any) -> list[bytes]:
        """The stored events as NDJSON lines."""
        response = await self.http.get(f"/v1/conversations/{conversation}/events", params=query, headers=NDJSON)
        assert response.status_code == 200, response.text
        assert response.content.endswith(b"\n")
        return response.content.splitlines()


async def stored(nats_url: str, conversation: str) -> list[Record]:
    """The conversation as it is on the tape, read without an edge."""
    tape = await opened(nats_url)
    try:
        return await tape.read(conversation)
    finally:
        await tape.close()


async def opened(nats_url: str) -> Tape:
    """A tape, as soon as NATS is there: a test may have killed it this moment."""
    async with asyncio.timeout(PATIENT_S):
        while True:
            try:
                return await Tape.open(nats_url, "test")
            except Unavailable:
                await asyncio.sleep(0.1)


async def judged(nats_url: str, conversation: str) -> tuple[list[Record], list[str]]:
    """As `stored`, all its runs having ended, and what in it breaks a promise."""
    tape = await opened(nats_url)
    try:
        records = await tape.read(conversation)
        return records, audit.violations(records) + await results.violations(tape, conversation, records)
    finally:
        await tape.close()


async def log_of(nats_url: str, conversation: str) -> list[Record]:
    """As `judged`; nothing breaks one."""
    records, broken = await judged(nats_url, conversation)
    assert broken == []
    return records


async def flood(nats_url: str, conversation: str) -> int:
    """Many large events of another writer, more than the kernel's buffers and a ring hold; the last one's sequence."""
    tape = await Tape.open(nats_url, "test")
    try:
        last = await tape.last(conversation)
        for number in range(FLOOD_EVENTS):
            event = events.Token(run="flood", ts=number, step=1, attempt=1, text="x" * FLOOD_CHARS)
            last = await tape.append(conversation, Entry(subjects.MODEL_DELTA, events.encode(event)), last)
        return last
    finally:
        await tape.close()


def as_received(records: Iterable[Record], run: str | None = None) -> list[Received]:
    """What a reader of these events (of one run) has to receive, byte for byte."""
    named = [(record, events.peek(record.data)) for record in records]
    return [Received(record.seq, event.type, record.data) for record, event in named if run in (None, event.run)]


def types(received: Iterable[Received]) -> list[str]:
    """The events' types, in order."""
    return [one.event for one in received]


def problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The body of an answer that has to be this error, in the form every error has."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert (body["status"], body["code"], body["type"]) == (status, code, f"urn:tapeline:{code}")
    assert body["title"]
    assert body["detail"]
    assert "Traceback" not in response.text
    return body


async def at_once(limit: int, jobs: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What the jobs return, in order; so many of them run at a time, and the first that fails ends all."""
    turn = asyncio.Semaphore(limit)

    async def in_turn(job: Coroutine[Any, Any, T]) -> T:
        with contextlib.closing(job):  # where its turn never comes
            async with turn:
                return await job

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(in_turn(job)) for job in jobs]
    return [task.result() for task in tasks]
