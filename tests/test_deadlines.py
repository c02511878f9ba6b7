"""Every run ends in time, whoever is gone: no worker for a call, a worker that hangs, no inference at all, a
provider that says nothing, a trigger that cannot be read, a consumer that was deleted.
"""

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from msgspec import structs
from tapeline import counter, limits, subjects
from tapeline.append import Chain
from tapeline.clock import now_ms
from tapeline.events import (
    Answer,
    AnswerCall,
    AnyEvent,
    Conversation,
    Done,
    Event,
    Message,
    Step,
    Stop,
    Token,
    ToolCall,
    ToolProgress,
    ToolResult,
    ToolStarted,
    Unknown,
)
from tapeline.fold import State
from tapeline.record import Record
from tapeline.registry import Registry, ToolSpec
from tapeline.replay import load
from tapeline.tape import Tape

from services.inference import engine
from services.inference.decide import Budget, Trigger
from services.inference.engine import Engine
from services.inference.model import Models
from tests import PATIENT_S
from tests.client import Client, Posted, log_of, types
from tests.model_server import STREAM_HEAD, RawServer, sse
from tests.stack import Stack, until, wait_until

RUN_S = 6


@pytest.fixture
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A system whose runs have a few seconds. Only its edge is started."""
    stack = Stack(tmp_path_factory.mktemp("stack"), {"TAPELINE_RUN_DEADLINE_S": str(RUN_S)})
    try:
        stack.add_edge()
        yield stack
    finally:
        stack.stop()


@pytest.fixture
async def user(hasty: Stack) -> AsyncIterator[Client]:
    async with Client(hasty.url) as client:
        yield client


async def ended(stack: Stack, user: Client, conversation: str, posted: Posted, code: str) -> None:
    """The run ends with this error, at its deadline and not much later, and its log breaks no promise."""
    async with asyncio.timeout(RUN_S + PATIENT_S):
        received = await user.run(conversation, posted.run)
    error = json.loads(received[-1].data)
    assert error["type"] == "error", error
    assert error["code"] == code
    await log_of(stack.nats.url, conversation)


async def test_a_call_whose_workers_are_all_gone_ends_as_a_timeout_and_the_run_goes_on(fresh_stack: Stack) -> None:
    fresh_stack.start()
    async with Client(fresh_stack.url) as client:
        await client.answered("hello")  # the tools are on offer, and stay so for a while
        fresh_stack.workers[0].end(signal.SIGKILL)
        conversation = await client.create(tools=["clock"])
        posted = await client.post(conversation, "what time is it?")
        async with asyncio.timeout(60):
            received = await client.run(conversation, posted.run)
    (result,) = [json.loads(one.data) for one in received if one.event == "tool_result"]
    assert result["outcome"] == "timeout"
    assert result["is_error"]
    assert "no worker" in result["message"]
    assert received[-1].event == "done"
    await log_of(fresh_stack.nats.url, conversation)


async def test_calls_of_a_tool_that_has_gone_get_a_result_that_says_so_long_before_their_deadline(
    fresh_stack: Stack,
) -> None:
    fresh_stack.start()
    async with Client(fresh_stack.url) as client:
        asking = await client.create(tools=["draw_lots"])
        asked = await client.post(asking, "approval")
        async with client.events(asking, run=asked.run) as stream:
            await stream.until("tool_call")
        fresh_stack.workers[0].end(signal.SIGKILL)
        plain = await client.create(tools=["search_notes"])
        called = await client.post(plain, "search notes")  # on offer for a while
        assert (await client.decide(asking, asked.run, f"{asked.run}-1-0", approved=True)).status_code == 202
        both = await asyncio.gather(client.run(asking, asked.run), client.run(plain, called.run))
    for conversation, received in zip((asking, plain), both, strict=True):
        told = [json.loads(one.data) for one in received]
        (result,) = [event for event in told if event["type"] == "tool_result"]
        assert (result["outcome"], result["is_error"]) == ("error", True)
        assert "no worker offers" in result["message"]
        issued = [event for event in told if event["type"] == "tool_call"][-1]
        assert limits.TOOL_ABSENT_S * 1000 <= result["ts"] - issued["ts"] < issued["deadline"] - issued["ts"]
        assert told[-1]["type"] == "done"
        await log_of(fresh_stack.nats.url, conversation)


@pytest.fixture
async def between(tape: Tape, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Engine, list[Event]]]:
    """An engine, and what others append each time it has read a conversation; the last of it again and again."""
    said: list[Event] = []

    async def read(tape: Tape, conversation: str) -> State:
        state = await load(tape, conversation)
        if said:
            event = said.pop(0) if len(said) > 1 else said[0]
            kind = subjects.TOOL_DELTA if isinstance(event, ToolProgress) else subjects.MODEL_DELTA
            await Chain(tape, conversation, state.last_event_id).append(kind, event)
        return state

    monkeypatch.setattr(engine, "load", read)
    models = Models("demo", {})
    yield Engine(tape, Registry(tape), models, "demo", Budget(), "w"), said
    await models.aclose()


def progress() -> ToolProgress:
    return ToolProgress(run="r", ts=now_ms(), call="r-1-1", tool="b", text="chatter")


async def test_calls_are_settled_beside_others_that_say_something_all_the_time(
    tape: Tape, between: tuple[Engine, list[Event]]
) -> None:
    now = now_ms()
    of_step: dict[str, Any] = {"run": "r", "ts": now, "step": 1, "attempt": 1}
    chain = Chain(tape, "c", 0)
    calls = [AnswerCall(call=f"r-1-{number}", tool=tool, arguments={}) for number, tool in enumerate("ab")]
    deadlines = (now - int(limits.TOOL_GRACE_S * 1000), now + 60_000)
    await chain.commit(
        [
            (subjects.INPUT, Conversation(run="-", ts=now, owner="local")),
            (subjects.INPUT, Message(run="r", ts=now, content="go")),
            (subjects.MODEL, Step(**of_step, worker="w", trigger=2)),
            (subjects.MODEL, Answer(**of_step, finish="tool_calls", calls=calls)),
            *(
                (subjects.call(call.tool), ToolCall(**of_step, **structs.asdict(call), deadline=deadline))
                for call, deadline in zip(calls, deadlines, strict=True)
            ),
        ]
    )
    await chain.append(subjects.TOOL, ToolStarted(run="r", ts=now, call="r-1-1", tool="b", worker="t", attempt=1))
    working, said = between
    said.append(progress())
    async with asyncio.timeout(PATIENT_S):
        assert await working.react("c", Trigger(chain.last, 1))
    events = [record.event() for record in await tape.read("c")]
    assert [event.call for event in events if isinstance(event, ToolResult)] == ["r-1-0"]
    assert sum(isinstance(event, ToolProgress) for event in events) == 2, "it was read once to decide, and once more"


async def test_what_the_model_says_before_its_run_is_ended_is_in_the_answer(
    tape: Tape, between: tuple[Engine, list[Event]]
) -> None:
    now = now_ms()
    of_step: dict[str, Any] = {"run": "r", "ts": now, "step": 1, "attempt": 1}
    chain = Chain(tape, "c", 0)
    await chain.commit(
        [
            (subjects.INPUT, Conversation(run="-", ts=now, owner="local")),
            (subjects.INPUT, Message(run="r", ts=now, content="go")),
            (subjects.MODEL, Step(**of_step, worker="other", trigger=2)),
            (subjects.INPUT, Stop(run="r", ts=now)),
        ]
    )
    working, said = between
    said += [Token(**of_step, text="the last word"), progress()]
    async with asyncio.timeout(PATIENT_S):
        assert await working.react("c", Trigger(chain.last, 1))
    (answer,) = [event for record in await tape.read("c") if isinstance(event := record.event(), Answer)]
    assert answer.text == "the last word"


async def test_a_tool_is_not_absent_while_it_may_come_back(tape: Tape, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = ToolSpec(name="t", description="", parameters={})
    worker, reader = Registry(tape, "w"), Registry(tape)
    assert await reader.absent({"t"}) == set(), "we have only just connected"
    monkeypatch.setattr(limits, "TOOL_ABSENT_S", 0.0)
    monkeypatch.setattr(limits, "REGISTRY_CACHE_S", 0.0)
    assert await reader.absent({"t"}) == {"t"}
    await worker.announce([tool])
    assert await reader.absent({"t", "u"}) == {"u"}
    await worker.withdraw()
    assert await reader.offered() == {}
    assert await reader.absent({"t", "u"}) == {"u"}, "it has only just gone"
    assert await reader.absent(()) == set()


async def test_a_worker_that_hangs_in_a_call_does_not_keep_its_run_from_ending(hasty: Stack, user: Client) -> None:
    hasty.start_inference()
    worker = hasty.start_worker()
    conversation = await user.create(tools=["search_notes"])
    posted = await user.post(conversation, "search notes")
    async with user.events(conversation, run=posted.run) as stream:
        await stream.until("tool_started")
        worker.send(signal.SIGSTOP)
        received = await stream.rest()
    assert types(received)[-1] == "error"
    assert json.loads(received[-1].data)["code"] == "run_deadline"
    worker.send(signal.SIGCONT)  # what it says now comes too late to change anything
    await log_of(hasty.nats.url, conversation)


async def test_inference_that_was_down_for_the_whole_run_ends_it_when_it_is_back(hasty: Stack, user: Client) -> None:
    conversation = await user.create()
    posted = await user.post(conversation, "hello")
    message = (await events_of(hasty, conversation))[-1]
    assert isinstance(message, Message)
    await asyncio.to_thread(
        wait_until, "the deadline passed", lambda: time.time() * 1000 > message.ts + RUN_S * 1000, RUN_S + 5.0
    )
    hasty.start_inference()
    await ended(hasty, user, conversation, posted, "run_deadline")


async def events_of(stack: Stack, conversation: str) -> list[AnyEvent | Unknown]:
    tape = await Tape.open(stack.nats.url, "test")
    try:
        return [record.event() for record in await tape.read(conversation)]
    finally:
        await tape.close()


async def test_a_provider_that_stalls_without_closing_is_left_at_the_deadline(hasty: Stack, user: Client) -> None:
    async with RawServer(stall) as provider:
        hasty.start_inference(
            {
                "TAPELINE_MODEL": "openai:staller",
                "OPENAI_BASE_URL": f"{provider.url}/v1",
                "OPENAI_API_KEY": "test",
            }
        )
        conversation = await user.create()
        posted = await user.post(conversation, "hello")
        await ended(hasty, user, conversation, posted, "run_deadline")
        answer = [r.event() for r in await log_of(hasty.nats.url, conversation)][-2]
        assert isinstance(answer, Answer)
        assert (answer.finish, answer.text) == ("error", "begun")
        async with asyncio.timeout(5):
            await provider.hung_up.wait()


async def stall(_: object, writer: asyncio.StreamWriter) -> None:
    """Begins an answer and says no more."""
    writer.write(STREAM_HEAD + sse(CHUNK))
    await writer.drain()
    await asyncio.Event().wait()


CHUNK = {
    "id": "c",
    "object": "chat.completion.chunk",
    "created": 1,
    "model": "staller",
    "choices": [{"index": 0, "delta": {"role": "assistant", "content": "begun"}, "finish_reason": None}],
}


async def test_a_stop_closes_the_providers_connection_within_100_ms(hasty: Stack, user: Client) -> None:
    async with RawServer(stall) as provider:
        settings = {"TAPELINE_MODEL": "openai:x", "OPENAI_BASE_URL": f"{provider.url}/v1", "OPENAI_API_KEY": "test"}
        hasty.start_inference(settings)
        conversation = await user.create()
        posted = await user.post(conversation, "hello")
        async with user.events(conversation, run=posted.run) as stream:
            await stream.until("token")
            assert (await user.stop(conversation, posted.run)).status_code == 202
            stopped_s = time.monotonic()
            async with asyncio.timeout(PATIENT_S):
                await provider.hung_up.wait()
            print(f"the provider's connection was closed {(time.monotonic() - stopped_s) * 1000:.0f} ms after the 202")
            received = await stream.rest()
    assert types(received)[-3:] == ["stop", "answer", "done"]
    assert json.loads(received[-1].data)["reason"] == "stopped"
    await log_of(hasty.nats.url, conversation)


@pytest.mark.parametrize("ends_by", ["a stop", "cuts"])
async def test_tokens_count_whatever_becomes_of_the_answer(hasty: Stack, user: Client, ends_by: str) -> None:
    async def begin(server: object, writer: asyncio.StreamWriter) -> None:
        await (stall(server, writer) if ends_by == "a stop" else cut(server, writer))

    async with RawServer(begin) as provider:
        settings = {"TAPELINE_MODEL": "openai:x", "OPENAI_BASE_URL": f"{provider.url}/v1", "OPENAI_API_KEY": "test"}
        hasty.start_inference(settings)
        conversation = await user.create()
        asked = "What was said at length? " * 400
        posted = await user.post(conversation, asked)
        async with user.events(conversation, run=posted.run) as stream:
            await stream.until("token")
            if ends_by == "a stop":
                await user.stop(conversation, posted.run)
            await stream.rest()
    attempts = len([event for event in await events_of(hasty, conversation) if isinstance(event, Step)])
    assert attempts == (1 if ends_by == "a stop" else limits.STEP_ATTEMPTS_MAX)
    least = attempts * len(asked) // limits.TOKEN_BYTES
    used = await until("they are counted", lambda: tokens_used(hasty, least))
    assert used < 1.1 * least, "each request once"


async def tokens_used(stack: Stack, least: int) -> int:
    """By the one user, if it is that much."""
    tape = await Tape.open(stack.nats.url, "test")
    try:
        now = now_ms()
        minutes = (now - counter.MINUTE_MS, now)  # one may have begun meanwhile
        used = sum([await counter.used(tape, "local", counter.TOKENS, minute) for minute in minutes])
    finally:
        await tape.close()
    return used if used >= least else 0


async def cut(_: object, writer: asyncio.StreamWriter) -> None:
    """Begins an answer and hangs up."""
    writer.write(STREAM_HEAD + sse(CHUNK))
    await writer.drain()


async def test_a_trigger_that_is_no_event_becomes_a_dead_letter_and_ends_its_run(hasty: Stack, user: Client) -> None:
    hasty.start_inference()
    tape = await Tape.open(hasty.nats.url, "test")
    try:
        conversation = await user.create()
        garbage, last = b"\xff{not json", await tape.last(conversation)
        subject = tape.subject(conversation, subjects.INPUT)
        await tape.nc.jetstream().publish(subject, garbage)
        async with asyncio.timeout(PATIENT_S):
            while not (dead := await tape.nc.jetstream().stream_info(subjects.DEAD)).state.messages:
                await asyncio.sleep(0.05)
        letter = await tape.nc.jetstream().get_msg(subjects.DEAD, dead.state.last_seq)
        assert letter.data == garbage
        assert letter.headers is not None
        assert letter.headers["Tapeline-Subject"] == subject
        assert int(letter.headers["Tapeline-Sequence"]) > last
        posted = await user.post(conversation, "hello")  # the conversation goes on
        assert types(await user.run(conversation, posted.run))[-1] == "done"
    finally:
        await tape.close()


async def test_an_event_type_of_the_future_stops_nothing(hasty: Stack, user: Client) -> None:
    hasty.start_inference()
    tape = await Tape.open(hasty.nats.url, "test")
    try:
        conversation = await user.create()
        subject = tape.subject(conversation, subjects.INPUT)
        await tape.nc.jetstream().publish(subject, b'{"type":"reaction","run":"-","ts":1,"emoji":"x"}')
        posted = await user.post(conversation, "hello")
        assert types(await user.run(conversation, posted.run))[-1] == "done"
        assert b"emoji" in (await tape.read(conversation))[1].data
    finally:
        await tape.close()


async def test_a_consumer_that_somebody_deleted_is_said_so_and_never_a_silent_stall(hasty: Stack, user: Client) -> None:
    inference = hasty.start_inference()
    tape = await Tape.open(hasty.nats.url, "test")
    try:
        await tape.nc.jetstream().delete_consumer("TAPE_2", subjects.TRIGGERS)
    finally:
        await tape.close()
    wait_until("inference has ended", lambda: inference.popen.poll() is not None, limits.DRIFT_CHECK_S + 15)
    assert inference.popen.returncode == 78
    assert "consumer inference of TAPE_2 is missing" in inference.output()
    assert "Traceback" not in inference.output()
    response = await user.http.get("/readyz")
    assert response.status_code == 503
    assert "consumer inference of TAPE_2 is missing" in response.json()["why"]


async def test_a_conversation_of_100_messages_begins_its_next_step_without_reading_deltas(
    tape: Tape, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation, ts = "long", 1
    chain = Chain(tape, conversation, 0)
    await chain.append(subjects.INPUT, Conversation(run="-", ts=ts, owner="o"))
    for number in range(100):
        run = f"r{number}"
        await chain.append(subjects.INPUT, Message(run=run, ts=ts, content="and then?"))
        await chain.append(subjects.MODEL, Step(run=run, ts=ts, step=1, attempt=1, worker="w", trigger=chain.last))
        deltas = [(subjects.MODEL_DELTA, Token(run=run, ts=ts, step=1, attempt=1, text=f"{n} ")) for n in range(20)]
        await chain.commit(deltas)
        answer = Answer(run=run, ts=ts, step=1, attempt=1, finish="stop", text="…")
        done = Done(run=run, ts=ts, step=1, attempt=1, reason="stop")
        await chain.commit([(subjects.MODEL, answer), (subjects.MODEL, done)])
    read: list[str] = []
    real = tape._page

    async def counted(stream: str, request: dict[str, Any]) -> tuple[list[Record], bool]:
        page, more = await real(stream, request)
        read.extend(record.kind for record in page)
        return page, more

    monkeypatch.setattr(tape, "_page", counted)
    state = await load(tape, conversation)
    assert len(state.runs) == 100
    assert state.active is None
    assert len(read) == 1 + 100 * 4
    assert subjects.MODEL_DELTA not in read
