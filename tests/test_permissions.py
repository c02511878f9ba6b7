"""Who may write what: the shipped roles on a real server. Each test names the way by which one role might do what is
another's."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import NoRespondersError
from tapeline import limits, permissions, provision, results, subjects
from tapeline.append import Chain
from tapeline.connection import Denied, Refused, api, connect, reply
from tapeline.events import Message, Token
from tapeline.permissions import ROLES, ROOT
from tapeline.record import Entry
from tapeline.settings import EX_CONFIG
from tapeline.tape import Deployment, Tape
from tapeline.tools import consumer

from services.embedded import EmbeddedNats
from tests import PATIENT_S
from tests import ROOT as ROOT_FOLDER
from tests.stack import PASSWORDS

CONVERSATION: Final = "c"
AT_ONCE_S: Final = limits.APPEND_PATIENCE_S / 4  # long before an append that hopes gives up
FORGED: Final = b'{"type":"token","run":"r","ts":1,"step":1,"attempt":1,"text":"forged"}'
NAMES: Final = tuple(role.name for role in ROLES)
MINE: Final = {
    "tape.0.c.fact.input": ("edge",),
    "tape.0.c.fact.model": ("inference",),
    "tape.0.c.fact.call.clock": ("inference",),
    "tape.0.c.delta.model": ("inference",),
    "tape.0.c.fact.tool": ("tools",),
    "tape.0.c.delta.tool": ("tools",),
    "tape.0.c.fact.new": (),
    "wake.0.at.c.r": ("inference",),
    "wake.0.due.c": (),
    "dead.inference": ("inference",),
    "dead.tools": ("tools",),
    "$KV.tapeline_tools.clock.w": ("tools",),
    "list.u.1.c": ("edge",),
    "lease.u.e": ("edge",),
    "result.c.call.1": ("tools",),
}
"""What may be stored, and by whom."""
READING: Final = ("edge", "inference", "tools", "auditor")
API: Final = {
    "INFO": NAMES,
    "STREAM.INFO.TAPE_0": NAMES,
    "CONSUMER.INFO.TAPE_0.inference": NAMES,
    "STREAM.MSG.GET.TAPE_0": READING,
    "STREAM.MSG.GET.LISTS": ("edge", "inference", "auditor"),
    "STREAM.PURGE.TAPE_0": ("inference",),
    "STREAM.PURGE.WAKES": ("inference",),
    "STREAM.PURGE.RESULTS": ("inference",),
    "STREAM.PURGE.LISTS": (),
    "STREAM.PURGE.DEAD": (),
    "STREAM.CREATE.OTHER": ("provision",),
    "STREAM.UPDATE.TAPE_0": ("provision",),
    "STREAM.DELETE.TAPE_0": (),
    "STREAM.MSG.DELETE.TAPE_0": (),
    "STREAM.MSG.DELETE.RESULTS": (),
    "STREAM.MSG.GET.RESULTS": READING,
    "STREAM.SNAPSHOT.TAPE_0": (),
    "STREAM.RESTORE.TAPE_0": (),
    "STREAM.NAMES": (),
    "CONSUMER.CREATE.TAPE_0": (),
    "CONSUMER.CREATE.TAPE_0.inference": ("provision",),
    "CONSUMER.CREATE.TAPE_0.inference.tape.0.*.fact.call.clock": (),
    "CONSUMER.CREATE.TAPE_0.tool_clock.tape.0.*.fact.call.clock": ("tools",),
    "CONSUMER.CREATE.TAPE_0.mine.tape.0.>": (),
    "CONSUMER.DURABLE.CREATE.TAPE_0.mine": (),
    "CONSUMER.DELETE.TAPE_0.inference": (),
    "CONSUMER.PAUSE.TAPE_0.inference": (),
    "STREAM.LEADER.STEPDOWN.TAPE_0": (),
}
"""What may be asked of JetStream, and by whom. Asked with a body that it makes nothing of."""

Login = Callable[[str], Awaitable[Client]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedNats]:
    server = EmbeddedNats(tmp_path_factory.mktemp("nats"), passwords=PASSWORDS)
    server.start()
    yield server
    server.stop()


@pytest.fixture
async def login(server: EmbeddedNats) -> AsyncIterator[Login]:
    """Connects as a role, to what its own role has provisioned, with one event in the conversation."""
    opened: list[Client] = []

    async def login(role: str) -> Client:
        opened.append(await connect(server.url_for(role), role))
        return opened[-1]

    await provision.apply(await login("provision"), Deployment())
    root = await login(ROOT)
    for stream in [config["name"] for config in provision.streams(Deployment())]:
        await api(root, f"STREAM.PURGE.{stream}")
    yield login
    for nc in opened:
        await nc.close()


async def stored(nc: Client) -> list[str]:
    """The subjects of everything that is stored anywhere, in all streams."""
    found: list[str] = []
    for config in provision.streams(Deployment()):
        state = (await api(nc, f"STREAM.INFO.{config['name']}", {"subjects_filter": ">"}))["state"]
        found += state.get("subjects", {})
    return sorted(found)


async def put(nc: Client, subject: str, data: bytes = FORGED, headers: dict[str, str] | None = None) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads((await reply(nc, subject, data, PATIENT_S, headers)).data)
    return answer


async def said_and_done(nc: Client) -> None:
    """Returns when the server has handled all that was sent on this connection, and what came of it inside."""
    await nc.flush()
    await api(nc, "INFO")


@pytest.mark.parametrize("role", NAMES)
async def test_each_role_stores_what_is_its_own_and_nothing_else(
    role: str, login: Login, caplog: pytest.LogCaptureFixture
) -> None:
    nc, root = await login(role), await login(ROOT)
    for subject, writers in MINE.items():
        caplog.clear()
        if role in writers:
            assert (await put(nc, subject)).get("seq"), subject
        else:
            with pytest.raises(Denied, match="do not allow"):
                await put(nc, subject)
            assert subject.lower() in caplog.text, "and it is said"
            assert "ERROR" in caplog.text
    mine = sorted(subject for subject, writers in MINE.items() if role in writers)
    assert await stored(root) == mine


@pytest.mark.parametrize("role", NAMES)
async def test_each_role_asks_of_jetstream_what_it_needs_and_nothing_else(role: str, login: Login) -> None:
    nc, root = await login(role), await login(ROOT)
    before = await api(root, "STREAM.NAMES")
    for method, askers in API.items():
        if role in askers:
            assert (await reply(nc, f"$JS.API.{method}", b"[]", PATIENT_S)).data, method
        else:
            with pytest.raises(Denied, match="do not allow"):
                await reply(nc, f"$JS.API.{method}", b"[]", PATIENT_S)
    assert (await api(root, "STREAM.NAMES"))["streams"] == before["streams"]
    assert await provision.drift(root, Deployment()) == []


async def test_counters_count_for_their_own_writers(login: Login) -> None:
    edge, inference = await login("edge"), await login("inference")
    one = {"Nats-Incr": "1"}
    for nc, mine, others in ((edge, "messages", "tokens"), (inference, "tokens", "messages")):
        assert (await put(nc, f"count.u.{mine}.1", b"", dict(one)))["val"] == "1"
        with pytest.raises(Denied):
            await put(nc, f"count.u.{others}.1", b"", dict(one))


async def test_a_denied_append_is_refused_at_once_and_names_its_subject(server: EmbeddedNats, login: Login) -> None:
    await login("provision")
    tape = await Tape.open(server.url_for("tools"), "tools")
    try:
        chain, token = Chain(tape, CONVERSATION, 0), Token(run="r", ts=1, step=1, attempt=1, text="forged")
        async with asyncio.timeout(AT_ONCE_S):
            with pytest.raises(Denied, match=r"publishing to tape\.\d\.c\.delta\.model"):
                await chain.append(subjects.MODEL_DELTA, token)
        async with asyncio.timeout(AT_ONCE_S):
            with pytest.raises(Denied):  # a batch, of which the first is its own
                await tape.append_batch(CONVERSATION, [Entry(subjects.TOOL, FORGED), Entry(subjects.MODEL, FORGED)], 0)
        assert await tape.last(CONVERSATION) == 0
    finally:
        await tape.close()


async def test_wrong_credentials_and_none_are_one_clear_error(server: EmbeddedNats) -> None:
    for user in ("edge:wrong@", "nobody:x@", ""):
        url = f"nats://{user}127.0.0.1:{server.port}"
        with pytest.raises(Denied, match="does not accept these credentials") as error:
            await connect(url, "stranger")
        assert "wrong" not in str(error.value)


@pytest.mark.parametrize(
    ("module", "role", "subject"),
    [
        ("services.inference", "tools", "CONSUMER.MSG.NEXT."),
        ("services.tools", "edge", "CONSUMER.CREATE.TAPE_"),
        ("services.provision", "auditor", "STREAM.CREATE"),
        ("services.edge", "nobody", "does not accept these credentials"),
    ],
)
async def test_a_service_with_anothers_credentials_ends_with_one_clear_line(
    module: str, role: str, subject: str, server: EmbeddedNats, login: Login
) -> None:
    root = await login(ROOT)
    await api(root, "STREAM.DELETE.DEAD")  # so that provision has something to do
    if module != "services.provision":
        await provision.apply(await login("provision"), Deployment())
    url = server.url_for(role) if role in NAMES else f"nats://{role}:x@127.0.0.1:{server.port}"
    env = {key: value for key, value in os.environ.items() if not key.startswith(("TAPELINE_", "OTEL_"))}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module),
        cwd=ROOT_FOLDER,
        env=env | {"TAPELINE_NATS_URL": url},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(30):
        said, _ = await process.communicate()
    assert process.returncode == EX_CONFIG, said.decode()
    assert "Traceback" not in said.decode()
    assert subject.lower() in said.decode().splitlines()[-1].lower()


# Having the server write what one may not


@pytest.mark.parametrize("role", ["edge", "inference", "tools", "auditor"])
async def test_a_reply_subject_forges_nothing(role: str, login: Login) -> None:
    """JetStream answers to any subject: one's own event, read with a token's subject to reply to, would be a token."""
    nc, root = await login(role), await login(ROOT)
    await put(root, "tape.0.c.fact.tool")
    await put(root, "tape.0.c.fact.call.clock")
    await consumer_of_clock(await login("tools"))
    copies = await root.subscribe("live.tape.>")
    before = await stored(root)
    targets = [*MINE, "live.tape.0.c.delta.model", "$JS.API.STREAM.PURGE.TAPE_0", "$JS.API.STREAM.DELETE.TAPE_0"]
    for target in (target for target in targets if role not in MINE.get(target, ())):
        for method, body in (
            ("DIRECT.GET.TAPE_0", b'{"seq":1}'),
            ("STREAM.MSG.GET.TAPE_0", b'{"last_by_subj":"tape.0.c.fact.tool"}'),
            ("DIRECT.GET.TAPE_0", b'{"seq":1,"batch":10,"next_by_subj":"tape.0.c.>"}'),
            ("STREAM.INFO.TAPE_0", b""),
            ("INFO", b""),
        ):
            await nc.publish(f"$JS.API.{method}", body, reply=target)
        if role == "tools":
            await nc.publish("$JS.API.CONSUMER.MSG.NEXT.TAPE_0.tool_clock", b"1", reply=target)
    await said_and_done(nc)
    await said_and_done(root)
    assert await stored(root) == before
    assert copies.pending_msgs == 0


async def test_the_reply_subject_would_forge_with_permissions_alone(tmp_path: Path) -> None:
    """The control: what the accounts are for."""
    server = EmbeddedNats(tmp_path)
    server.start()
    try:
        nc = await connect(server.url, "anyone")
        await provision.apply(nc, Deployment())
        await put(nc, "tape.0.c.fact.tool")
        await nc.publish("$JS.API.DIRECT.GET.TAPE_0", b'{"seq":1}', reply="tape.0.c.delta.model")
        async with asyncio.timeout(10):
            while "tape.0.c.delta.model" not in await stored(nc):
                await asyncio.sleep(0.01)
        await nc.close()
    finally:
        server.stop()


@pytest.mark.parametrize(
    "headers",
    [
        {"Nats-Schedule": "@at 2020-01-01T00:00:00Z", "Nats-Schedule-Target": "tape.0.c.delta.model"},
        {"Nats-Schedule": "@every 1s", "Nats-Schedule-Target": "tape.0.c.fact.input"},
        {"Nats-Rollup": "all"},
        {"Nats-Rollup": "sub"},
    ],
)
async def test_a_header_neither_forges_nor_purges(headers: dict[str, str], login: Login) -> None:
    """A stream that allows schedules writes for others what is scheduled there, and takes roll-ups, which purge."""
    root = await login(ROOT)
    await put(root, "tape.0.c.fact.input")
    for role, subject in (("tools", "tape.0.c.fact.tool"), ("edge", "tape.0.c.fact.input")):
        answer = await put(await login(role), subject, headers=dict(headers))
        assert answer["error"], "refused by the stream"
    assert await stored(root) == ["tape.0.c.fact.input"]


async def test_a_timer_reaches_no_conversation(login: Login) -> None:
    inference, root = await login("inference"), await login(ROOT)
    headers = {"Nats-Schedule": "@at 2020-01-01T00:00:00Z", "Nats-Schedule-Target": "tape.0.c.fact.input"}
    assert (await put(inference, "wake.0.at.c.r", headers=headers))["error"]
    assert await stored(root) == []


async def test_one_pool_cannot_withdraw_what_others_offer(login: Login) -> None:
    tools, root = await login("tools"), await login(ROOT)
    await put(root, "$KV.tapeline_tools.theirs.w")
    assert (await put(tools, "$KV.tapeline_tools.mine.w", headers={"Nats-Rollup": "all"}))["error"]
    assert await stored(root) == ["$KV.tapeline_tools.theirs.w"]


@pytest.mark.parametrize("headers", [{"Nats-Rollup": "sub"}, {"Nats-Rollup": "all"}, {"Nats-TTL": "1s"}])
async def test_a_stored_result_stays_as_it_is(headers: dict[str, str], server: EmbeddedNats, login: Login) -> None:
    """Another worker, of the same role, fills its subject, reorders nothing, pushes nothing out, and is found out where
    it came first."""
    tools, auditor = await login("tools"), await Tape.open(server.url_for("auditor"), "auditor")
    data = bytes(range(256)) * 3_000
    try:
        worker = await Tape.open(server.url_for("tools"), "tools")
        kept = await results.store(worker, CONVERSATION, "call", 1, data, "", 0)
        assert (kept.bytes, kept.chunks) == (768_000, 4)
        subject = subjects.result(CONVERSATION, "call", 1)
        assert (await put(tools, subject, headers=dict(headers)))["error"]
        refused: dict[str, Any] = {}
        while not refused:
            refused = (await put(tools, subject)).get("error", {})
        assert "maximum messages per subject" in refused["description"]
        assert b"".join([one async for one in results.chunks(auditor, CONVERSATION, "call", kept)]) == data
        await put(tools, subjects.result(CONVERSATION, "call", 2))
        with pytest.raises(Refused, match="somebody else"):
            await results.store(worker, CONVERSATION, "call", 2, data, "", 0)
        with pytest.raises(results.Broken):
            async for _ in results.chunks(auditor, CONVERSATION, "call", msgspec.structs.replace(kept, attempt=2)):
                pass
        await worker.close()
    finally:
        await auditor.close()


# Consumers


async def taken(nc: Client, name: str) -> Msg:
    """The next delivery. It comes under its own subject, so it is no reply as nats-py knows them."""
    inbox = nc.new_inbox()
    subscription = await nc.subscribe(inbox)
    await nc.publish(f"$JS.API.CONSUMER.MSG.NEXT.TAPE_0.{name}", b"1", reply=inbox)
    return await subscription.next_msg(PATIENT_S)


async def consumer_of_clock(nc: Client) -> None:
    await create(nc, "tool_clock", {})


async def create(nc: Client, name: str, more: dict[str, Any]) -> dict[str, Any]:
    filtered = "tape.0.*.fact.call.clock"
    config = {"name": name, "durable_name": name, "filter_subject": filtered, "ack_policy": "explicit"} | more
    body = {"stream_name": "TAPE_0", "config": config}
    return await api(nc, f"CONSUMER.CREATE.TAPE_0.{name}.{filtered}", body)


async def test_a_worker_makes_consumers_of_calls_and_of_nothing_else(login: Login) -> None:
    tools, root = await login("tools"), await login(ROOT)
    await consumer_of_clock(tools)
    for more in (
        {"filter_subject": "tape.0.>"},
        {"filter_subject": "", "filter_subjects": ["tape.0.>"]},
        {"filter_subject": ""},
    ):
        with pytest.raises(Refused):
            await create(tools, "wide", more)
    with pytest.raises(Denied):
        await create(tools, subjects.TRIGGERS, {})
    names = (await api(root, "CONSUMER.NAMES.TAPE_0"))["consumers"]
    assert sorted(names) == ["inference", "tool_clock"]


async def test_a_consumer_that_delivers_to_another_subject_delivers_nothing_there(login: Login) -> None:
    """The server takes such a consumer of anybody who may create one, and waits for somebody who listens there."""
    tools, root = await login("tools"), await login(ROOT)
    listening = await tools.subscribe("tape.1.c.fact.model")
    targets = ("tape.1.c.fact.model", "$JS.API.STREAM.PURGE.TAPE_1", "$JS.API.STREAM.DELETE.TAPE_2")
    await put(root, "tape.1.c.fact.input")
    for number, target in enumerate(targets):
        await create(tools, f"push{number}", {"deliver_subject": target, "headers_only": True, "ack_policy": "none"})
    try:
        await put(root, "tape.0.c.fact.call.clock")
        await said_and_done(root)
        for number, _ in enumerate(targets):
            info = await api(root, f"CONSUMER.INFO.TAPE_0.push{number}")
            assert (info["num_pending"], info["delivered"]["consumer_seq"]) == (1, 0)
        assert await stored(root) == ["tape.0.c.fact.call.clock", "tape.1.c.fact.input"]
        assert listening.pending_msgs == 0
    finally:
        for number, _ in enumerate(targets):
            await api(root, f"CONSUMER.DELETE.TAPE_0.push{number}")


@pytest.mark.parametrize("role", ["edge", "tools", "provision", "auditor"])
async def test_nobody_takes_or_answers_what_wakes_inference(role: str, login: Login) -> None:
    nc, root = await login(role), await login(ROOT)
    await put(root, "tape.0.c.fact.input")
    with pytest.raises(Denied):
        await reply(nc, "$JS.API.CONSUMER.MSG.NEXT.TAPE_0.inference", b"1", PATIENT_S)
    with pytest.raises(Denied):
        await reply(nc, "$JS.ACK.TAPE_0.inference.1.1.1.1.0", b"+ACK", PATIENT_S)
    with pytest.raises(Denied):  # the newer form of the same
        await reply(nc, "$JS.ACK._.hash.TAPE_0.inference.1.1.1.1.0.x", b"+ACK", PATIENT_S)
    delivered = await taken(root, subjects.TRIGGERS)
    assert delivered.data == FORGED
    await reply(root, delivered.reply, b"+ACK", PATIENT_S)


# Reading


async def test_an_auditor_reads_all(server: EmbeddedNats, login: Login) -> None:
    root = await login(ROOT)
    tape, auditor = await Tape.open(server.url, "root"), await Tape.open(server.url_for("auditor"), "auditor")
    try:
        copies: list[int] = []
        async with auditor.live(CONVERSATION, lambda record: copies.append(record.seq), lambda: None):
            await auditor.last(CONVERSATION)
            seq = await Chain(tape, CONVERSATION, 0).append(subjects.INPUT, Message(run="r", ts=1, content="hello"))
            async with asyncio.timeout(5):
                while not copies:
                    await asyncio.sleep(0.01)
        assert copies == [seq]
        assert [record.seq for record in await auditor.read(CONVERSATION)] == [seq]
        await put(root, "dead.tools", b"poison")
        assert [record.data for record in await auditor.stored(subjects.DEAD, "dead.>")] == [b"poison"]
        await provision.verify(auditor)
    finally:
        await tape.close()
        await auditor.close()


async def test_provision_reads_no_event(login: Login) -> None:
    nc, root = await login("provision"), await login(ROOT)
    heard = await nc.subscribe("live.tape.>")
    await put(root, "tape.0.c.fact.input")
    for method in ("DIRECT.GET.TAPE_0", "STREAM.MSG.GET.TAPE_0", "CONSUMER.MSG.NEXT.TAPE_0.inference"):
        with pytest.raises(Denied):
            await reply(nc, f"$JS.API.{method}", b'{"seq":1}', PATIENT_S)
    await said_and_done(nc)
    assert heard.pending_msgs == 0


@pytest.mark.parametrize("role", NAMES)
async def test_nobody_hears_anothers_replies_or_requests(role: str, login: Login) -> None:
    """Nor answers them: a stranger who listened on a service's subjects could answer in the server's place."""
    nc = await login(role)
    heard = [await nc.subscribe(subject) for subject in (">", "_INBOX.>", "_R_.>", "$JS.API.>", "tape.>")]
    await nc.flush()
    others = [name for name in (*NAMES, ROOT) if name != role]
    for other in others:
        await api(await login(other), "STREAM.INFO.TAPE_0")
    root = await login(ROOT)
    await put(root, "dead.tools", b"secret")
    await reply(root, "$JS.API.STREAM.MSG.GET.DEAD", b'{"last_by_subj":"dead.tools"}', PATIENT_S)
    await nc.flush()
    assert [subscription.pending_msgs for subscription in heard] == [0] * len(heard)


# A pool of another team


@pytest.fixture
async def crawlers(tmp_path: Path) -> AsyncIterator[EmbeddedNats]:
    """A server with a pool that has the tool `crawl` and no other."""
    roles = (*ROLES, permissions.pool("crawlers", ["crawl"]))
    server = EmbeddedNats(tmp_path, passwords=PASSWORDS | {"crawlers": "x"}, roles=roles)
    server.start()
    nc = await connect(server.url, "root")
    await provision.apply(nc, Deployment())
    await nc.close()
    yield server
    server.stop()


async def test_a_narrowed_pool_gets_the_calls_of_its_own_tools_only(crawlers: EmbeddedNats) -> None:
    root = await connect(crawlers.url, "root")
    tape = await Tape.open(crawlers.url_for("crawlers"), "crawlers")
    try:
        for shard in range(tape.deployment.shards):
            assert await consumer.ensure(tape, "crawl", shard)
        await put(tape.nc, "$KV.tapeline_tools.crawl.w")
        await put(root, "tape.0.c.fact.call.crawl", b"call")
        call = await taken(tape.nc, "tool_crawl")
        assert call.data == b"call"
        await reply(tape.nc, call.reply, b"+ACK", PATIENT_S)
        with pytest.raises(Denied):
            await consumer.ensure(tape, "pay", 0)
        for subject in ("$KV.tapeline_tools.pay.w", "$JS.API.CONSUMER.MSG.NEXT.TAPE_0.tool_pay", "tape.0.c.fact.model"):
            with pytest.raises(Denied):
                await reply(tape.nc, subject, b"1", PATIENT_S)
    finally:
        await tape.close()
        await root.close()


async def test_an_imported_subject_without_a_stream_is_no_silence(login: Login) -> None:
    with pytest.raises(NoRespondersError):
        await reply(await login("edge"), "tape.99.c.fact.input", b"", PATIENT_S)
