"""A user's conversations: listed newest first, named, deleted for good; whatever is killed meanwhile."""

import asyncio
import json
import random
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, Final

import pytest
from tapeline import audit, events, limits, subjects
from tapeline.append import Chain, Overtaken
from tapeline.connection import api
from tapeline.events import NO_RUN
from tapeline.fold import fold
from tapeline.follow import follow
from tapeline.record import Entry, Record
from tapeline.registry import Registry
from tapeline.replay import load
from tapeline.tape import Gone, Stale, Tape
from tapeline.tools import decision

from services.edge.listing import Listing, derived
from services.inference.decide import Budget, Purge, Trigger, decide
from services.inference.engine import Engine
from services.inference.model import Models
from tests import PATIENT_S
from tests.client import Client, Received, Stream, as_received, at_once, opened, problem, stored, types
from tests.model_server import RawServer
from tests.stack import Stack, until
from tests.test_deadlines import stall

ANNS: Final = "key-of-ann-1"
BOBS: Final = "key-of-bob-1"
KEYS: Final = {"TAPELINE_API_KEYS": f"ann={ANNS},bob={BOBS}"}
POLL_S: Final = 0.02
PAGES: Final = 3
ENTRY_BYTES_MAX: Final = 600  # of one entry of a list, as NATS sends it
MANY: Final = PAGES * limits.LIST_PAGE_ENTRIES + 7
SLOW: Final = {"TAPELINE_DEMO_DELAY_MS": "20"}


@pytest.fixture(scope="module")
def edges(stack: Stack) -> tuple[str, str]:
    """The URLs of two edges of the shared system that know their users."""
    while len(stack.edges) < 2:  # the first two are those of `clients`
        stack.add_edge()
    return stack.edge_url(stack.add_edge(KEYS)), stack.edge_url(stack.add_edge(KEYS))


@pytest.fixture
async def ann(edges: tuple[str, str]) -> AsyncIterator[Client]:
    async with Client(edges[0], ANNS) as client:
        yield client


@pytest.fixture
async def bob(edges: tuple[str, str]) -> AsyncIterator[Client]:
    async with Client(edges[1], BOBS) as client:
        yield client


async def page(client: Client, **query: Any) -> tuple[list[dict[str, Any]], str | None]:
    response = await client.http.get("/v1/conversations", params=query)
    assert response.status_code == 200, response.text
    answer = response.json()
    return answer["conversations"], answer["next"]


async def listed(client: Client, limit: int = 100) -> list[dict[str, Any]]:
    """The whole list, page by page."""
    found, following = await page(client, limit=limit)
    assert len(found) <= limit
    while following is not None:
        more, before = await page(client, limit=limit, before=following)
        assert before is None or int(before) < int(following)
        found, following = found + more, before
    return found


async def titles(client: Client) -> dict[str, str]:
    return {one["id"]: one["title"] for one in await listed(client)}


async def delete(client: Client, conversation: str) -> None:
    response = await client.http.delete(f"/v1/conversations/{conversation}")
    assert (response.status_code, response.content) == (204, b"")


async def purged(nats_url: str, conversation: str, within_s: float = PATIENT_S) -> None:
    """Waits until nothing is left of the conversation: no event, no alarm but the last, nothing that wakes anybody."""
    tape = await opened(nats_url)
    stream = subjects.stream(tape.shard(conversation))
    alarms = subjects.alarm(tape.shard(conversation), conversation, ">")
    sweep = subjects.alarm(tape.shard(conversation), conversation, events.NO_RUN)  # for results that come too late

    async def is_empty() -> bool:
        left = [one.subject for one in await tape.newest(subjects.WAKES, alarms)]
        return await tape.last(conversation) == 0 and left == [sweep]

    async def is_idle() -> bool:
        info = await api(tape.nc, f"CONSUMER.INFO.{stream}.{subjects.TRIGGERS}")
        return not info["num_pending"] and not info["num_ack_pending"]

    try:
        await until(f"{conversation} is purged", is_empty, within_s)
        await until("no trigger is left", is_idle, within_s)
        assert await is_empty()
    finally:
        await tape.close()


# The list


async def test_a_list_is_newest_first_in_pages_and_only_mine(ann: Client, bob: Client) -> None:
    anns: list[str] = []
    bobs: list[str] = []
    for number in range(MANY):
        anns.append(await ann.create(title=f"number {number}"))
        if number % 10 == 0:
            bobs.append(await bob.create())
    for limit in (100, 50, 49, 7):
        assert [one["id"] for one in await listed(ann, limit)] == anns[::-1], f"limit {limit}"
    assert [one["id"] for one in await listed(bob, 5)] == bobs[::-1]
    newest, following = await page(ann)
    assert len(newest) == limits.LIST_ENTRIES_DEFAULT
    assert following is not None
    assert newest[0] == {
        "id": anns[-1],
        "title": f"number {MANY - 1}",
        "created_ts": (await ann.snapshot(anns[-1]))["created_ts"],
        "url": f"/v1/conversations/{anns[-1]}",
    }
    await ann.create()  # what comes in between moves no later page
    older, _ = await page(ann, before=following)
    assert [one["id"] for one in older] == anns[::-1][50:100]


@pytest.mark.parametrize("limit", ["", "ten", "1.5", "９", "--1"])
async def test_a_limit_that_is_none_is_refused(limit: str, client: Client) -> None:
    problem(await client.http.get("/v1/conversations", params={"limit": limit}), 400, "bad_limit")


@pytest.mark.parametrize("limit", ["0", "101", "-1", "+101", "1" * 30])
async def test_a_limit_out_of_bounds_is_refused(limit: str, client: Client) -> None:
    problem(await client.http.get("/v1/conversations", params={"limit": limit}), 422, "bad_limit")


@pytest.mark.parametrize("before", ["-1", "", "x", "1e3", "9" * 20])
async def test_a_place_in_the_list_that_is_none_is_refused(before: str, client: Client) -> None:
    problem(await client.http.get("/v1/conversations", params={"before": before}), 400, "bad_cursor")


async def test_a_place_beyond_the_list_is_its_beginning_or_its_end(client: Client) -> None:
    conversation = await client.create()
    newest, _ = await page(client, before=10**18)
    assert newest[0]["id"] == conversation
    assert await page(client, before=0) == ([], None)


async def test_conversations_begun_on_two_edges_at_once_are_each_listed_once(edges: tuple[str, str]) -> None:
    async with Client(edges[0], BOBS) as one, Client(edges[1], BOBS) as other:
        before = [entry["id"] for entry in await listed(one)]
        begun = await at_once(16, ((one, other)[number % 2].create() for number in range(70)))
        found = [entry["id"] for entry in await listed(other)]
    assert sorted(found) == sorted(before + begun)
    assert found[len(begun) :] == before


async def add(listing: Listing, count: int, user: str = "ann") -> None:
    for number in range(count):
        await listing.add(user, f"c{number}", f"title {number}", number + 1, number)


async def test_holes_and_empty_pages_are_passed_in_bounded_steps(tape: Tape) -> None:
    listing = Listing(tape)
    count = (limits.LIST_PAGES_MAX + 4) * limits.LIST_PAGE_ENTRIES + 3
    await add(listing, count)
    chance = random.Random(11)
    gone = set(range(limits.LIST_PAGE_ENTRIES, (limits.LIST_PAGES_MAX + 3) * limits.LIST_PAGE_ENTRIES))
    gone |= set(chance.sample(range(count), 30)) | {count - 1}
    await at_once(32, (listing.remove("ann", f"c{number}") for number in gone))
    found: list[int] = []
    before: int | None = None
    answers = 0
    while answers == 0 or before is not None:
        asked = tape.nc.stats["out_msgs"]
        entries, following = await listing.page("ann", 20, before)
        assert tape.nc.stats["out_msgs"] - asked <= 1 + limits.LIST_PAGES_MAX
        assert before is None or following is None or following < before
        found += [one.number for one in entries]
        before, answers = following, answers + 1
    assert found == [number for number in reversed(range(count)) if number not in gone]


async def test_a_list_costs_the_same_however_many_there_are(tape: Tape) -> None:
    listing = Listing(tape)
    asked, answered = [], []
    before: dict[str, int] = {}
    for rounds in range(1, 4):
        for number in range(120):
            await listing.add("ann", f"c{rounds}{number:03}", "", 1, 1)
            await listing.add(f"u{number % 7}", f"d{rounds}{number:03}", "", 1, 1)
        await fill(tape, f"c{rounds}000", rounds * 1_000)  # and however much is said in them
        before = dict(tape.nc.stats)
        entries, _ = await listing.page("ann", 50, None)
        assert len(entries) == 50
        asked.append(tape.nc.stats["out_msgs"] - before["out_msgs"])
        answered.append(tape.nc.stats["in_bytes"] - before["in_bytes"])
    assert max(asked) <= 3, "the head, and the two newest pages"
    most = 2 * limits.LIST_PAGE_ENTRIES  # in two pages, of which the second may have few
    assert max(answered) <= most * ENTRY_BYTES_MAX


async def fill(tape: Tape, conversation: str, count: int) -> None:
    """A conversation of so many events."""
    entry = Entry(subjects.MODEL_DELTA, events.encode(token("a few words, ")))
    last = await tape.last(conversation)
    for _ in range(count // limits.BATCH_EVENTS_MAX):
        last = (await tape.append_batch(conversation, [entry] * limits.BATCH_EVENTS_MAX, last))[-1]


async def test_what_was_taken_off_the_list_leaves_nothing(tape: Tape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LIST_DELETED_TTL_S", 1)
    listing = Listing(tape)
    await add(listing, 3)
    await listing.remove("ann", "c1")
    await listing.remove("ann", "unknown")

    async def is_gone() -> bool:
        return not await tape.newest(subjects.LISTS, subjects.listed("ann", conversation="c1"))

    await until("the place of the deleted one is gone", is_gone)
    entries, _ = await listing.page("ann", 10, None)
    assert [one.id for one in entries] == ["c2", "c0"]
    await listing.add("ann", "c1", "again", 9, 9)
    entries, _ = await listing.page("ann", 10, None)
    assert [(one.id, one.number) for one in entries] == [("c1", 3), ("c2", 2), ("c0", 0)]


async def test_one_conversation_added_by_many_at_once_is_listed_once(tape: Tape) -> None:
    listing = Listing(tape)
    await asyncio.gather(*(listing.add("ann", f"c{number % 3}", "", 1, 1) for number in range(24)))
    entries, _ = await listing.page("ann", 100, None)
    assert sorted(one.id for one in entries) == ["c0", "c1", "c2"]


async def test_a_hundred_added_at_once_race_for_nothing(tape: Tape) -> None:
    listing = Listing(tape)
    asked = tape.nc.stats["out_msgs"]
    await asyncio.gather(*(listing.add("ann", f"c{number}", "", 1, 1) for number in range(100)))
    assert tape.nc.stats["out_msgs"] - asked <= 100 * 5, "the head, a look, and a batch of two: each once"
    entries, _ = await listing.page("ann", 100, None)
    assert len(entries) == 100


async def test_a_conversation_whose_edge_died_before_it_was_listed_is_listed_by_its_first_message(
    stack: Stack, client: Client
) -> None:
    tape = await opened(stack.nats.url)
    try:
        about = events.Conversation(run=NO_RUN, ts=7, owner="local")
        for conversation in ("unlisted-1", "unlisted-2"):
            await Chain(tape, conversation, 0).append(subjects.INPUT, about)
        assert not {"unlisted-1", "unlisted-2"} & set(await titles(client))
        await client.post("unlisted-1", "long 3")
        problem(await client.send("unlisted-2", ""), 422, "invalid")
    finally:
        await tape.close()
    found = {one["id"]: one for one in await listed(client)}
    assert found["unlisted-1"]["title"] == "long 3"
    assert found["unlisted-1"]["created_ts"] == 7
    assert "unlisted-2" not in found


# Titles

HOSTILE: Final = {
    "one line": ("What is a tape?", "What is a tape?"),
    "many lines": ("\n \r\n  first \t one\nsecond", "first one"),
    "line ends of all kinds": ("one\x85two", "one"),
    "controls": ("a\0b\x1b[31mred\x07 \x7f c", "ab[31mred c"),
    "turned around": ("safe\u202egpj.exe\u2066\u2069\u200f", "safegpj.exe"),
    "nothing to see": ("\u200b\ufeff\u202e\n\u2028ok", "ok"),
    "nothing at all": ("\u200b\u200d", ""),
    "an emoji of several": ("👩\u200d💻 at work", "👩\u200d💻 at work"),
    "long": ("x" * 81, "x" * 79 + "…"),
    "long with a gap at the cut": ("x" * 78 + " yyy", "x" * 78 + "…"),
    "as long as may be": ("x" * 80, "x" * 80),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_title_is_made_from_the_first_line_that_shows(what: str) -> None:
    content, title = HOSTILE[what]
    assert derived(content) == title
    assert len(title) <= limits.TITLE_DERIVED_CHARS_MAX


async def test_the_first_message_gives_the_title_where_nobody_else_did(client: Client) -> None:
    untitled, titled = await client.create(), await client.create(title="mine")
    assert (await titles(client))[untitled] == ""
    for conversation in (untitled, titled):
        await client.run(conversation, (await client.post(conversation, "long 3\u202e\nplease")).run)
        await client.post(conversation, "long 4")
    found = await titles(client)
    assert (found[untitled], found[titled]) == ("long 3", "mine")
    assert (await client.snapshot(untitled))["title"] == "long 3"
    assert (await client.snapshot(titled))["title"] == "mine"


async def test_of_first_messages_at_once_the_one_that_is_taken_gives_the_title(clients: tuple[Client, Client]) -> None:
    for _ in range(5):
        conversation = await clients[0].create()
        sent = (clients[number % 2].send(conversation, f"long 40, number {number}") for number in range(6))
        answers = [response.status_code for response in await at_once(6, sent)]
        assert sorted(answers) == [202, 409, 409, 409, 409, 409]
        taken = (await clients[0].snapshot(conversation))["title"]
        assert taken == f"long 40, number {answers.index(202)}"
        assert (await titles(clients[1]))[conversation] == taken


async def test_a_rename_is_seen_by_whoever_reads_and_by_the_list(clients: tuple[Client, Client]) -> None:
    one, other = clients
    conversation = await one.create(title="old")
    created_ts = (await one.snapshot(conversation))["created_ts"]
    hostile = 'a\r\nid: 9\n\ndata: forged\u202e\0 "\\'
    async with one.events(conversation) as stream:
        await stream.until("conversation")
        response = await other.http.patch(f"/v1/conversations/{conversation}", json={"title": hostile})
        assert response.status_code == 200
        url = f"/v1/conversations/{conversation}"
        assert response.json() == {"id": conversation, "title": hostile, "created_ts": created_ts, "url": url}
        title = (await stream.until("title"))[-1]
    assert json.loads(title.data) | {"ts": 0} == {
        "type": "title",
        "title": hostile,
        "by": "local",
        "run": NO_RUN,
        "ts": 0,
    }
    assert (await one.snapshot(conversation))["title"] == hostile
    assert (await titles(one))[conversation] == hostile
    again = await one.http.patch(f"/v1/conversations/{conversation}", json={"title": hostile})
    assert again.json() == response.json()
    assert len(await one.lines(conversation)) == 2, "nothing was said anew"


@pytest.mark.parametrize("body", [{}, {"title": ""}, {"title": " \n"}, {"title": 7}, {"title": "x" * 501}, {"t": "x"}])
async def test_a_title_that_is_none_is_refused(body: Any, client: Client) -> None:
    conversation = await client.create(title="old")
    problem(await client.http.patch(f"/v1/conversations/{conversation}", json=body), 422, "invalid")
    assert (await client.snapshot(conversation))["title"] == "old"


async def test_of_renames_at_once_the_last_on_the_tape_is_listed(clients: tuple[Client, Client]) -> None:
    conversation = await clients[0].create()
    path = f"/v1/conversations/{conversation}"
    names = (f"name {number}" for number in range(20))
    await at_once(8, (clients[len(name) % 2].http.patch(path, json={"title": name}) for name in names))
    title = (await clients[0].snapshot(conversation))["title"]
    assert title == json.loads((await clients[0].lines(conversation))[-1])["title"]
    assert (await titles(clients[1]))[conversation] == title


async def test_what_is_anothers_can_neither_be_renamed_nor_deleted(stack: Stack, ann: Client, bob: Client) -> None:
    conversation = await ann.create(title="mine")
    for method, body in (("PATCH", {"title": "yours"}), ("DELETE", None)):
        hers = await bob.http.request(method, f"/v1/conversations/{conversation}", json=body)
        nobodys = await bob.http.request(method, "/v1/conversations/unknown", json=body)
        assert problem(hers, 404, "not_found") == nobodys.json()
        assert dict(hers.headers) | {"date": ""} == dict(nobodys.headers) | {"date": ""}
    assert len(await stored(stack.nats.url, conversation)) == 1
    assert (await titles(ann))[conversation] == "mine"


# Deletion


async def ended_by_deletion(stream: Stream) -> list[Received]:
    """What a reader was sent, which has to end with the event that deleted the conversation."""
    async with asyncio.timeout(PATIENT_S):
        received = await stream.rest()
    assert stream.ended
    assert types(received).count("deleted") == 1
    assert received[-1].event == "deleted"
    return received


async def test_every_reader_is_told_of_a_deletion_in_mid_answer(stack: Stack, clients: tuple[Client, Client]) -> None:
    one, other = clients
    conversation, run = await one.ask("long 5000")
    async with (
        one.events(conversation) as full,
        one.events(conversation, run=run) as of_run,
        other.events(conversation, view="compact") as compact,
        other.events(conversation, run=run) as elsewhere,
    ):
        for stream in (full, of_run, elsewhere):
            await stream.until("token")
        await compact.until("step")
        await delete(other, conversation)
        for response in (
            await one.http.get(f"/v1/conversations/{conversation}"),
            await one.send(conversation, "are you there?"),
            await one.stop(conversation, run),
            await one.get_events(conversation),
            await one.http.post(f"/v1/conversations/{conversation}/ticket"),
            await other.http.delete(f"/v1/conversations/{conversation}"),
            await other.http.patch(f"/v1/conversations/{conversation}", json={"title": "x"}),
        ):
            problem(response, 404, "not_found")
        assert conversation not in await titles(one)
        seen = [await ended_by_deletion(stream) for stream in (full, of_run, compact, elsewhere)]
    assert seen[1] == seen[3]
    assert types(seen[2]) == ["conversation", "message", "step", "deleted"]
    assert json.loads(seen[0][-1].data)["by"] == "local"
    assert seen[0][1:] == seen[1]
    await purged(stack.nats.url, conversation)
    assert await one.create(id=conversation) == conversation
    assert types(as_received(await stored(stack.nats.url, conversation))) == ["conversation"]
    posted = await other.post(conversation, "long 3")
    assert (await other.run(conversation, posted.run))[-1].event == "done"
    assert (await titles(one))[conversation] == "long 3"


async def test_a_deletion_while_a_tool_runs_leaves_nothing_of_its_call(stack: Stack, client: Client) -> None:
    worker = stack.workers[0]
    before = len(worker.output())
    conversation, run = await client.ask("parallel, please")
    async with client.events(conversation, run=run) as stream:
        await stream.until("tool_progress")
        await delete(client, conversation)
        await ended_by_deletion(stream)
    await purged(stack.nats.url, conversation)
    tape = await opened(stack.nats.url)
    consumer = f"CONSUMER.INFO.{subjects.stream(tape.shard(conversation))}.{subjects.tool_consumer('search_notes')}"

    async def has_ended() -> bool:
        said = worker.output()[before:]
        return f"call {run}" in said and ("the conversation is gone" in said or "overtaken by event" in said)

    async def is_acknowledged() -> bool:
        return bool((await api(tape.nc, consumer))["num_ack_pending"] == 0)

    try:
        await until("its worker has given up the call", has_ended)
        await until("and will not be asked again", is_acknowledged)
        assert await tape.read(conversation) == []
    finally:
        await tape.close()


async def test_a_deletion_closes_the_providers_connection_at_once(fresh_stack: Stack) -> None:
    fresh_stack.add_edge()
    async with RawServer(stall) as provider, Client(fresh_stack.url) as user:
        settings = {"TAPELINE_MODEL": "openai:x", "OPENAI_BASE_URL": f"{provider.url}/v1", "OPENAI_API_KEY": "test"}
        fresh_stack.start_inference(settings)
        conversation, run = await user.ask("hello")
        async with user.events(conversation, run=run) as stream:
            await stream.until("token")
            await delete(user, conversation)
            async with asyncio.timeout(5):
                await provider.hung_up.wait()
            await ended_by_deletion(stream)
    await purged(fresh_stack.nats.url, conversation)


async def test_what_was_deleted_while_no_inference_ran_is_purged_when_one_is_back(fresh_stack: Stack) -> None:
    fresh_stack.add_edge()
    url = fresh_stack.nats.url
    async with Client(fresh_stack.url) as user:
        conversation, run = await user.ask("long 5")
        async with user.events(conversation, run=run) as stream:
            await stream.until("message")
            await delete(user, conversation)
            await ended_by_deletion(stream)
        problem(await user.http.post("/v1/conversations", json={"id": conversation}), 409, "exists")
        log = await stored(url, conversation)
        assert types(as_received(log)) == ["conversation", "message", "deleted"]
        assert audit.violations(log) == []
        # A worker of a version that does not know of `deleted` adds to it.
        late = events.ToolResult(run=run, ts=1, call="c", tool="t", outcome="ok")
        tape = await opened(url)
        seq = await tape.append(conversation, Entry(subjects.TOOL, events.encode(late)), log[-1].seq)
        await tape.close()
        assert audit.violations(await stored(url, conversation))[-1].startswith(f"{seq} ")
        problem(await user.http.get(f"/v1/conversations/{conversation}"), 404, "not_found")
        problem(await user.http.post(f"/v1/conversations/{conversation}/ticket"), 404, "not_found")
        fresh_stack.restart_nats()
        fresh_stack.provision()
        fresh_stack.start_inference()
        await purged(url, conversation)
        assert await user.create(id=conversation) == conversation


async def test_inference_killed_before_it_purges_is_replaced(fresh_stack: Stack) -> None:
    fresh_stack.add_edge()
    inference = fresh_stack.start_inference(SLOW)
    async with Client(fresh_stack.url) as user:
        conversation, run = await user.ask("long 5000")
        async with user.events(conversation, run=run) as stream:
            await stream.until("token")
            inference.send(signal.SIGSTOP)
            await delete(user, conversation)
            await ended_by_deletion(stream)
        fresh_stack.start_inference()
        inference.send(signal.SIGKILL)
        await purged(fresh_stack.nats.url, conversation, limits.ACK_WAIT_S + PATIENT_S)


async def test_a_worker_that_was_frozen_over_a_deletion_adds_nothing_to_the_next_of_that_id(fresh_stack: Stack) -> None:
    fresh_stack.add_edge()
    frozen = fresh_stack.start_inference(SLOW)
    async with Client(fresh_stack.url) as user:
        conversation, run = await user.ask("long 5000")
        async with user.events(conversation, run=run) as stream:
            await stream.until("token")
        frozen.send(signal.SIGSTOP)
        fresh_stack.start_inference()
        await delete(user, conversation)
        await purged(fresh_stack.nats.url, conversation, limits.ACK_WAIT_S + PATIENT_S)
        await user.create(id=conversation, title="another")
        frozen.send(signal.SIGCONT)
        posted = await user.post(conversation, "long 20")
        received = await user.run(conversation, posted.run)
    log = await stored(fresh_stack.nats.url, conversation)
    assert audit.violations(log) == []
    assert received == as_received(log, posted.run)
    assert {one.run for one in (record.event() for record in log)} == {NO_RUN, posted.run}


# What a deletion is to writers and followers

CONVERSATION: Final = "c-1"


async def begun(tape: Tape, count: int = 3) -> Chain:
    chain = Chain(tape, CONVERSATION, 0)
    await chain.append(subjects.INPUT, events.Conversation(run=NO_RUN, ts=1, owner="ann"))
    for number in range(count):
        await chain.append(subjects.MODEL_DELTA, token(f"t{number}"))
    return chain


def token(text: str) -> events.Token:
    return events.Token(run="r", ts=1, step=1, attempt=1, text=text)


DELETED: Final = events.Deleted(run=NO_RUN, ts=1, by="ann")


async def test_nothing_can_be_appended_after_a_deletion_whoever_writes(tape: Tape) -> None:
    chain = await begun(tape)
    other = Chain(tape, CONVERSATION, chain.last, ends=lambda _: False)
    seq = await chain.append(subjects.INPUT, DELETED)
    with pytest.raises(Overtaken) as overtaken:
        await other.append(subjects.TOOL_DELTA, token("harmless"))
    assert overtaken.value.by is not None
    assert overtaken.value.by.deletes
    await tape.purge(CONVERSATION, seq)
    with pytest.raises(Overtaken):
        await other.append(subjects.TOOL_DELTA, token("too late"))
    await begun(tape)
    with pytest.raises(Overtaken) as overtaken:
        await other.append(subjects.TOOL_DELTA, token("of an earlier life"))
    assert overtaken.value.by is None
    assert [record.prev for record in await tape.read(CONVERSATION)] == [0, seq + 1, seq + 2, seq + 3]


@asynccontextmanager
async def deafened(tape: Tape, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """No live copy arrives."""
    real = tape.live

    def deaf(conversation: str, _: Callable[[Record], None], doubt: Callable[[], None]) -> Any:
        return real(conversation, lambda _: None, doubt)

    monkeypatch.setattr(tape, "live", deaf)
    yield
    monkeypatch.undo()


async def followed(pages: AsyncIterator[list[Record]], seen: list[Record]) -> None:
    async with asyncio.timeout(PATIENT_S):
        async for page in pages:
            seen += page


@pytest.mark.parametrize("again", [False, True], ids=["purged", "purged and begun again"])
@pytest.mark.parametrize("deaf", [False, True], ids=["heard", "missed"])
async def test_a_follower_ends_with_the_conversation(
    tape: Tape, monkeypatch: pytest.MonkeyPatch, *, deaf: bool, again: bool
) -> None:
    chain = await begun(tape)
    seen: list[Record] = []
    async with aclosing(follow(tape, CONVERSATION)) as pages:
        if deaf:
            async with deafened(tape, monkeypatch):
                seen += await anext(pages)
        else:
            seen += await anext(pages)
        assert await anext(pages) == []
        seq = await chain.append(subjects.INPUT, DELETED)
        await tape.purge(CONVERSATION, seq)
        if again:
            await begun(tape)
        with pytest.raises(Gone):
            await followed(pages, seen)
    assert [record.seq for record in seen] == ([1, 2, 3, 4] if deaf else [1, 2, 3, 4, seq])


async def test_a_slow_reader_of_history_is_not_led_into_the_next_conversation(
    tape: Tape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "HISTORY_BATCH", 2)
    chain = await begun(tape)
    async with aclosing(tape.pages(CONVERSATION)) as pages:
        assert [record.seq for record in await anext(pages)] == [1, 2]
        await tape.purge(CONVERSATION, await chain.append(subjects.INPUT, DELETED))
        await begun(tape)
        with pytest.raises(Gone):
            await anext(pages)


async def test_a_purge_that_comes_again_leaves_the_next_conversation_alone(tape: Tape) -> None:
    chain = await begun(tape)
    seq = await chain.append(subjects.INPUT, DELETED)
    await tape.purge(CONVERSATION, seq)
    await begun(tape, 1)
    await tape.purge(CONVERSATION, seq)
    assert [record.seq for record in await tape.read(CONVERSATION)] == [seq + 1, seq + 2]


async def test_a_purge_takes_what_was_added_at_the_last_moment_and_the_alarms(tape: Tape) -> None:
    chain = await begun(tape)
    await tape.set_alarm(CONVERSATION, "r", time.time_ns() // 1_000_000 + 3_600_000)
    seq = await chain.append(subjects.INPUT, DELETED)
    real = tape.purge

    async def late(conversation: str, through: int) -> None:
        if through == seq:
            await tape.append(conversation, Entry(subjects.TOOL_DELTA, b'{"type":"tool_progress"}'), seq)
        await real(conversation, through)

    tape.purge = late  # type: ignore[method-assign]
    models = Models("demo", {})
    engine = Engine(tape, Registry(tape), models, "demo", Budget(), "test")
    assert await engine.react(CONVERSATION, Trigger(seq, 1))
    assert await tape.last(CONVERSATION) == 0
    assert [one.subject.rpartition(".")[2] for one in await tape.newest(subjects.WAKES, "wake.>")] == [events.NO_RUN]
    await models.aclose()


async def test_only_the_edge_can_delete(tape: Tape) -> None:
    chain = await begun(tape)
    for kind in (subjects.TOOL, subjects.MODEL, subjects.TOOL_DELTA, subjects.call("x")):
        await chain.append(kind, DELETED)
    state = await load(tape, CONVERSATION)
    assert not state.deleted
    await chain.append(subjects.INPUT, DELETED)
    state = await load(tape, CONVERSATION)
    assert state.deleted
    assert state.active is None


async def test_a_deleted_conversation_is_purged_whatever_it_was_about(tape: Tape) -> None:
    chain = await begun(tape)
    await chain.append(subjects.INPUT, events.Message(run="r", ts=1, content="hi"))
    await chain.append(subjects.INPUT, events.Stop(run="r", ts=1))
    seq = await chain.append(subjects.INPUT, DELETED)
    state = fold(await tape.read(CONVERSATION))
    assert decide(state, Trigger(seq, 1), 0, Budget()) == Purge(seq)
    call = events.ToolCall(run="r", ts=1, step=1, attempt=1, call="c", tool="t", arguments={}, deadline=1)
    assert decision.decide(state, call, 1, 0, idempotent=True) == decision.Nothing(over=True)


async def test_a_head_that_moved_refuses_the_whole_batch(tape: Tape) -> None:
    head, entry = subjects.list_head("ann"), subjects.listed("ann", "0", "c")
    await tape.put_all([(head, b"1"), (entry, b"2")], 0)
    with pytest.raises(Stale):
        await tape.put_all([(head, b"3"), (entry, b"4")], 0)
    assert [one.data for one in await tape.newest(subjects.LISTS, "list.>")] == [b"1", b"2"]
