"""Behind a real nginx, HAProxy and Caddy, each with its file of docs/deploy: events come as they are produced,
nothing is sent twice, and an edge knows who asks.
"""

import asyncio
import contextlib
import re
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Final

import httpx
import pytest
from tapeline import limits

from tests import PATIENT_S
from tests.client import NDJSON, SSE, Client, Received, Source, as_received, log_of, problem, stored, types
from tests.proxy import DEPLOY, KEY, PROXIES, READER, Caddy, Certificate, Haproxy, Nginx, Proxy, through
from tests.stack import POLL_S, Stack, until

IDLE_LIMITS: Final = re.compile(
    r"^\s*(proxy_read_timeout|timeout (?:client|server|tunnel)|(?:read|write|idle|response_header)_timeout)\s+(\d+h)?",
    re.MULTILINE,
)
"""Whatever says how long a connection may be silent, and whether it says hours."""
FORGED: Final = "9.9.9.9"
QUESTION: Final = "long 100"
STREAMS: Final = 30  # five times what a browser opens of HTTP/1.1
READERS: Final = 12
FLOOD: Final = 100
MESSAGE_CHARS: Final = 30_000  # far more than a proxy's own requests, and less than the kernel holds for an edge


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Two edges that believe their proxy, with heartbeats to wait for."""
    env = {
        "TAPELINE_HEARTBEAT_S": "1",
        "TAPELINE_PROXIES": "127.0.0.1",
        "TAPELINE_API_KEYS": f"ann={KEY}",
        "TAPELINE_DEMO_DELAY_MS": "20",
    }
    stack = Stack(tmp_path_factory.mktemp("stack"), env)
    try:
        stack.start().add_edge()
        yield stack
    finally:
        stack.stop()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return Certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture(params=PROXIES, ids=lambda kind: kind.name)
def proxy(request: pytest.FixtureRequest, tmp_path: Path, certificate: Certificate, stack: Stack) -> Iterator[Proxy]:
    """Each proxy as it is deployed."""
    proxy: Proxy = request.param(tmp_path, certificate, stack.ports)
    yield proxy
    proxy.stop()


@pytest.fixture
def changed(tmp_path: Path, certificate: Certificate, stack: Stack) -> Iterator[Callable[[dict[str, str]], Proxy]]:
    """Starts an nginx whose configuration is not what is deployed."""
    started: list[Proxy] = []

    def start(changes: dict[str, str]) -> Proxy:
        started.append(Nginx(tmp_path, certificate, stack.ports, changes))
        return started[-1]

    yield start
    for proxy in started:
        proxy.stop()


@pytest.fixture
async def user(proxy: Proxy) -> AsyncIterator[Client]:
    """A user who asks the proxy."""
    async with through(proxy) as client:
        yield client


@pytest.fixture
async def direct(stack: Stack) -> AsyncIterator[Client]:
    """The same user, who asks an edge."""
    async with Client(stack.url, KEY) as client:
        yield client


# Events come as they are produced


async def comes_at_once(proxied: Client, direct: Client) -> bool:
    """Whether an idle conversation's first event comes before an edge has said three times that nothing else has."""
    conversation = await direct.create()

    async def first() -> list[Received]:
        async with proxied.events(conversation) as stream:
            return await stream.take(1)

    reading = asyncio.create_task(first())
    async with direct.events(conversation) as stream:
        await stream.heartbeats(3)
    if reading.done():
        return types(await reading) == ["conversation"]
    reading.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await reading
    return False


@pytest.mark.parametrize("http2", [True, False])
async def test_the_first_event_does_not_wait_for_more(http2: bool, proxy: Proxy, direct: Client) -> None:
    async with through(proxy, http2=http2) as user:
        assert await comes_at_once(user, direct)


async def test_nginx_that_buffers_withholds_events(changed: Callable[[dict[str, str]], Proxy], direct: Client) -> None:
    """What nginx does by itself with HTTP/1.1 (with HTTP/2 it lets chunks through), and why the test above can fail."""
    buffering = changed({"proxy_buffering off;": "proxy_ignore_headers X-Accel-Buffering;"})
    async with through(buffering, http2=False) as user:
        assert not await comes_at_once(user, direct)


async def test_the_edges_word_is_enough_for_nginx_not_to_buffer(
    changed: Callable[[dict[str, str]], Proxy], direct: Client
) -> None:
    async with through(changed({"proxy_buffering off;": ""}), http2=False) as user:
        assert await comes_at_once(user, direct)


async def test_every_token_comes_when_it_is_produced(stack: Stack, user: Client, direct: Client) -> None:
    """About as many at a time as an edge's own reader gets on the same machine, and before that has the last."""
    conversation, run = await direct.ask(QUESTION)
    reads: dict[Client, int] = {user: 0, direct: 0}
    received: dict[Client, list[Received]] = {user: [], direct: []}

    async def follow(client: Client) -> None:
        async with client.events(conversation, run=run) as stream:
            received[client] = stream.received
            while await stream.more():
                reads[client] += 1

    following = asyncio.create_task(follow(user))
    await follow(direct)
    seen = len(received[user])
    await following
    whole = received[direct]
    assert received[user] == whole == as_received(await log_of(stack.nats.url, conversation), run)
    print(f"{seen} of {len(whole)} events were there when the edge's own reader had the last")
    print(f"after {reads[user]} reads, of its own {reads[direct]}")
    assert seen > len(whole) / 2
    assert reads[user] > reads[direct] / 2, "several came at a time"


async def test_thirty_streams_and_a_post_share_one_connection(proxy: Proxy, direct: Client) -> None:
    conversation = await direct.create()
    ready = asyncio.Semaphore(0)
    async with through(proxy, connections=1) as user:

        async def follow() -> list[Received]:
            async with user.events(conversation) as stream:
                assert stream.response.http_version == "HTTP/2"
                await stream.take(1)
                ready.release()
                return (await stream.until("done"))[:]

        async with asyncio.TaskGroup() as group:
            following = [group.create_task(follow()) for _ in range(STREAMS)]
            for _ in following:
                await ready.acquire()
            await user.post(conversation, "math: 6 * 7")
        assert len({tuple(one.result()) for one in following}) == 1


async def test_a_waiting_stream_stays_open(user: Client, direct: Client) -> None:
    conversation = await direct.create()
    async with user.events(conversation) as stream:
        await stream.heartbeats(5)
        assert types(stream.received) == ["conversation"]
        await direct.post(conversation, "math: 6 * 7")
        await stream.until("done")


PATIENCE: Final = {
    Nginx: {"proxy_read_timeout 2h;": "proxy_read_timeout 500ms;"},
    Haproxy: {"timeout server 2h": "timeout server 500ms"},
    Caddy: {"dial_timeout 2s": "dial_timeout 2s\n\t\t\tread_timeout 500ms"},
}
"""What says how long a proxy waits for an edge, and less than is between two heartbeats."""


@pytest.mark.parametrize("kind", PATIENCE, ids=lambda kind: kind.name)
async def test_a_proxy_waits_for_hours(
    kind: type[Proxy], tmp_path: Path, certificate: Certificate, stack: Stack, direct: Client
) -> None:
    """As it is deployed; and that is what decides, for with less it cuts a waiting stream. Caddy waits for ever unless
    it is told."""
    conversation = await direct.create()
    hasty = kind(tmp_path, certificate, stack.ports, PATIENCE[kind])
    try:
        said = {file.name: IDLE_LIMITS.findall(file.read_text()) for file in DEPLOY.iterdir()}
        assert said["nginx.conf"]
        assert len(said["haproxy.cfg"]) == 2
        for file, found in said.items():
            assert all(hours for _, hours in found), f"{file}: {found}"
        async with through(hasty) as user:
            with pytest.raises((httpx.TransportError, AssertionError)):
                async with user.events(conversation) as stream:
                    await stream.heartbeats(3)
    finally:
        hasty.stop()


async def test_the_edge_hears_that_a_reader_has_left(stack: Stack, proxy: Proxy, direct: Client) -> None:
    """Caddy would keep it from the edge with `flush_interval -1`."""

    async def none_is_open() -> bool:
        return await streams_open(stack) == 0

    conversation = await direct.create()
    await until("no stream is open", none_is_open)
    # On a connection of its own, because httpx resets no single stream.
    async with through(proxy) as user, user.events(conversation) as stream:
        await stream.take(1)
        assert await streams_open(stack) == 1
    await until("no stream is open any more", none_is_open)


async def streams_open(stack: Stack) -> float:
    """Over both edges."""
    count = 0.0
    for number in range(len(stack.ports)):
        async with Client(stack.edge_url(number)) as edge:
            count += await edge.metric("tapeline_streams_open")
    return count


async def test_no_event_is_compressed(user: Client, direct: Client) -> None:
    conversation, _ = await direct.answered(QUESTION)
    for accept in (SSE, NDJSON):
        headers = {**accept, "Accept-Encoding": "gzip, br, zstd, deflate"}
        path = f"/v1/conversations/{conversation}/events"
        async with user.http.stream("GET", path, headers=headers) as response:
            assert response.status_code == 200
            assert "content-encoding" not in response.headers
            assert response.headers["cache-control"] == "no-cache, no-transform"


# Who asks, and what for


async def test_an_edge_knows_who_asks_whatever_he_claims(stack: Stack, proxy: Proxy) -> None:
    claims = dict.fromkeys(("X-Forwarded-For", "X-Real-IP", "X-Client-IP"), FORGED)
    path = f"/v1/conversations/{proxy.name}-{proxy.port}"
    async with through(proxy) as stranger:
        stranger.http.headers["Authorization"] = "Bearer not-a-key"
        response = await stranger.http.get(f"{path}?ticket=hush", headers={**claims, "Forwarded": f"for={FORGED}"})
    problem(response, 401, "unauthorized")
    said = "".join(edge.output() for edge in stack.edges if edge)
    assert f"refused {READER} GET {path}: 401 unauthorized" in said
    assert FORGED not in said
    assert "hush" not in said


async def test_metrics_are_not_for_everyone(user: Client) -> None:
    for path in (
        "/metrics",
        "/%6detrics",
        "/metrics?x",
        "//metrics",
        "/./metrics",
        "/page/../metrics",
        "/page/%2e%2e/metrics",
    ):
        response = await user.http.get(f"{user.http.base_url}".rstrip("/") + path)
        assert response.status_code == 404, path
        assert "tapeline_" not in response.text
    assert (await user.http.get("/healthz")).status_code == 200


async def test_a_body_too_large_is_answered_by_the_edge(user: Client) -> None:
    response = await user.http.post("/v1/conversations", json={"title": "x" * 5_000_000})
    problem(response, 413, "too_large")


# An edge is killed


@contextlib.contextmanager
def frozen(stack: Stack) -> Iterator[None]:
    """Both edges, which take connections and bytes but do nothing. One may be killed; afterwards both are there."""
    try:
        for edge in stack.edges:
            assert edge is not None
            edge.send(signal.SIGSTOP)
        yield
    finally:
        for number, edge in enumerate(stack.edges):
            if edge is None:
                stack.start_edge(number)
            else:
                edge.send(signal.SIGCONT)


def unread() -> Iterator[tuple[int, int]]:
    """The port of every connection of this machine's IPv4, and the bytes that wait there to be read."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, _, _, queues, *_ = line.split()
        yield int(local.partition(":")[2], 16), int(queues.partition(":")[2], 16)


async def reached(stack: Stack, size: int) -> int:
    """Waits until a frozen edge has so many bytes to read; which it is. What a proxy asks by itself is far smaller."""
    async with asyncio.timeout(PATIENT_S):
        while True:
            for port, waiting in unread():
                if port in stack.ports and waiting >= size:
                    return stack.ports.index(port)
            await asyncio.sleep(POLL_S)


async def post_that_is_lost(stack: Stack, user: Client, key: str | None = None) -> tuple[str, httpx.Response]:
    """Posts a message to an edge that is killed before it can do anything; the conversation and the answer."""
    conversation = await user.create()
    with frozen(stack):
        posting = asyncio.create_task(user.send(conversation, "x" * MESSAGE_CHARS, key))
        number = await reached(stack, MESSAGE_CHARS)  # all of it: before, an edge can do nothing
        stack.kill_edge(number)
        other = stack.edges[1 - number]
        assert other is not None
        other.send(signal.SIGCONT)
        return conversation, await posting


async def messages(stack: Stack, conversation: str) -> int:
    """On the tape."""
    return types(as_received(await stored(stack.nats.url, conversation))).count("message")


async def test_a_post_that_may_have_reached_an_edge_is_not_sent_to_another(stack: Stack, user: Client) -> None:
    """The one it reached did nothing with it, so whatever is on the tape was sent again. Its client may do that."""
    conversation, response = await post_that_is_lost(stack, user, key="once")
    assert response.status_code in (502, 503)
    assert await messages(stack, conversation) == 0
    for _ in range(2):
        assert (await user.send(conversation, "x" * MESSAGE_CHARS, "once")).status_code == 202
    assert await messages(stack, conversation) == 1


async def test_a_proxy_that_repeats_everything_sends_it_twice(
    stack: Stack, changed: Callable[[dict[str, str]], Proxy]
) -> None:
    """Why the test above can fail."""
    careless = changed({"proxy_next_upstream error timeout": "proxy_next_upstream non_idempotent error timeout"})
    async with through(careless) as user:
        conversation, response = await post_that_is_lost(stack, user)
    assert response.status_code == 202
    assert await messages(stack, conversation) == 1


async def test_a_get_is_sent_to_another_and_no_log_has_its_query(
    stack: Stack, proxy: Proxy, user: Client, direct: Client
) -> None:
    conversation = await direct.create()
    path = f"/v1/conversations/{conversation}"
    with frozen(stack):
        asking = asyncio.create_task(user.http.get(f"{path}?ticket=hush", headers={"X-Padding": "x" * 4_000}))
        number = await reached(stack, 3_000)
        stack.kill_edge(number)
        other = stack.edges[1 - number]
        assert other is not None
        other.send(signal.SIGCONT)
        response = await asking
    assert response.status_code == 200, response.text
    assert response.json()["id"] == conversation
    await until("the log has it", lambda: path in proxy.logs())
    assert READER in proxy.logs()
    assert "hush" not in proxy.logs()


async def test_readers_of_a_killed_edge_go_on_where_they_were(stack: Stack, user: Client) -> None:
    conversation, run = await user.ask("long 300")
    readers = [Source(user, conversation, run) for _ in range(READERS)]
    try:
        async with asyncio.TaskGroup() as group:
            for reader in readers:
                group.create_task(reader.follow())
            for reader in readers:
                await reader.begun.wait()
            stack.kill_edge(1)
    finally:
        stack.start_edge(1)
    log = as_received(await log_of(stack.nats.url, conversation), run)
    for reader in readers:
        assert reader.received == log
    assert {reader.connections for reader in readers} == {1, 2}, "they were not on both edges, so this was no test"


# Whose word an edge takes


async def test_an_edge_believes_nobody_unless_told(fresh_stack: Stack) -> None:
    """Not even this machine: any program here could say that it asks for another."""
    fresh_stack.env["TAPELINE_API_KEYS"] = f"ann={KEY}"
    for number, proxies in enumerate(("", READER, "127.0.0.0/8")):
        fresh_stack.add_edge({"TAPELINE_PROXIES": proxies})
        async with Client(fresh_stack.edge_url(number), "not-a-key") as stranger:
            problem(
                await stranger.http.get("/v1/conversations", headers={"X-Forwarded-For": FORGED}), 401, "unauthorized"
            )
    said = [re.findall(r"refused (\S+) ", edge.output()) for edge in fresh_stack.edges if edge]
    assert said == [["127.0.0.1"], ["127.0.0.1"], [FORGED]]


@pytest.mark.parametrize("proxies", ["nginx", "10.0.0.1/8", "*", "127.0.0.1;10.0.0.1"])
async def test_who_is_believed_is_named_by_address(proxies: str, fresh_stack: Stack) -> None:
    with pytest.raises(AssertionError, match=r"edge: TAPELINE_PROXIES has .*; name addresses and networks"):
        fresh_stack.add_edge({"TAPELINE_PROXIES": proxies})


async def test_a_flood_of_refusals_does_not_flood_the_log(fresh_stack: Stack) -> None:
    fresh_stack.env["TAPELINE_API_KEYS"] = f"ann={KEY}"
    fresh_stack.add_edge()
    edge = fresh_stack.edges[0]
    assert edge is not None
    async with Client(fresh_stack.url, "not-a-key") as stranger:
        for _ in range(FLOOD):
            await stranger.http.get(f"/v1/conversations/%0aroot%1b{'x' * 1_000}?ticket=hush")

    def counted() -> tuple[int, int]:
        more = re.findall(r"refused (\d+) more", edge.output())
        return len(re.findall(r"refused 127", edge.output())), sum(map(int, more))

    await until("all are in the log", lambda: sum(counted()) >= FLOOD)
    one_by_one, more = counted()
    assert one_by_one + more == FLOOD
    assert one_by_one < FLOOD / 4
    lines = [line for line in edge.output().splitlines() if "refused" in line]
    assert max(map(len, lines)) < 2 * limits.REFUSAL_CHARS_MAX
    assert all("%0aroot%1bx" in line for line in lines if "more" not in line)
    assert "hush" not in edge.output()
