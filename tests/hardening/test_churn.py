"""Opened and closed, begun and stopped, thousands of times: what is left afterwards is what was there before."""

import asyncio
import collections
from typing import Final

from tests.client import Client, at_once, log_of, problem
from tests.hardening.attacker import get, wire
from tests.hardening.vitals import open_streams, streams_are
from tests.stack import Stack

OPENED: Final = 2_000
TOGETHER: Final = 50
ASKING: Final = 20  # at once: whether a loaded machine answers hundreds in time is not the question here
ENDLESS: Final = "long 60000"  # more than a minute: it goes on until it is stopped


async def test_two_thousand_streams_opened_and_closed(stack: Stack, client: Client) -> None:
    """Would leave a reader, a feed or a file behind for each."""
    conversations = [await client.create() for _ in range(20)]

    async def opened(number: int) -> None:
        conversation = conversations[number % len(conversations)]
        async with wire(stack.url) as attacker:
            await attacker.send(get(f"/v1/conversations/{conversation}/events"))
            await attacker.until(b"event: conversation\n")
            if number % 2:
                attacker.reset()

    await at_once(TOGETHER, (opened(number) for number in range(OPENED)))
    await streams_are(client, 0)


async def test_streams_closed_before_their_first_byte(stack: Stack, client: Client) -> None:
    """Would be opened for nobody, and stay open."""
    conversation = await client.create()
    request = get(f"/v1/conversations/{conversation}/events")

    async def opened(number: int) -> None:
        async with wire(stack.url) as attacker:
            await attacker.send(request)
            for _ in range(number % 5):
                await asyncio.sleep(0)
            attacker.reset()

    await at_once(TOGETHER, (opened(number) for number in range(1_000)))
    await streams_are(client, 0)


async def test_connections_opened_and_closed(stack: Stack, client: Client) -> None:
    """Would leave a file behind for each, or what it was going to say."""

    async def opened(number: int) -> None:
        async with wire(stack.url) as attacker:
            await attacker.send(get()[: number % 40])

    await at_once(TOGETHER, (opened(number) for number in range(OPENED)))
    assert await open_streams(client) == 0


async def test_one_id_created_and_deleted_at_once(stack: Stack, client: Client) -> None:
    """Would bring back what was deleted, or leave a conversation that nobody can have or delete."""
    name = "churned"
    path = f"/v1/conversations/{name}"
    found: collections.Counter[int] = collections.Counter()

    async def churned(number: int) -> None:
        if number % 3 == 0:
            found[(await client.http.post("/v1/conversations", json={"id": name})).status_code] += 1
        elif number % 3 == 1:
            found[(await client.http.delete(path)).status_code] += 1
        else:
            found[(await client.send(name, "long 3", on_busy="interrupt")).status_code] += 1

    await at_once(20, (churned(number) for number in range(300)))
    print(dict(found))
    assert set(found) <= {201, 202, 204, 404, 409}
    assert found[201]
    async with asyncio.timeout(20):
        while (await client.http.post("/v1/conversations", json={"id": name})).status_code != 201:
            await client.http.delete(path)
    posted = await client.post(name, "long 3")
    assert (await client.run(name, posted.run))[-1].event == "done"
    await log_of(stack.nats.url, name)


async def test_a_thousand_stops_of_one_run(stack: Stack, client: Client) -> None:
    """Would be a thousand facts, or a stop that comes after the end."""
    conversation, run = await client.ask(ENDLESS)
    async with client.events(conversation, run=run) as stream:
        await stream.until("token")
        answers = await at_once(ASKING, (client.stop(conversation, run) for _ in range(1_000)))
        assert {answer.status_code for answer in answers} == {202}
        assert (await stream.rest())[-1].event == "done"
    stops = [record for record in await log_of(stack.nats.url, conversation) if b'"type":"stop"' in record.data]
    assert len(stops) == 1


async def test_five_hundred_posts_of_one_key(stack: Stack, client: Client) -> None:
    """Would be five hundred runs, each of which costs money."""
    conversation = await client.create()
    posted = await at_once(ASKING, (client.post(conversation, "long 3", "key") for _ in range(500)))
    assert len(set(posted)) == 1
    assert (await client.run(conversation, posted[0].run))[-1].event == "done"
    records = await log_of(stack.nats.url, conversation)
    assert [b'"type":"message"' in record.data for record in records].count(True) == 1


async def test_a_busy_conversation_asked_by_two_hundred(stack: Stack, client: Client) -> None:
    """Would let more than one through, or keep all of them trying."""
    conversation = await client.create()
    answers = await at_once(ASKING, (client.send(conversation, ENDLESS) for _ in range(200)))
    [run] = [answer.json()["run"] for answer in answers if answer.status_code == 202]
    for answer in answers:
        assert answer.status_code == 202 or problem(answer, 409, "busy")["run"] == run
    assert (await client.stop(conversation, run)).status_code == 202
    await client.run(conversation, run)
    await log_of(stack.nats.url, conversation)


async def test_runs_interrupted_by_each_other(stack: Stack, client: Client) -> None:
    """Would leave a run without an end: each interrupts the one before while others do so too."""
    conversation = await client.create()
    runs = await at_once(5, (client.post(conversation, "long 50", on_busy="interrupt") for _ in range(20)))
    assert len({posted.run for posted in runs}) == 20
    last = max(runs, key=lambda posted: posted.event_id).run
    assert (await client.stop(conversation, last)).status_code == 202
    for posted in runs:
        assert (await client.run(conversation, posted.run))[-1].event == "done"
    await log_of(stack.nats.url, conversation)
