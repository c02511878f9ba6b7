"""What an edge says of itself, how its streams begin and stay alive, and how it goes: at event boundaries, in time,
and with nothing lost for readers who come back to another edge.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any, Final

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import Request
from tapeline import limits, provision, subjects
from tapeline.connection import api, connect
from tapeline.settings import Settings
from tapeline.tape import Tape

from services.edge.auth import Auth
from services.edge.calls import Calls
from services.edge.lease import Leases
from services.edge.meters import Meters
from services.edge.models import Models
from services.edge.quota import Quota
from services.edge.ticket import Tickets
from tests import PATIENT_S
from tests.client import HEARTBEAT, SSE, Client, Received, as_received, at_once, flood, log_of, types
from tests.stack import POLL_S, Stack

AT_ONCE_S: Final = limits.HEARTBEAT_S / 2  # long before anything else would come
READERS: Final = 8


@pytest.fixture
async def alone(fresh_stack: Stack) -> AsyncIterator[Client]:
    """A user of an edge that has nothing but NATS."""
    fresh_stack.env["TAPELINE_HEARTBEAT_S"] = "1"
    fresh_stack.add_edge()
    async with Client(fresh_stack.url) as client:
        yield client


async def readiness(client: Client, status: int) -> list[str]:
    """Waits until the edge is ready (200), or is not (503); the reasons it gives."""
    async with asyncio.timeout(PATIENT_S):
        while (response := await client.http.get("/readyz")).status_code != status:
            assert response.status_code in (200, 503)
            await asyncio.sleep(POLL_S)
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body["status"] == ("ready" if status == 200 else "not ready")
    why: list[str] = body["why"]
    return why


# Readiness


async def test_without_nats_it_is_alive_but_not_ready_until_nats_is_back(fresh_stack: Stack, alone: Client) -> None:
    assert await readiness(alone, 200) == []
    fresh_stack.nats.stop()
    assert await readiness(alone, 503) == ["NATS is not connected"]
    assert (await alone.http.get("/healthz")).json() == {"status": "ok"}
    fresh_stack.nats.start()
    assert await readiness(alone, 200) == []
    await alone.create()


async def test_without_what_was_provisioned_it_is_not_ready(fresh_stack: Stack, alone: Client) -> None:
    """A consumer that is gone looks like silence to everyone else."""
    assert await readiness(alone, 200) == []
    nc = await connect(fresh_stack.nats.url, "test")
    stream = subjects.stream(0)
    try:
        await api(nc, f"CONSUMER.DELETE.{stream}.{subjects.TRIGGERS}")
    finally:
        await nc.close()
    assert await readiness(alone, 503) == [f"consumer {subjects.TRIGGERS} of {stream} is missing"]
    fresh_stack.provision()
    assert await readiness(alone, 200) == []


async def test_many_who_ask_whether_it_is_ready_ask_nats_once(tape: Tape, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anyone may ask, and an edge that is not ready would ask NATS twenty things for each."""
    asked = 0

    async def drift(*_: object) -> list[str]:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0)
        return ["a stream is missing"]

    monkeypatch.setattr(provision, "drift", drift)
    none = Settings({})
    auth = Auth.configured(none)
    quota, leases = Quota.configured(none, tape, limited=False), Leases.configured(none, tape, limited=False)
    calls = Calls(tape, auth, Tickets.configured(none, auth), Models.configured(none), quota, leases, 15)
    try:
        for _ in range(2):
            answers = await asyncio.gather(*(calls.readyz(Request({"type": "http"})) for _ in range(READERS)))
            assert {answer.status_code for answer in answers} == {503}
    finally:
        calls.streams.close()
    assert asked == 1


def test_a_worker_does_not_make_up_any_number_of_series() -> None:
    meters = Meters()
    names = [meters.tool(f"tool-{number}") for number in range(limits.TOOLS_MEASURED_MAX + 10)]
    assert len(set(names)) == limits.TOOLS_MEASURED_MAX + 1
    assert meters.tool("tool-0") == "tool-0", "who was there goes on being measured"


# How a stream begins, and stays alive


@pytest.fixture
async def patient(fresh_stack: Stack) -> AsyncIterator[Client]:
    """A user of an edge that has nothing but NATS, and says for long that it is alive."""
    fresh_stack.add_edge()
    async with Client(fresh_stack.url) as client:
        yield client


async def test_a_stream_says_hello_at_once(patient: Client) -> None:
    conversation = await patient.create()
    last = (await patient.snapshot(conversation))["last_event_id"]
    async with asyncio.timeout(AT_ONCE_S), patient.events(conversation, last) as stream:
        assert await stream.more()
        assert stream.parser.retry_ms == limits.RETRY_MS
        (hello,) = stream.parser.comments
        assert hello != HEARTBEAT


async def test_a_stream_says_now_and_then_that_it_is_alive(alone: Client) -> None:
    conversation = await alone.create()
    last = (await alone.snapshot(conversation))["last_event_id"]
    started = time.monotonic()
    async with alone.events(conversation, last) as stream:
        await stream.heartbeats(3)
        assert time.monotonic() - started >= 3, "more often than was asked for"
        assert stream.received == []


async def test_a_stream_says_hello_before_its_run_has_a_word_to_say(patient: Client) -> None:
    """There is no inference here, so the run's first event stays its only one."""
    conversation = await patient.create()
    path = f"/v1/conversations/{conversation}/messages"
    async with (
        asyncio.timeout(AT_ONCE_S),
        patient.stream("POST", path, json={"content": "hi"}, headers=SSE) as stream,
    ):
        assert types(await stream.take(1)) == ["message"]


async def test_the_headers_keep_proxies_and_caches_out_of_a_stream(alone: Client) -> None:
    conversation = await alone.create()
    path = f"/v1/conversations/{conversation}"
    for request in (
        alone.events(conversation),
        alone.stream("POST", f"{path}/messages", json={"content": "hi"}, headers=SSE),
    ):
        async with request as stream:
            headers = stream.response.headers
            assert stream.status == 200
            assert headers["content-type"] == "text/event-stream; charset=utf-8"
            assert headers["cache-control"] == "no-cache, no-transform"
            assert headers["x-accel-buffering"] == "no"
            assert "content-length" not in headers
            assert "content-encoding" not in headers


# Metrics


async def test_the_five_figures_are_there_after_a_run_with_tools(stack: Stack, client: Client) -> None:
    before = await figures(client)
    _, run = await client.answered("steps")
    after = await figures(client)

    def grew(name: str, **labels: str) -> float:
        key = (name, frozenset(labels.items()))
        return after.get(key, 0) - before.get(key, 0)

    assert run
    assert grew("tapeline_stream_first_token_seconds_count") == 1
    assert grew("tapeline_stream_token_rate_per_second_count") == 1
    assert grew("tapeline_stream_completions_total", outcome="complete") == 1
    assert grew("tapeline_stream_duration_seconds_count", outcome="complete") == 1
    for tool in ("clock", "calculate"):
        assert grew("tapeline_tool_duration_seconds_count", tool=tool, outcome="ok") == 1
    assert (
        0
        < grew("tapeline_stream_first_token_seconds_sum")
        < grew("tapeline_stream_duration_seconds_sum", outcome="complete")
    )
    assert after["tapeline_streams_open", frozenset()] == 0


async def test_runs_that_were_stopped_and_streams_that_were_resumed_are_counted(client: Client) -> None:
    before = await figures(client)
    conversation, run = await client.ask("long 2000")
    async with client.events(conversation, run=run) as stream:
        cursor = (await stream.until("token"))[-1].id
    async with client.events(conversation, cursor, run=run) as stream:
        await client.stop(conversation, run)
        await stream.rest()
    after = await figures(client)
    for name, labels in (
        ("tapeline_stream_completions_total", {"outcome": "stopped"}.items()),
        ("tapeline_streams_resumes_total", {}.items()),
    ):
        assert after[name, frozenset(labels)] - before.get((name, frozenset(labels)), 0) == 1


async def figures(client: Client) -> dict[tuple[str, frozenset[Any]], float]:
    """Every sample of `/metrics`, by its name and labels."""
    response = await client.http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, frozenset((k, v) for k, v in sample.labels.items() if not k.startswith("otel_"))): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


# Going


async def test_a_drained_edge_ends_its_streams_at_an_event_and_nothing_is_missing(fresh_stack: Stack) -> None:
    fresh_stack.start().add_edge()
    async with Client(fresh_stack.edge_url(0)) as going, Client(fresh_stack.edge_url(1)) as staying:
        conversation, run = await going.ask("long 600")
        quiet = await going.create()
        speaking = asyncio.Semaphore(0)

        async def read() -> list[Received]:
            async with going.events(conversation, run=run) as stream:
                await stream.until("token")
                speaking.release()
                before = await stream.rest()
            assert before[-1].event != "done", "the run was over before the edge went, so this was no test"
            return before + await staying.run(conversation, run, before[-1].id)

        async def wait() -> list[Received]:
            async with going.events(quiet) as stream:
                await stream.take(1)
                speaking.release()
                return await stream.rest()

        async def drain() -> list[Received]:
            for _ in range(READERS + 1):
                await speaking.acquire()
            await fresh_stack.drained()
            with pytest.raises(httpx.ConnectError):
                await going.create()
            return []

        *readings, silence, _ = await at_once(READERS + 2, [*(read() for _ in range(READERS)), wait(), drain()])
        assert types(silence) == ["conversation"]
    log = as_received(await log_of(fresh_stack.nats.url, conversation), run)
    assert readings == [log] * READERS


async def test_a_reader_that_takes_nothing_does_not_keep_a_drained_edge(fresh_stack: Stack, alone: Client) -> None:
    conversation = await alone.create()
    await flood(fresh_stack.nats.url, conversation)
    async with alone.events(conversation) as stalled:
        await stalled.take(1)
        await fresh_stack.drained()
