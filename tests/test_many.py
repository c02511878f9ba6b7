"""Many conversations at once over several of everything: nobody gets an event that is not theirs, and nobody misses
one of their own.
"""

import asyncio
import json
import time

import pytest

from tests.client import SSE, Client, Received, as_received, log_of, types
from tests.stack import Stack

CONVERSATIONS = 50
ENDED_S = 60.0


@pytest.fixture
def doubled(fresh_stack: Stack) -> Stack:
    """Two edges, two inference processes, two tool workers."""
    fresh_stack.start().add_edge()
    fresh_stack.start_inference()
    fresh_stack.start_worker()
    return fresh_stack


async def conversation(number: int, here: Client, there: Client) -> tuple[str, list[Received], list[Received]]:
    """Asks for this number's thousandfold on one edge. The run as that edge's POST streams it, and as a reader on
    the other edge gets it."""
    name = await here.create(id=f"many-{number}")
    body = {"content": f"math: {number} * 1000"}
    async with here.stream("POST", f"/v1/conversations/{name}/messages", json=body, headers=SSE) as stream:
        [message] = await stream.take(1)
        run = json.loads(message.data)["run"]
        return name, *await asyncio.gather(stream.rest(), there.run(name, run))


async def test_every_reader_of_fifty_conversations_at_once_gets_exactly_its_log(doubled: Stack) -> None:
    began = time.monotonic()
    async with Client(doubled.edge_url(0)) as one, Client(doubled.edge_url(1)) as other, asyncio.timeout(ENDED_S):
        edges = [(one, other), (other, one)]
        read = await asyncio.gather(*(conversation(number, *edges[number % 2]) for number in range(CONVERSATIONS)))
    print(f"{CONVERSATIONS} runs in {time.monotonic() - began:.1f} s")

    logs = await asyncio.gather(*(log_of(doubled.nats.url, name) for name, _, _ in read))
    inferences, workers = set(), set()
    for number, ((_, posted, followed), log) in enumerate(zip(read, logs, strict=True)):
        expected = as_received(log)[1:]  # after the conversation's own event
        assert posted == followed == expected
        assert expected[-1].event == "done"
        assert types(expected).count("tool_result") == 1
        events = [json.loads(received.data) for received in expected]
        [result] = [event for event in events if event["type"] == "tool_result"]
        assert result["content"] == number * 1000
        assert f"`calculate` answered: {number * 1000}\n" in events[-2]["text"]
        inferences |= {event["worker"] for event in events if event["type"] == "step"}
        workers |= {event["worker"] for event in events if event["type"] == "tool_started"}
    assert len(inferences) == 2, "both inference processes had a part in it"
    assert len(workers) == 2, "both tool workers had a part in it"
