"""Calls that wait for a person, on the real stack: approved, edited, denied, expired, stopped, decided by two at once;
through the death of everything, and for longer than their run may take.
"""

import asyncio
import json
import signal
import time
from typing import Any

from tapeline import limits

from tests.client import Client, Received, log_of, problem
from tests.stack import Stack, wait_until

# The demo calls clock, which is there at once, and beside it draw_lots, which asks for approval.
SAID = "approval, please"
RUN_S = 6
APPROVAL_S = 8
RACES = 8


async def asked(client: Client, **about: Any) -> tuple[str, str, str]:
    """A run that waits for nothing but a decision: the conversation, the run, and the call."""
    conversation = await client.create(**about)
    run = (await client.post(conversation, SAID)).run
    async with client.events(conversation, run=run) as stream:
        await stream.until("tool_result")
    return conversation, run, f"{run}-1-1"


async def state_of(client: Client, conversation: str) -> dict[str, Any]:
    """The call in the conversation's snapshot."""
    calls = (await client.snapshot(conversation))["runs"][0]["steps"][0]["calls"]
    found: dict[str, Any] = calls[1]
    return found


def told(received: list[Received], kind: str, call: str) -> list[dict[str, Any]]:
    """The events of this type about the call."""
    events = [json.loads(one.data) for one in received if one.event == kind]
    return [event for event in events if event.get("call") == call]


async def test_a_call_waits_is_edited_and_approved_and_everybody_sees_it(
    stack: Stack, clients: tuple[Client, Client]
) -> None:
    here, there = clients
    conversation, run, call = await asked(here)
    waiting = await state_of(there, conversation)
    assert (waiting["status"], waiting["needs_approval"], waiting["approved"]) == ("waiting", True, None)
    problem(await there.send(conversation, "and?"), 409, "busy")
    queued = await there.post(conversation, "long 3", on_busy="queue")

    for wrong in (
        {},
        {"approved": None},
        {"approved": True, "arguments": ["tea"]},
        {"approved": True, "arguments": {"names": "x" * limits.ARGUMENTS_BYTES_MAX}},
        {"approved": True, "arguments": {"names": json.loads("[" * 64 + "]" * 64)}},
        {"approved": True, "by": "somebody else"},
        {"approved": False, "arguments": {}},
        {"approved": False, "reason": "x" * (limits.TITLE_CHARS_MAX + 1)},
    ):
        problem(await here.decide(conversation, run, call, **wrong), 422, "invalid")
    yes = {"approved": True}
    problem(await here.decide("none", run, call, **yes), 404, "not_found")
    problem(await here.decide(conversation, "none", call, **yes), 404, "unknown_run")
    problem(await here.decide(conversation, run, "none", **yes), 404, "unknown_call")
    problem(await here.decide(conversation, run, f"{run}-1-0", **yes), 409, "not_waiting")

    async with here.events(conversation, run=run) as stream:
        answer = await there.decide(conversation, run, call, **yes, arguments={"names": ["water"]}, reason="healthy")
        assert (answer.status_code, answer.json()) == (202, {"run": run, "call": call, "approved": True})
        received = await stream.rest()
    problem(await here.decide(conversation, run, call, approved=False), 409, "already_decided")
    (approval,) = told(received, "approval", call)
    assert (approval["by"], approval["reason"], approval["approved"]) == ("local", "healthy", True)
    first, second = told(received, "tool_call", call)
    assert (first["arguments"], second["arguments"]) == ({"names": ["tea", "coffee"]}, {"names": ["water"]})
    assert first["deadline"] - first["ts"] == limits.APPROVAL_S * 1000
    assert second["deadline"] - second["ts"] == limits.TOOL_TIMEOUT_S_DEFAULT * 1000
    (result,) = told(received, "tool_result", call)
    assert (result["outcome"], result["content"]) == ("ok", {"drawn": "water"})
    done = await state_of(here, conversation)
    assert (done["status"], done["approved"], done["decided_by"], done["reason"]) == ("done", True, "local", "healthy")
    answer_text = [json.loads(one.data)["text"] for one in received if one.event == "answer"][-1]
    assert "other arguments" in answer_text, "the model is told what was run"
    assert (await there.run(conversation, queued.run))[-1].event == "done"
    await log_of(stack.nats.url, conversation)


async def test_of_decisions_that_race_over_two_edges_one_counts(stack: Stack, clients: tuple[Client, Client]) -> None:
    async def race(number: int) -> bool:
        conversation, run, call = await asked(clients[0])
        answers = await asyncio.gather(
            clients[number % 2].decide(conversation, run, call, approved=True, arguments={"names": ["a"]}),
            clients[1 - number % 2].decide(conversation, run, call, approved=False, reason="b"),
            clients[number % 2].decide(conversation, run, call, approved=True, arguments={"names": ["c"]}),
        )
        (winner,) = [index for index, answer in enumerate(answers) if answer.status_code == 202]
        for answer in answers:
            if answer.status_code != 202:
                problem(answer, 409, "already_decided")
        received = await clients[0].run(conversation, run)
        assert len(told(received, "approval", call)) == 1
        (result,) = told(received, "tool_result", call)
        assert (result["outcome"], result.get("content")) == [
            ("ok", {"drawn": "a"}),
            ("denied", None),
            ("ok", {"drawn": "c"}),
        ][winner]
        if winner == 1:
            assert result["message"] == "the user denied this call: b"
            assert not told(received, "tool_started", call)
        assert received[-1].event == "done"
        await log_of(stack.nats.url, conversation)
        return winner == 1

    print("denied:", await asyncio.gather(*(race(number) for number in range(RACES))))


async def test_a_stop_while_a_call_waits_settles_it_and_it_can_no_more_be_approved(
    stack: Stack, client: Client
) -> None:
    conversation, run, call = await asked(client)
    assert (await client.stop(conversation, run)).status_code == 202
    received = await client.run(conversation, run)
    (result,) = told(received, "tool_result", call)
    assert result["outcome"] == "stopped"
    assert json.loads(received[-1].data)["reason"] == "stopped"
    problem(await client.decide(conversation, run, call, approved=True), 409, "not_waiting")
    await log_of(stack.nats.url, conversation)


async def test_it_waits_through_the_end_of_everything_and_for_longer_than_its_run_may_take(fresh_stack: Stack) -> None:
    stack = fresh_stack
    stack.env["TAPELINE_RUN_DEADLINE_S"] = str(RUN_S)
    stack.start()
    async with Client(stack.url) as client:
        kept, kept_run, kept_call = await asked(client)
        stack.inferences[0].end(signal.SIGTERM)
        stack.start_inference({"TAPELINE_APPROVAL_S": str(APPROVAL_S)})
        expiring, expiring_run, expiring_call = await asked(client)
    began_s = time.monotonic()
    for process in (*stack.inferences, *stack.workers):
        process.end(signal.SIGKILL)
    stack.kill_edge()
    stack.nats.kill()
    stack.nats.start()
    stack.start_edge()
    stack.start_inference()
    stack.start_worker()
    async with Client(stack.url) as client:
        assert (await state_of(client, kept))["status"] == "waiting"
        await asyncio.to_thread(
            wait_until, "the run's own time is over", lambda: time.monotonic() > began_s + RUN_S, RUN_S + 5.0
        )
        async with asyncio.timeout(APPROVAL_S + 15):
            received = await client.run(expiring, expiring_run)
        (result,) = told(received, "tool_result", expiring_call)
        assert (result["outcome"], result["is_error"]) == ("timeout", True)
        assert "nobody decided" in result["message"]
        assert received[-1].event == "done"
        problem(await client.decide(expiring, expiring_run, expiring_call, approved=True), 409, "not_waiting")
        answer = await client.decide(kept, kept_run, kept_call, approved=True, arguments={"names": ["water"]})
        assert answer.status_code == 202
        received = await client.run(kept, kept_run)
    (result,) = told(received, "tool_result", kept_call)
    assert (result["outcome"], result["content"]) == ("ok", {"drawn": "water"})
    done = json.loads(received[-1].data)
    assert (done["type"], done["reason"]) == ("done", "stop")
    assert done["duration_ms"] > RUN_S * 1000
    for conversation in (kept, expiring):
        await log_of(stack.nats.url, conversation)
