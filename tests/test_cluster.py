"""Promises 1, 2, 5 and 8 on three NATS servers with every stream on all of them: one is killed, cut off or restarted
while people talk, and still every run ends, every reader has exactly the log, and what was acknowledged is in it.

The longest silence a reader met is printed, with the seed.
"""

import asyncio
import os
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Final

import pytest
from tapeline import events, subjects
from tapeline.append import Chain
from tapeline.clock import now_ms
from tapeline.follow import follow
from tapeline.record import Record
from tapeline.tape import Tape

from tests.chaos import World
from tests.client import Client, as_received, stored
from tests.cluster import NODES, Cluster
from tests.stack import POLL_S, Stack

SHARDS: Final = 4
PEOPLE: Final = 2 * SHARDS
WORDS: Final = 400  # of an answer that takes eight seconds
EVENTS: Final = 100  # of one writer
ENDED_S: Final = 60.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def stack(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Two edges and two inference workers on the cluster, provisioned while it was electing its first leaders."""
    env = {"TAPELINE_REPLICAS": str(NODES), "TAPELINE_DEMO_DELAY_MS": "20"}
    stack = Stack(tmp_path_factory.mktemp("stack"), env, cluster)
    try:
        stack.start()
        stack.start_inference()
        stack.add_edge()
        yield stack
    finally:
        stack.stop()


def conversation_in(shard: int, name: str) -> str:
    """A conversation's id that belongs to this shard."""
    return next(one for number in range(1_000) if subjects.shard(one := f"{name}-{number}", SHARDS) == shard)


class Talk(World):
    """People talking in all shards, over these edges."""

    def __init__(self, folder: Path, seed: int, cluster: Cluster, stack: Stack, edges: Sequence[int]) -> None:
        super().__init__(folder, seed, stack, edges)
        self.cluster = cluster
        self.names = [conversation_in(number % SHARDS, f"{seed:x}-{number}") for number in range(PEOPLE)]

    @asynccontextmanager
    async def asking(self, saying: str) -> AsyncIterator[None]:
        """Everybody says this; left when everybody has the whole answer and the cluster is whole. Then nothing may
        have been lost."""
        async with asyncio.timeout(ENDED_S), asyncio.TaskGroup() as group:
            for name in self.names:
                group.create_task(self.use(name, [saying], stops=0))
            yield
        await self.cluster.settled()
        print(self.report)
        assert self.report.violations == [], self.report
        assert self.report.runs == {"stop": PEOPLE}, self.report

    @asynccontextmanager
    async def in_mid_answer(self, words: int = WORDS) -> AsyncIterator[None]:
        """As `asking`; entered while everybody is being answered."""
        async with self.asking(f"long {words}"):
            while list(self.doing.values()).count("token") < PEOPLE:
                await asyncio.sleep(POLL_S)
            yield


@pytest.fixture
async def talk(cluster: Cluster, stack: Stack, tmp_path: Path) -> AsyncIterator[Talk]:
    """People on two edges that know all servers; the cluster is whole before and after."""
    seed = int(os.environ.get("TAPELINE_TEST_SEED") or random.SystemRandom().randrange(2**32))
    print(f"TAPELINE_TEST_SEED={seed}")
    await cluster.settled()
    try:
        yield Talk(tmp_path, seed, cluster, stack, (0, 1))
    finally:
        cluster.heal()


def token(number: int) -> events.Token:
    return events.Token(run="r", ts=number, step=1, attempt=1, text=str(number))


def edge_on(stack: Stack, server: int, cluster: Cluster) -> int:
    """A further edge that is told of one server only, and so is connected to it; its number."""
    return stack.add_edge({"TAPELINE_NATS_URL": cluster.nodes[server].url_for("edge")})


# Servers that die


async def test_a_leader_is_killed_in_mid_answer(cluster: Cluster, talk: Talk) -> None:
    async with talk.in_mid_answer():
        cluster.nodes[await cluster.leader("TAPE_0")].kill()


async def test_a_consumers_leader_is_killed_before_anybody_asks(cluster: Cluster, talk: Talk) -> None:
    """What asks for triggers waits at a server that is gone, and has to ask again elsewhere."""
    cluster.nodes[await cluster.leader("TAPE_0", subjects.TRIGGERS)].kill()
    async with talk.asking("parallel"):
        pass


async def test_every_server_is_restarted_in_turn_in_mid_answer(cluster: Cluster, talk: Talk) -> None:
    async with talk.in_mid_answer(2 * WORDS):
        for node in cluster.nodes:
            assert talk.doing, "everybody had the answer already, so this was no test"
            node.stop()
            await cluster.settled()


async def test_what_was_acknowledged_and_what_was_scheduled_survive_their_leader(cluster: Cluster, talk: Talk) -> None:
    shard, conversation = 0, conversation_in(0, talk.names[0])
    writer, reader = await Tape.open(cluster.url, "writer"), await Tape.open(cluster.url, "reader")
    try:
        chain = Chain(writer, conversation, 0)
        await writer.set_alarm(conversation, "r", now_ms() + 1_000)
        async with asyncio.timeout(ENDED_S), aclosing(follow(reader, conversation)) as pages:
            acknowledged = []
            for number in range(EVENTS):
                if number == EVENTS // 2:
                    cluster.nodes[await cluster.leader("TAPE_0")].kill()
                acknowledged.append(await chain.append(subjects.MODEL_DELTA, token(number)))
            followed: list[Record] = []
            while len(followed) < EVENTS:
                followed += await anext(pages)
            while not await reader.stored(subjects.WAKES, subjects.due(shard, conversation)):
                await asyncio.sleep(POLL_S)
        assert [record.seq for record in followed] == acknowledged
        assert [record.event() for record in await reader.read(conversation)] == [token(n) for n in range(EVENTS)]
    finally:
        await writer.close()
        await reader.close()


# Servers that are cut off


async def test_a_leader_is_cut_off_in_mid_answer(cluster: Cluster, talk: Talk) -> None:
    """For some seconds there are two: one that knows, and one that does not."""
    async with talk.in_mid_answer():
        was = await cluster.leader("TAPE_0")
        cluster.cut(was)
        others = [number for number in range(NODES) if number != was]
        while await cluster.leader("TAPE_0", asked=others) == was:
            await asyncio.sleep(POLL_S)
        cluster.heal()


async def test_the_server_of_an_edge_is_cut_off_in_mid_answer(cluster: Cluster, stack: Stack, talk: Talk) -> None:
    """Nothing heals before everybody has the answer, so the edge has to go elsewhere."""
    server = (await cluster.leader("TAPE_0") + 1) % NODES
    talk.edges = [edge_on(stack, server, cluster)]
    async with talk.in_mid_answer():
        cluster.cut(server)
        while len(talk.report.stalls_s) < PEOPLE:
            await asyncio.sleep(POLL_S)
        cluster.heal()


async def test_live_copies_that_never_came_are_read_from_history(cluster: Cluster, stack: Stack, talk: Talk) -> None:
    leader = await cluster.leader("TAPE_0")
    server = (leader + 1) % NODES
    async with Client(stack.edge_url(edge_on(stack, server, cluster))) as client:
        conversation = await client.create(id=conversation_in(0, talk.names[0]))
        tape = await Tape.open(cluster.nodes[leader].url, "writer")
        try:
            chain = Chain(tape, conversation, await tape.last(conversation))
            async with asyncio.timeout(ENDED_S), client.events(conversation) as stream, asyncio.TaskGroup() as group:
                for number in range(EVENTS):
                    await chain.append(subjects.MODEL_DELTA, token(number))
                had = len(await stream.take(1 + EVENTS))
                cluster.cut(server, leader)
                taking = group.create_task(stream.take(1 + 2 * EVENTS))
                for number in range(EVENTS, 2 * EVENTS):
                    await chain.append(subjects.MODEL_DELTA, token(number))
                assert len(stream.received) == had, "the copies arrived, so this was no test"
                cluster.heal()
                received = await taking
            assert received == as_received(await tape.read(conversation))
        finally:
            await tape.close()


async def test_an_edge_sees_at_once_what_was_listed_renamed_or_deleted_on_another(stack: Stack) -> None:
    async with Client(stack.edge_url(0)) as one, Client(stack.edge_url(1)) as other:
        for number in range(10):
            here, there = (one, other) if number % 2 else (other, one)
            conversation = await here.create(title="first")
            path = f"/v1/conversations/{conversation}"
            assert await newest_in(there) == (conversation, "first")
            assert (await there.http.patch(path, json={"title": "second"})).status_code == 200
            assert await newest_in(here) == (conversation, "second")
            assert (await here.snapshot(conversation))["title"] == "second"
            async with there.events(conversation) as stream, asyncio.timeout(ENDED_S):
                await stream.until("title")
                assert (await here.http.delete(path)).status_code == 204
                assert (await there.http.get(path)).status_code == 404
                assert (await newest_in(there))[0] != conversation
                assert (await stream.rest())[-1].event == "deleted"
            async with asyncio.timeout(ENDED_S):
                while await stored(stack.nats.url, conversation):
                    await asyncio.sleep(POLL_S)


async def newest_in(client: Client) -> tuple[str, str]:
    """The first conversation in the user's list, and its title."""
    listed = (await client.http.get("/v1/conversations")).json()["conversations"]
    return (listed[0]["id"], listed[0]["title"]) if listed else ("", "")
