"""Whatever process is killed or paused, at whatever moment: runs go on or end clearly, and nobody misses anything.

Every conversation here has a reader that resumes as a browser would. In the end it must have exactly its log, byte
for byte, and the log must break no promise (`log_of`). Moments are chosen by a seed, which a failing test prints;
TAPELINE_TEST_SEED repeats it.
"""

import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import signal
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Final

import httpx
import pytest
from tapeline import limits

from tests.client import SSE, Client, Received, Stream, as_received, log_of
from tests.stack import Process, Stack, until

DEMO_DELAY_MS: Final = 20  # between two tokens: time enough to kill somebody between them
BUSY_S: Final = 10.0  # by which a machine that runs all of this at once is late
TAKEOVER_S: Final = limits.ACK_WAIT_S + BUSY_S
HANDOVER_S: Final = limits.ACK_WAIT_S - limits.IN_PROGRESS_S - 1.0  # sooner than if nobody had handed it over
ENDED_S: Final = 60.0
POLL_S: Final = 0.01
RECONNECT_S: Final = 0.2
TERMINAL: Final = ("done", "error")
DELTAS: Final = ("token", "thinking", "tool_input")


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The whole of Tapeline, whose parts come and go."""
    stack = Stack(tmp_path_factory.mktemp("stack"), {"TAPELINE_DEMO_DELAY_MS": str(DEMO_DELAY_MS)})
    try:
        stack.add_edge()
        yield stack
    finally:
        stack.stop()


@pytest.fixture
def chance() -> random.Random:
    seed = os.environ.get("TAPELINE_TEST_SEED") or str(random.SystemRandom().randrange(2**32))
    print(f"TAPELINE_TEST_SEED={seed}")
    return random.Random(seed)


class Talk:
    """One run, and its reader."""

    def __init__(self, system: Stack, conversation: str, run: str) -> None:
        self.system = system
        self.conversation = conversation
        self.run = run
        self.received: list[Received] = []
        self.resumes = -1
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        """Reads to the end, resuming after the last event it has whenever the edge is gone."""
        while not self.ended:
            self.resumes += 1
            with contextlib.suppress(httpx.TransportError):
                await self._connect()
            if not self.ended:
                await asyncio.sleep(RECONNECT_S)

    async def _connect(self) -> None:
        cursor = {"Last-Event-ID": str(self.received[-1].id)} if self.received else {}
        path = f"/v1/conversations/{self.conversation}/events"
        async with (
            Client(self.system.url) as client,
            client.http.stream("GET", path, params={"run": self.run}, headers={**SSE, **cursor}) as response,
        ):
            if response.status_code == 503:  # NATS is away
                return
            assert response.status_code == 200, response.status_code
            stream = Stream(response)
            before = len(self.received)
            while await stream.more():
                self.received[before:] = stream.received

    async def aclose(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    @property
    def ended(self) -> bool:
        return bool(self.received) and self.received[-1].event in TERMINAL

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """What it has been told so far, by type."""
        return [json.loads(one.data) for one in self.received if one.event in kinds]

    def count(self, kind: str) -> int:
        return sum(one.event == kind for one in self.received)

    async def reach(self, kind: str, count: int) -> None:
        """Waits for so many events of a type."""
        await until(f"{count} × {kind} in {self.conversation}", lambda: self.count(kind) >= count)

    @property
    def claims(self) -> list[dict[str, Any]]:
        return self.events("step")

    @property
    def worker(self) -> str:
        """Who works on it."""
        return str(self.claims[-1]["worker"])

    async def judged(self, within_s: float = ENDED_S) -> str:
        """Waits for its end; its type. Fails where reader, log and snapshot do not agree."""
        await until(f"{self.conversation} has ended", lambda: self.ended or self._task.done(), within_s)
        await self._task
        log = await log_of(self.system.nats.url, self.conversation)
        assert self.received == as_received(log, self.run)
        async with Client(self.system.url) as client:
            snapshot = await client.snapshot(self.conversation)
        [run] = snapshot["runs"]
        answers = self.events("answer")
        assert [step["text"] for step in run["steps"]] == [answer.get("text", "") for answer in answers]
        assert self._shown() == [answer.get("text", "") for answer in answers]
        if failed := self.events("error"):
            print(f"{self.conversation} ended as {failed}")
        return self.received[-1].event

    def _shown(self) -> list[str]:
        """Each step's text, as a page shows it that does no more than what `step` events tell it to."""
        texts: dict[int, str] = {}
        for event in self.events("step", "token"):
            if event["type"] == "step":
                texts[event["step"]] = event.get("text", "")
            else:
                texts[event["step"]] += event["text"]
        return list(texts.values())


class Talks:
    """The runs of one test."""

    def __init__(self, system: Stack) -> None:
        self.system = system
        self.all: list[Talk] = []

    async def begin(self, said: str, count: int = 1) -> list[Talk]:
        """As many new conversations in which this is said."""
        async with Client(self.system.url) as client:
            asked = await asyncio.gather(*(client.ask(said) for _ in range(count)))
        begun = [Talk(self.system, *one) for one in asked]
        self.all += begun
        return begun

    @property
    def seen(self) -> int:
        """Events that their readers have."""
        return sum(len(talk.received) for talk in self.all)

    async def reach(self, seen: int) -> None:
        """Waits for so many events, or until there are no more to come."""
        await until(f"{seen} events", lambda: self.seen >= seen or all(talk.ended for talk in self.all), ENDED_S)

    async def begin_on(self, worker: str, said: str) -> Talk:
        """A new conversation in which this is said, the run having gone to this worker."""

        async def begun() -> Talk | None:
            [talk] = await self.begin(said)
            await talk.reach("step", 1)
            return talk if talk.worker == worker else None

        talk: Talk = await until(f"a run goes to {worker}", begun)
        return talk

    async def end(self) -> list[str]:
        """How they all ended, having been judged."""
        return await asyncio.gather(*(talk.judged() for talk in self.all))


@pytest.fixture
async def talks(system: Stack, chance: random.Random) -> AsyncIterator[Talks]:
    if system.edges[0] is None:
        system.start_edge()
    talks = Talks(system)
    yield talks
    for talk in talks.all:
        await talk.aclose()


def running(processes: Sequence[Process]) -> list[Process]:
    return [process for process in processes if process.popen.poll() is None]


def inferences(system: Stack, count: int) -> list[Process]:
    """As many inference processes as this, and no more."""
    alive = running(system.inferences)
    for one in alive[count:]:
        one.end()
    return [*alive[:count], *(system.start_inference() for _ in range(count - len(alive)))]


def tool_workers(system: Stack, count: int) -> dict[str, Process]:
    """As many tool workers as this, by the pool that each one names in the log."""
    for one in running(system.workers):
        one.end()
    pools = [f"pool-{len(system.workers) + number}" for number in range(count)]
    return {pool: system.start_worker({"TAPELINE_POOL": pool}) for pool in pools}


def worker_of(process: Process) -> str:
    """An inference process's name in the log."""
    said = re.search(r"inference ready: ([^,]+),", process.output())
    assert said
    return said[1]


def process_of(talk: Talk, processes: Sequence[Process]) -> Process:
    [found] = [one for one in processes if worker_of(one) == talk.worker]
    return found


def words(talk: Talk, count: int) -> bool:
    """Whether its whole answer is the words it asked for, each once: nothing lost or doubled in a takeover."""
    text: str = talk.events("answer")[-1]["text"]
    return text.endswith(" " + " ".join(f"word{number}" for number in range(1, count + 1)))


def assert_taken_over(talk: Talk, lost: str) -> float:
    """Of all its steps one was taken over from `lost`, and the claim names all that it supersedes and no more. When,
    in ms."""
    [(first, second)] = [(one, other) for one, other in itertools.pairwise(talk.claims) if one["step"] == other["step"]]
    assert first["worker"] == lost != second["worker"]
    assert (first["attempt"], second["attempt"]) == (1, 2)
    superseded = [
        one.id
        for one, event in ((one, json.loads(one.data)) for one in talk.received if one.event in ("step", *DELTAS))
        if (event["step"], event["attempt"]) == (first["step"], 1)
    ]
    assert second["supersedes"] == {"attempt": 1, "first": superseded[0], "last": superseded[-1]}
    assert second["resume"] == ("continue" if second.get("text") else "restart")
    return float(second["ts"])


async def over_both(talks: Talks, said: str, processes: Sequence[Process], tokens: int) -> list[Talk]:
    """Runs that are so many tokens into their answer, at least one of them on each inference process."""
    begun = await talks.begin(said, 4)
    for talk in begun:
        await talk.reach("step", 1)
    for process in processes:
        if all(process_of(talk, processes) is not process for talk in begun):
            begun.append(await talks.begin_on(worker_of(process), said))
    for talk in begun:
        await talk.reach("token", tokens)
    return begun


# The edge


async def test_an_edge_killed_mid_answer_costs_its_readers_nothing(
    system: Stack, talks: Talks, chance: random.Random
) -> None:
    inferences(system, 1)
    begun = await talks.begin("long 500", 5)  # so long that no run ends before the second kill
    for _ in range(2):
        sight = chance.choice(begun)
        await sight.reach("token", sight.count("token") + chance.randint(5, 40))
        system.kill_edge()
        system.start_edge()
    assert await talks.end() == ["done"] * 5
    assert all(talk.resumes >= 2 for talk in begun)
    assert all(len(talk.claims) == 1 and words(talk, 500) for talk in begun), "the run did not even notice"


# NATS


async def test_nats_killed_at_any_moment_loses_nothing_it_has_acknowledged(
    system: Stack, talks: Talks, chance: random.Random
) -> None:
    inferences(system, 2)
    tool_workers(system, 1)
    for said in ("long 250", "steps", "parallel", "fail", "long 80"):
        await talks.begin(said, 2)
    gone = []
    for _ in range(4):
        await talks.reach(talks.seen + chance.randint(1, 150))
        system.nats.kill()
        killed = time.monotonic()
        await asyncio.sleep(chance.uniform(0, 1.5))  # how long it stays away is part of the fault
        system.nats.start()
        await talks.reach(talks.seen + 1)
        gone.append(time.monotonic() - killed)
    ends = await talks.end()
    print(f"ended {ends}; events came again after {[round(one, 1) for one in gone]} s")
    assert all(talk.events("done") or talk.events("error")[0]["message"] for talk in talks.all)
    assert ends.count("done") >= len(ends) // 2


# Inference


async def test_inference_killed_in_any_phase_is_replaced_within_seconds(
    system: Stack, talks: Talks, chance: random.Random
) -> None:
    """Mid-thinking, mid-token, and while its run waits for tools: one kill, many runs."""
    processes = inferences(system, 2)
    tool_workers(system, 1)
    answering = await over_both(talks, "long 350", processes, chance.randint(1, 60))
    waiting = await talks.begin("weather", 3)
    for talk in waiting:
        await talk.reach("tool_progress", 1)
    [thinking] = await talks.begin("hello")
    await thinking.reach("thinking", chance.randint(1, 8))
    victim, lost = process_of(thinking, processes), thinking.worker
    victim.end(signal.SIGKILL)
    killed_ms = time.time() * 1000
    assert not any(talk.count("tool_result") for talk in waiting)
    orphans = [talk for talk in [*answering, thinking] if talk.worker == lost]
    assert len(orphans) >= 2, "in two phases"
    assert await talks.end() == ["done"] * len(talks.all)

    took = sorted((assert_taken_over(talk, lost) - killed_ms) / 1000 for talk in orphans)
    print(f"takeovers after {[round(one, 1) for one in took]} s")
    assert took[-1] <= TAKEOVER_S
    # On a busy machine it may have thought all it had to before we got round to it.
    lost_step = [one for one in thinking.events("token", "tool_input") if (one["step"], one["attempt"]) == (1, 1)]
    had_spoken = bool(lost_step) and all(one["type"] == "token" for one in lost_step)
    assert thinking.claims[1]["resume"] == ("continue" if had_spoken else "restart")
    for talk in answering:
        assert len(talk.claims) == (2 if talk in orphans else 1)
        assert words(talk, 350), "one answer, though two workers wrote it"
    for talk in waiting:
        assert [one["attempt"] for one in talk.claims] == [1, 1], "a run that waits for tools holds no worker"


async def test_inference_killed_in_its_last_words_ends_the_run_once(system: Stack, talks: Talks) -> None:
    """Just before the terminal event: it is written by the one or by the other, never by both or by none."""
    processes = inferences(system, 2)
    talk, other, third = await talks.begin("long 60", 3)
    await until("its last words", lambda: any(b"word59" in one.data for one in talk.received))
    process_of(talk, processes).end(signal.SIGKILL)
    assert await talks.end() == ["done"] * 3
    for one in (talk, other, third):
        assert one.count("done") == one.count("answer") == 1
        assert words(one, 60)
    print(f"attempts: {[len(one.claims) for one in (talk, other, third)]}")


async def test_inference_that_is_asked_to_go_hands_its_runs_over_at_once(
    system: Stack, talks: Talks, chance: random.Random
) -> None:
    processes = inferences(system, 2)
    answering = await over_both(talks, "long 200", processes, chance.randint(1, 40))
    victim, lost = process_of(answering[0], processes), answering[0].worker
    orphans = [talk for talk in answering if talk.worker == lost]
    asked_ms = time.time() * 1000
    assert victim.end(signal.SIGTERM) == 0
    assert await talks.end() == ["done"] * len(talks.all)
    took = sorted((assert_taken_over(talk, lost) - asked_ms) / 1000 for talk in orphans)
    print(f"handovers after {[round(one, 2) for one in took]} s")
    assert took[-1] <= HANDOVER_S
    assert all(words(talk, 200) for talk in answering)


async def test_a_paused_worker_that_wakes_up_adds_nothing(system: Stack, talks: Talks, chance: random.Random) -> None:
    """It wakes up while one of its runs is in another's hands, and another of them has ended."""
    processes = inferences(system, 2)
    long = await over_both(talks, "long 500", processes, chance.randint(1, 40))
    victim, lost = process_of(long[0], processes), long[0].worker
    short = await talks.begin_on(lost, "long 60")
    orphans = [talk for talk in long if talk.worker == lost]
    victim.send(signal.SIGSTOP)
    try:
        stopped_ms = time.time() * 1000
        [during] = await talks.begin("hello")  # the sleeper may have been asked for it
        await until("the short run has ended", lambda: short.ended, ENDED_S)
        await until("every long run has a new worker", lambda: all(len(one.claims) == 2 for one in orphans))
        assert not any(one.ended for one in orphans), "the zombie shall meet a run in another's hands"
    finally:
        victim.send(signal.SIGCONT)
    noticed = [f"{talk.conversation}: overtaken by" for talk in [short, *orphans]]
    await until(f"the zombie says {noticed}", lambda: all(line in victim.output() for line in noticed))
    assert await talks.end() == ["done"] * len(talks.all)

    took = sorted((assert_taken_over(talk, lost) - stopped_ms) / 1000 for talk in [short, *orphans])
    print(f"takeovers after {[round(one, 1) for one in took]} s")
    assert took[-1] <= TAKEOVER_S
    assert words(short, 60)
    assert all(words(talk, 500) for talk in orphans)
    assert during.ended

    again = await talks.begin_on(lost, "long 1")  # it is a worker like any other again
    assert await again.judged() == "done"


async def test_a_message_is_answered_by_inference_that_starts_later(system: Stack, talks: Talks) -> None:
    inferences(system, 0)
    tool_workers(system, 1)
    begun = await talks.begin("hello", 3)
    await until("the message is on the tape", lambda: all(talk.received for talk in begun))
    inferences(system, 1)
    assert await talks.end() == ["done"] * 3
    assert all(len(talk.events("step")) == 2 for talk in begun)


# Tools


async def test_an_idempotent_call_whose_worker_is_killed_runs_again_and_has_one_result(
    system: Stack, talks: Talks, chance: random.Random
) -> None:
    inferences(system, 1)
    pools = tool_workers(system, 2)
    begun = await talks.begin("weather", 4)
    progress = chance.randint(1, 4)
    for talk in begun:
        await talk.reach("tool_progress", progress)
    lost = begun[0].events("tool_started")[0]["worker"]
    orphans = [talk for talk in begun if talk.events("tool_started")[0]["worker"] == lost]
    pools[lost.rpartition("-")[0]].end(signal.SIGKILL)
    killed_ms = time.time() * 1000
    assert await talks.end() == ["done"] * len(begun)
    took = []
    for talk in begun:
        claims = talk.events("tool_started")
        [result] = talk.events("tool_result")
        assert result["outcome"] == "ok"
        assert [one.get("attempt", 1) for one in claims] == ([1, 2] if talk in orphans else [1])
        if talk in orphans:
            assert claims[1]["worker"] != lost
            took.append((claims[1]["ts"] - killed_ms) / 1000)
    print(f"calls run again after {[round(one, 1) for one in sorted(took)]} s")
    assert max(took) <= TAKEOVER_S
