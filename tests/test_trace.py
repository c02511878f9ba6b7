"""One run is one trace, over every service it went through, and a trace repeats nothing that was said.

The collector is a real OTLP endpoint: it decodes what the services' own exporters send.
"""

import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, NamedTuple

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.client import Client, log_of
from tests.model_server import ModelServer, answers, refuses
from tests.stack import Stack, wait_until

WORD: Final = "zanzibar"  # it is said in every message, answer, argument, result and error
EDGE_KEY: Final = "key-of-the-edge-0123456789"
EDGE, INFERENCE, TOOLS = "tapeline-edge", "tapeline-inference", "tapeline-tools"


class Span(NamedTuple):
    """What is asked of a span here."""

    service: str
    name: str
    trace: str
    id: str
    parent: str
    conversation: str


class Collector:
    """An OTLP/HTTP endpoint that keeps all it is sent."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.spans: list[Span] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.take(body)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args: object) -> None:
                """Says nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def environ(self) -> dict[str, str]:
        """What makes a service send its spans here, at once."""
        return {
            "OTEL_TRACES_EXPORTER": "otlp",
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self._server.server_port}",
            "OTEL_BSP_SCHEDULE_DELAY": "50",
        }

    def __enter__(self) -> "Collector":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join(5)
        self._server.server_close()

    def take(self, body: bytes) -> None:
        self.bodies.append(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = _attributes(resource.resource)["service.name"]
            for scope in resource.scope_spans:
                for span in scope.spans:
                    conversation = _attributes(span).get("gen_ai.conversation.id", "")
                    ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
                    self.spans.append(Span(service, span.name, *ids, conversation))

    def of(self, conversation: str) -> list[Span]:
        """The spans that say they belong to a conversation."""
        return [span for span in self.spans if span.conversation == conversation]


def _attributes(owner: Any) -> dict[str, str]:
    return {pair.key: pair.value.string_value for pair in owner.attributes}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def model() -> Iterator[ModelServer]:
    with ModelServer() as server:
        yield server


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory, collector: Collector, model: ModelServer) -> Iterator[Stack]:
    """The whole of Tapeline, every service sending its spans to the collector."""
    env = {**collector.environ, **model.environ, "TAPELINE_MODEL": "openai:gpt-5-mini"}
    stack = Stack(tmp_path_factory.mktemp("stack"), {**env, "TAPELINE_API_KEYS": f"ada={EDGE_KEY}"})
    try:
        yield stack.start()
    finally:
        stack.stop()


async def run_of(stack: Stack, collector: Collector, said: str, end: str = "done") -> list[Span]:
    """The spans of one run from its message on, once there are as many as its log calls for."""
    async with Client(stack.url, EDGE_KEY) as client:
        conversation = await client.create()
        wait_until("the trace of the creation", lambda: bool(collector.of(conversation)))
        before = collector.of(conversation)
        run = (await client.post(conversation, said)).run
        received = await client.run(conversation, run)
    assert received[-1].event == end, received[-1]
    await log_of(stack.nats.url, conversation)
    count = Counter(one.event for one in received)
    ran = count["tool_started"]
    wakes = count["message"] + 2 * ran  # a call that a worker ran wakes inference by its claim and by its result
    expected = Counter({"post": 1, "react": wakes, "chat": count["step"], "execute_tool": ran})

    def ours() -> list[Span]:
        return collector.of(conversation)[len(before) :]

    wait_until(
        f"as many spans as {expected}",
        lambda: Counter(span.name.partition(" ")[0] for span in ours()) >= expected,
    )
    return ours()


# One trace


async def test_a_run_with_tools_is_one_trace_over_three_services(
    traced: Stack, collector: Collector, model: ModelServer
) -> None:
    calls = [("clock", {}), ("calculate", {"expression": "6 * 7"})]
    model.add(answers("one trace", "Good.", after_results=True), answers("one trace", calls=calls))
    spans = await run_of(traced, collector, "one trace")
    assert len({span.trace for span in spans}) == 1, spans
    assert {span.service for span in spans} == {EDGE, INFERENCE, TOOLS}
    known = {span.id: span for span in spans}
    roots = [span for span in spans if not span.parent]
    assert [(root.service, root.name) for root in roots] == [(EDGE, "post message")]
    assert all(span.parent in known for span in spans if span.parent), "the chain of parents has a hole"

    def line(span: Span) -> list[str]:
        return [*(line(known[span.parent]) if span.parent else []), span.name.partition(" ")[0]]

    first, second = sorted((line(span) for span in spans if span.name.startswith("chat")), key=len)
    assert first == ["post", "react", "chat"]
    # Whichever of the calls' events is handled when both have their results begins the next step.
    assert second in ([*first, "execute_tool", "react", "chat"], [*first, "react", "chat"])


async def test_the_number_of_spans_does_not_grow_with_the_answer(
    traced: Stack, collector: Collector, model: ModelServer
) -> None:
    model.add(answers("in short", "word " * 10), answers("at length", "word " * 2_000))
    short = await run_of(traced, collector, "in short")
    long = await run_of(traced, collector, "at length")
    assert Counter(span.name for span in short) == Counter(span.name for span in long)


# Nothing of what was said


async def test_no_span_repeats_what_was_said_or_a_key(traced: Stack, collector: Collector, model: ModelServer) -> None:
    calls: list[tuple[str, dict[str, Any]]] = [
        ("search_notes", {"query": WORD, "seconds": 0}),
        ("fail", {"message": WORD}),
        (WORD, {"word": WORD}),
    ]
    model.add(
        answers(f"tell of {WORD}", f"I know {WORD}.", after_results=True),
        answers(f"tell of {WORD}", f"Let me see: {WORD}", thinking=f"{WORD}?", calls=calls),
        refuses(f"refuse {WORD}", 400, f"we do not talk of {WORD}"),
    )
    await run_of(traced, collector, f"tell of {WORD}")
    await run_of(traced, collector, f"refuse {WORD}", end="error")
    secrets = [WORD, EDGE_KEY, *(value for name, value in model.environ.items() if name.endswith("_KEY"))]
    sent = b"".join(collector.bodies)
    assert [secret for secret in secrets if secret.encode() in sent] == []
