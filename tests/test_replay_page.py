"""The replay of a conversation, in a real browser on the real stack: what it shows is what the log says, event by
event, and what it exports is the log."""

import json
import random
import re
import signal
import time
from collections.abc import AsyncIterator
from decimal import ROUND_HALF_UP, Decimal
from typing import Any, Final

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, Request, Route, expect
from tapeline import events, limits, subjects
from tapeline.fold import State, fold
from tapeline.record import Entry, Record

from services.edge.frame import line
from tests.browser import axe
from tests.client import Client, log_of, opened
from tests.stack import Stack, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

LOAD_MS: Final = 20_000
LONG_EVENTS: Final = 20_000
NODES_MAX: Final = 1_500  # in the document, however long the log is
WORDS: Final = 200
FRAME_MS: Final = 17.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def recorded(stack: Stack) -> tuple[str, list[Record]]:
    """A conversation with two tools, and an answer whose worker was killed in the middle; and its log."""
    async with Client(stack.url) as client:
        conversation = await client.create(title="Recorded")
        told = await client.post(conversation, "the time and the sum 6 * 7")
        await client.run(conversation, told.run)
        long = await client.post(conversation, f"long {WORDS} words")
        async with client.events(conversation, run=long.run) as stream:
            while sum(one.event == "token" for one in stream.received) < WORDS // 4:
                assert await stream.more()
            stack.inferences[-1].end(signal.SIGKILL)
            stack.start_inference()
            await stream.rest()
    return conversation, await log_of(stack.nats.url, conversation)


@pytest_asyncio.fixture(loop_scope="module")
async def replayed(page: Page, recorded: tuple[str, list[Record]]) -> AsyncIterator[Page]:
    """Its replay, loaded."""
    await page.goto(f"/#{recorded[0]}/replay")
    await expect(page.locator(".replay .summary")).to_contain_text(f"{len(recorded[1])} events", timeout=LOAD_MS)
    yield page


def told(log: list[Record]) -> list[dict[str, Any]]:
    """The events, with their places in the log."""
    return [{"seq": record.seq, **json.loads(record.data)} for record in log]


async def pick(page: Page, log: list[Record], place: int) -> None:
    """Moves to an event by choosing it from the list, scrolled to where it is."""
    rows = page.get_by_role("listbox", name="Events")
    await rows.evaluate("(node, part) => { node.scrollTop = part * node.scrollHeight }", (place - 2) / len(log))
    await rows.locator(".row").filter(has=page.locator(".seq", has_text=re.compile(f"^{log[place].seq}$"))).click()
    await expect(page.locator(".record h2")).to_have_text(f"Event {log[place].seq}")


async def shown_words(page: Page) -> list[str]:
    """The words of all answers on the page, without their code."""
    texts = await page.locator(".replay .step .text").evaluate_all("""(nodes) => nodes.map((node) => {
        const copy = node.cloneNode(true);
        for (const code of copy.querySelectorAll("figure.code")) code.remove();
        const walker = document.createTreeWalker(copy, NodeFilter.SHOW_TEXT);
        let words = "";
        while (walker.nextNode()) words += ` ${walker.currentNode.data}`;
        return words;
    })""")
    return re.findall(r"\w+", " ".join(texts))


def words_of(state: State) -> list[str]:
    """The same of a fold; what is being written is shown by whole words."""
    texts = []
    for run in state.runs.values():
        for step in run.steps:
            is_open = not run.ended and step.finish is None
            texts.append(re.sub(r"\S+\Z", "", step.text) if is_open else step.text)
    return re.findall(r"\w+", re.sub(r"```.*?(```|\Z)", "", " ".join(texts), flags=re.DOTALL))


async def test_any_moment_is_the_fold_of_the_log_up_to_it(replayed: Page, recorded: tuple[str, list[Record]]) -> None:
    log = recorded[1]
    facts = told(log)
    seed = random.randrange(10_000)
    print(f"seed {seed}")
    claim = next(place for place, one in enumerate(facts) if one.get("supersedes"))
    tokens = [place for place, one in enumerate(facts) if one["type"] == "token" and one["run"] == facts[claim]["run"]]
    places = [*random.Random(seed).sample(tokens, 8), claim - 1, len(log) - 1]
    for place in places:
        await pick(replayed, log, place)
        state = fold(log[: place + 1])
        await expect(replayed.locator(".replay .run[data-status]")).to_have_count(len(state.runs))
        assert await shown_words(replayed) == words_of(state), f"event {log[place].seq}"
        done = [call.status == "done" for run in state.runs.values() for call in run.calls.values()]
        await expect(replayed.locator(".call:is([data-status=ok], [data-status=failed])")).to_have_count(sum(done))
        stored = await replayed.locator(".record pre").inner_text()
        assert json.loads(stored) == json.loads(line(log[place]))
    first = next(place for place, one in enumerate(facts) if one["type"] == "tool_started")
    await pick(replayed, log, first)
    running = replayed.locator(".call[data-status=running]")
    await expect(running).to_have_count(1)
    await expect(running.locator(".elapsed")).to_have_text("0.0 s")


async def test_text_is_whole_before_the_call_that_follows_it(
    replayed: Page, recorded: tuple[str, list[Record]]
) -> None:
    log = recorded[1]
    place = next(place for place, one in enumerate(told(log)) if one["type"] == "tool_input")
    await pick(replayed, log, place)
    (run,) = fold(log[: place + 1]).runs.values()
    words = re.findall(r"\w+", run.steps[0].text)
    assert words
    assert await shown_words(replayed) == words


async def test_an_attempt_that_does_not_count_says_so(replayed: Page, recorded: tuple[str, list[Record]]) -> None:
    facts = told(recorded[1])
    claim = next(one for one in facts if one.get("supersedes"))
    lost = [one for one in facts if one["run"] == claim["run"] and one.get("attempt") == 1 and one["type"] == "token"]
    await pick(replayed, recorded[1], facts.index(lost[-1]))
    chosen = replayed.locator(".row[aria-selected=true]:visible")
    await expect(chosen.locator("s.brief")).to_have_text(lost[-1]["text"].strip())
    await expect(chosen.filter(has=replayed.locator("s.brief"))).to_contain_text("superseded by attempt 2")
    await replayed.get_by_role("tab", name="Steps and tools").click()
    await replayed.locator(".row:visible").filter(has_text="superseded by attempt 2").click()
    written = replayed.locator(".attempt-text")
    await expect(written.locator("summary")).to_have_text("What attempt 1, superseded by 2 wrote")
    await expect(written.locator("p").last).to_have_text("".join(one["text"] for one in lost))


async def test_tool_bars_are_the_times_of_the_log(replayed: Page, recorded: tuple[str, list[Record]]) -> None:
    def spoken(ms: int) -> str:
        # JavaScript rounds a half up, Python to even.
        return f"{ms} ms" if ms < 1_000 else f"{Decimal(ms / 1_000).quantize(Decimal('0.1'), ROUND_HALF_UP)} s"

    await replayed.get_by_role("tab", name="Steps and tools").click()
    await replayed.get_by_role("slider", name="Moment").press("Home")
    by_call: dict[str, dict[str, Any]] = {}
    for one in told(recorded[1]):
        if one["type"] in ("tool_call", "tool_started", "tool_result"):
            by_call.setdefault(one["call"], {})[one["type"]] = one
    assert len(by_call) >= 2
    for one in by_call.values():
        issued, started, ended = (one[name]["ts"] for name in ("tool_call", "tool_started", "tool_result"))
        row = replayed.locator(".row:visible").filter(has_text=one["tool_call"]["tool"])
        facts = f"queue {spoken(started - issued)} · execution {spoken(ended - started)}"
        await expect(row.locator(".facts")).to_have_text(facts)
        queue, execution = [await row.locator(f".bars .{name}").bounding_box() for name in ("queue", "execution")]
        assert queue
        assert execution
        assert abs(queue["x"] + queue["width"] - execution["x"]) <= 2, "one follows the other"


async def test_it_plays_to_the_end_and_pauses(replayed: Page, recorded: tuple[str, list[Record]]) -> None:
    moment = replayed.get_by_role("slider", name="Moment")
    await moment.press("Home")
    assert (await moment.get_attribute("aria-valuetext") or "").endswith(f"event 1 of {len(recorded[1])}, conversation")
    await replayed.get_by_label("Speed").select_option("max")
    await replayed.get_by_role("button", name="Play").click()
    await expect(replayed.locator(".when")).to_contain_text(f"event {len(recorded[1])} of", timeout=LOAD_MS)
    await expect(replayed.get_by_role("button", name="Play")).to_be_visible()
    await expect(replayed.locator(".replay .text").last).to_contain_text(f"word{WORDS}")
    await replayed.get_by_role("button", name="Previous fact").click()
    await expect(replayed.locator(".record")).to_contain_text('"type": "answer"')
    await replayed.get_by_label("Facts only").check()
    facts = sum(record.is_fact for record in recorded[1])
    await expect(replayed.locator(".found")).to_have_text(f"{facts} shown")


async def test_it_plays_at_the_speed_it_says_and_stands_still_when_paused(replayed: Page) -> None:
    moment, play = replayed.get_by_role("slider", name="Moment"), replayed.locator(".play")
    length_ms = float(await moment.get_attribute("max") or "")
    await replayed.clock.install(time=0)
    await replayed.clock.pause_at(1_000)  # from here on time passes only as said below

    async def passed_ms() -> float:
        return float(await moment.input_value())

    for times in (1, 2, 5, 20):
        took_ms = int(min(1_000, 0.8 * length_ms / times))
        await moment.press("Home")
        await replayed.get_by_label("Speed").select_option(str(times))
        await play.click()
        await replayed.clock.run_for(took_ms)
        await play.click()
        at = await passed_ms()
        assert abs(at - took_ms * times) <= 2 * FRAME_MS * times, f"{times} times {took_ms} ms is not {at} ms"
        await replayed.clock.run_for(5_000)
        assert await passed_ms() == at, "it is paused"


async def test_the_export_is_the_log_byte_for_byte(
    replayed: Page, recorded: tuple[str, list[Record]], stack: Stack
) -> None:
    conversation, log = recorded
    await replayed.evaluate("delete window.showSaveFilePicker")  # as where pages may not write files
    async with replayed.expect_download() as started:
        await replayed.get_by_role("button", name="Export NDJSON").click()
    download = await started.value
    assert download.suggested_filename == f"{conversation}.ndjson"
    assert (await download.path()).read_bytes() == b"".join(map(line, log))
    said = f"Exported {len(log)} events as {conversation}.ndjson. Complete: each names the one before it"
    await expect(replayed.locator(".report")).to_contain_text(said)


async def test_what_comes_meanwhile_is_said_and_shown_when_wanted(page: Page, stack: Stack) -> None:
    async with Client(stack.url) as client:
        conversation, _ = await client.answered("long 5")
        await page.goto(f"/#{conversation}/replay")
        before = len(await client.lines(conversation))
        await expect(page.locator(".summary")).to_contain_text(f"{before} events", timeout=LOAD_MS)
        reading: set[Request] = set()
        page.on("requestfinished", lambda request: reading.discard(request))
        page.on("requestfailed", lambda request: reading.discard(request))
        page.on("request", lambda request: reading.add(request) if "/events" in request.url else None)
        for runs in (2, 3, 4):
            await client.run(conversation, (await client.post(conversation, "long 5 again")).run)
            after = len(await client.lines(conversation))
            newer = page.get_by_role("button", name=f"Show {after - before} newer events", exact=True)
            await newer.click()
            await expect(page.locator(".summary")).to_contain_text(f"{after} events · {runs} runs")
            await expect(page.locator(".replay .run[data-status]")).to_have_count(runs)
            await expect(newer).to_be_hidden()
            before = after
    await until("one reader of what comes", lambda: len(reading) == 1)  # a browser opens six to a host
    await page.goto("/#no-such-conversation/replay")
    await expect(page.get_by_text("There is no such conversation")).to_be_visible()


async def test_a_log_without_its_tokens_says_so(page: Page, stack: Stack) -> None:
    """Lost before their time they are a hole; expired, and the edge says so, the facts are shown."""
    async with Client(stack.url) as client:
        conversation, _ = await client.answered("long 5")
    tape = await opened(stack.nats.url)
    try:
        deltas = f"tape.{tape.shard(conversation)}.{conversation}.delta.>"
        await tape.nc.jetstream().purge_stream(f"TAPE_{tape.shard(conversation)}", subject=deltas)
        facts = await tape.read(conversation)
    finally:
        await tape.close()
    assert all(record.is_fact for record in facts)
    await page.goto(f"/#{conversation}/replay")
    await expect(page.locator(".summary")).to_contain_text(f"{len(facts)} events", timeout=LOAD_MS)
    await expect(page.locator(".summary")).not_to_contain_text("complete")
    await expect(page.locator(".notes")).to_contain_text("1 hole in the log")
    await expect(page.locator(".row .mark.bad")).to_have_text(re.compile(r"^hole: \d+ to \d+$"))
    gone = json.dumps({"code": "cursor_expired", "status": 410, "title": "gone"})

    async def expire(route: Route) -> None:
        if "view=compact" in route.request.url:
            await route.continue_()
        else:
            await route.fulfill(status=410, headers={"Content-Type": "application/problem+json"}, body=gone)

    await page.route("**/events*", expire)
    await page.reload()
    await expect(page.locator(".notes")).to_have_text(re.compile("^Tokens have expired here"), timeout=LOAD_MS)
    await expect(page.locator(".summary")).to_contain_text(f"{len(facts)} events")
    await expect(page.locator(".replay .text")).to_contain_text("word5")


async def test_nobody_is_kept_out(browser: Browser, stack: Stack, recorded: tuple[str, list[Record]]) -> None:
    context = await browser.new_context(base_url=stack.url, bypass_csp=True, reduced_motion="reduce")
    page = await context.new_page()
    await page.goto(f"/#{recorded[0]}/replay")
    await expect(page.locator(".summary")).to_contain_text("events", timeout=LOAD_MS)
    found = {}
    for width, tabs in ((1280, ("Events", "Steps and tools")), (390, ("Steps and tools", "Events", "Conversation"))):
        await page.set_viewport_size({"width": width, "height": 844})
        assert await page.evaluate("document.documentElement.scrollWidth") == width
        for name in tabs:
            await page.get_by_role("tab", name=name).click()
            if violations := await axe(page):
                found[f"{name} at {width}"] = violations
    # The conversation alone was chosen on the small screen: on a wide one the list is beside it.
    await page.set_viewport_size({"width": 1280, "height": 844})
    await expect(page.get_by_role("tab", name="Events")).to_have_attribute("aria-selected", "true")
    await expect(page.get_by_role("listbox", name="Events")).to_be_visible()
    await context.close()
    assert found == {}


async def test_a_long_conversation_stays_light(page: Page, stack: Stack) -> None:
    conversation = await long_conversation(stack)
    began = time.monotonic()
    await page.goto(f"/#{conversation}/replay")
    await expect(page.locator(".summary")).to_contain_text(f"{LONG_EVENTS + 4:,} events", timeout=LOAD_MS)
    loaded_s = time.monotonic() - began
    took = await page.evaluate("""async () => {
        const range = document.querySelector(".replay input[type=range]");
        const took = [];
        for (let part = 0; part <= 20; part++) {
            range.value = range.max * ((part * 7) % 21) / 20;
            const from = performance.now();
            range.dispatchEvent(new Event("input"));
            document.body.getBoundingClientRect();
            took.push(performance.now() - from);
            await new Promise(requestAnimationFrame);
        }
        return took.sort((a, b) => a - b);
    }""")
    nodes = await page.evaluate("document.querySelectorAll('*').length")
    scrub = f"a scrub takes {took[10]:.0f} ms, {took[-1]:.0f} at most"
    print(f"{LONG_EVENTS} events: loaded in {loaded_s:.1f} s, {nodes} nodes, {scrub}")
    assert nodes < NODES_MAX  # and film.test.ts says how little is folded for a move


async def long_conversation(stack: Stack) -> str:
    """One answer of very many tokens, with a break every hundred words as a model makes them."""
    async with Client(stack.url) as client:
        conversation = await client.create(title="Long")
    ts = 1_795_000_000_000
    about: dict[str, Any] = {"run": "long", "step": 1, "attempt": 1}
    tape = await opened(stack.nats.url)
    try:
        last = await tape.last(conversation)
        entries = [
            Entry(subjects.INPUT, events.encode(events.Message(run="long", ts=ts, content="go on"))),
            Entry(subjects.MODEL, events.encode(events.Step(**about, ts=ts, worker="mill", trigger=last + 1))),
        ]
        for number in range(LONG_EVENTS):
            text = "\n\n" * (number % 100 == 0) + f"word{number} "
            token = events.Token(**about, ts=ts + 20 * number, text=text)
            entries.append(Entry(subjects.MODEL_DELTA, events.encode(token)))
        entries.append(Entry(subjects.MODEL, events.encode(events.Done(**about, ts=ts, reason="stop"))))
        stack.inferences[-1].send(signal.SIGSTOP)  # it must not answer as well
        for start in range(0, len(entries), limits.BATCH_EVENTS_MAX):
            last = (await tape.append_batch(conversation, entries[start : start + limits.BATCH_EVENTS_MAX], last))[-1]
    finally:
        stack.inferences[-1].send(signal.SIGCONT)
        await tape.close()
    return conversation
