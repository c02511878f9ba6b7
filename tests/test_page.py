"""The page at `/`, in a real browser on the real stack with the `demo` model: what a person sees stays whole
through reloads, lost connections and hostile text."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, ConsoleMessage, Page, Route, async_playwright, expect

from tests.stack import Stack

# One browser for all; seconds: an answer is streamed in each, and some break what carries it.
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(90)]

CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
ANSWER_MS = 30_000  # an answer of the demo, the slow tool included
WORDS = 1_000
NOT_OURS = re.compile(r"Failed to load resource: ")  # the browser's own line about a request that failed

HOSTILE = (
    "<script>window.hacked = 1</script>"
    '<img src=x onerror="window.hacked = 2">'
    "[x](javascript:window.hacked=3)"
    "<a href='javascript:window.hacked=4'>y</a>"
)


def chromium() -> str:
    """Where Chromium is. Without one the tests are skipped, but not in CI."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    reason = "the page is NOT tested: no Chromium on this machine (Debian: apt-get install chromium)"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    path = chromium()
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield browser
        await browser.close()


@pytest_asyncio.fixture(loop_scope="module")
async def page(browser: Browser, stack: Stack) -> AsyncIterator[Page]:
    """The page, open. Any error it logs fails the test; requests a test makes fail are not the page's errors."""
    context = await browser.new_context(base_url=stack.url, viewport={"width": 1280, "height": 800})
    page = await context.new_page()
    errors: list[str] = []

    def heard(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not NOT_OURS.match(message.text):
            errors.append(message.text)

    page.on("console", heard)
    page.on("pageerror", lambda error: errors.append(str(error)))
    await page.goto("/")
    yield page
    assert errors == []
    await context.close()


class Line:
    """A TCP line between browser and edge that can be cut and mended."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._open: set[asyncio.StreamWriter] = set()
        self._cut = False

    @classmethod
    @contextlib.asynccontextmanager
    async def to(cls, port: int) -> AsyncIterator["Line"]:
        line = cls(port)
        server = await asyncio.start_server(line._carry, "127.0.0.1", 0)
        line.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield line
        server.close()
        line.cut()
        await server.wait_closed()

    url: str

    def cut(self) -> None:
        """Every connection breaks, and none can be made."""
        self._cut = True
        for writer in self._open:
            writer.transport.abort()

    def mend(self) -> None:
        self._cut = False

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._cut:
            writer.transport.abort()
            return
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._open |= {writer, far_writer}
        await asyncio.gather(self._copy(reader, far_writer), self._copy(far_reader, writer))
        self._open -= {writer, far_writer}

    @staticmethod
    async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.close()


async def ask(page: Page, text: str) -> None:
    await page.get_by_label("Message").fill(text)
    await page.keyboard.press("Enter")


async def answered(page: Page, runs: int = 1) -> None:
    await expect(page.locator(".timings:visible")).to_have_count(runs, timeout=ANSWER_MS)


async def words_shown(page: Page) -> list[int]:
    """The numbers of the `word…`s of a long answer, as they stand on the page."""
    return [int(number) for number in re.findall(r"\bword(\d+)", await page.locator(".text").last.inner_text())]


async def midway(page: Page) -> None:
    await expect(page.locator(".text").last).to_contain_text("word40 ", timeout=ANSWER_MS)
    assert max(await words_shown(page)) < WORDS, "the answer was over before it could be disturbed"


async def assert_as_on_the_tape(page: Page) -> None:
    """The page's state is the server's snapshot, and it looks as if it had been loaded afresh."""
    # Whether it was created by this page or another, a conversation is its URL.
    script = """async () => {
        const { current } = await import("/page/page.js");
        const { fromSnapshot } = await import("/page/state.js");
        const response = await fetch(`v1/conversations/${location.hash.slice(1)}`);
        const facts = ({ runs, last_event_id, title }) => JSON.stringify({
            title, last_event_id, runs: runs.map((run) => ({
                run: run.run, status: run.status, content: run.message.content, event_id: run.message.event_id,
                model: run.model, reason: run.reason, error: run.error, usage: run.usage,
                first_token_ms: run.first_token_ms, duration_ms: run.duration_ms,
                steps: run.steps.map((step) => ({
                    step: step.step, attempt: step.attempt, text: step.text, thinking: step.thinking,
                    finish: step.finish, calls: step.calls.map((call) => [call.call, call.tool, call.arguments,
                        call.status, call.outcome, call.is_error, call.content, call.message, call.duration_ms]),
                })),
            })),
        }, null, 1);
        return [facts(current()), facts(fromSnapshot(await response.json()))];
    }"""
    shown, stored = await page.evaluate(script)
    assert shown == stored
    here = await page.locator("#runs").inner_html()
    afresh = await page.context.new_page()
    await afresh.goto(page.url)
    await expect(afresh.locator(".run")).to_have_count(await page.locator(".run").count())
    assert await afresh.locator("#runs").inner_html() == here
    await afresh.close()


# What a person sees


async def test_an_answer_with_thinking_tools_and_a_table(page: Page) -> None:
    await ask(page, "Please work in parallel")
    await expect(page.locator(".question").first).to_have_text("Please work in parallel")
    await expect(page.get_by_role("button", name="Stop")).to_be_visible()
    await answered(page)
    await expect(page.locator(".by").first).to_contain_text("demo")
    await expect(page.locator(".badge").first).to_have_text("scripted demo")
    thinking = page.locator(".thinking").first
    await thinking.locator("summary").click()
    await expect(thinking.locator(".reasoning")).to_contain_text("I am a script")
    await thinking.locator("summary").click()
    calls = page.locator(".call")
    assert await calls.count() >= 2
    for call in await calls.all():
        await expect(call.locator(".elapsed")).to_have_text(re.compile(r"^\d.* m?s$"))
        assert await call.get_attribute("data-status") in ("ok", "failed")
    assert await page.locator(".text table tbody tr").count() >= 3
    assert await page.locator(".text pre code").count() >= 1
    await expect(page.locator(".timings")).to_contain_text("first token")
    await expect(page.get_by_role("button", name="Send")).to_be_visible()
    await assert_as_on_the_tape(page)


async def test_a_running_tool_counts_and_reports(page: Page) -> None:
    await ask(page, "Please work in parallel")
    running = page.locator('.call[data-status="running"]')
    await expect(running.first).to_be_visible(timeout=ANSWER_MS)
    await expect(running.first.locator(".elapsed")).to_have_text(re.compile(r"^[1-9]\d*\.\d s$"), timeout=ANSWER_MS)
    await expect(page.locator(".call progress:visible").first).to_be_visible(timeout=ANSWER_MS)
    await answered(page)


async def test_a_conversation_goes_on_and_others_are_a_click_away(page: Page) -> None:
    await ask(page, "long 5 first")
    await answered(page)
    await ask(page, "long 5 second")
    await answered(page, runs=2)
    first = page.url
    await page.get_by_role("button", name="New chat").click()
    await expect(page.locator(".run")).to_have_count(0)
    await ask(page, "long 5 elsewhere")
    await answered(page)
    assert page.url != first
    await page.get_by_role("link", name="long 5 first").click()
    await expect(page.locator(".run")).to_have_count(2)
    assert page.url == first
    await assert_as_on_the_tape(page)


async def test_two_tabs_see_the_same(page: Page) -> None:
    await ask(page, "long 5")
    await answered(page)
    other = await page.context.new_page()
    await other.goto(page.url)
    await answered(other)
    await ask(page, f"long {WORDS}")
    await midway(other)
    await answered(other, runs=2)
    await answered(page, runs=2)
    assert await words_shown(other) == list(range(1, WORDS + 1))
    assert await page.locator("#runs").inner_html() == await other.locator("#runs").inner_html()


async def test_the_drawer_of_a_small_screen(page: Page) -> None:
    await page.set_viewport_size({"width": 390, "height": 844})
    drawer = page.get_by_role("navigation")
    await expect(drawer).to_be_hidden()
    await page.get_by_role("button", name="Conversations").click()
    await expect(page.get_by_role("button", name="New chat")).to_be_focused()
    await page.keyboard.press("Escape")
    await expect(drawer).to_be_hidden()
    await ask(page, "long 400")
    await answered(page)
    assert await page.evaluate("document.documentElement.scrollWidth") == 390
    scroll = page.locator("#scroll")
    assert await scroll.evaluate("(node) => node.scrollTop + node.clientHeight > node.scrollHeight - 2")
    await scroll.evaluate("(node) => { node.scrollTop = 0 }")
    await page.get_by_role("button", name="Latest").click()
    assert await scroll.evaluate("(node) => node.scrollTop + node.clientHeight > node.scrollHeight - 2")


async def test_keys(page: Page) -> None:
    message = page.get_by_label("Message")
    await message.fill("long")
    await page.keyboard.press("Shift+Enter")
    await page.keyboard.type("300 words")
    await expect(message).to_have_value("long\n300 words")
    await page.keyboard.press("Enter")
    await expect(message).to_have_value("")
    await expect(page.locator(".question").first).to_have_text("long\n300 words")
    await midway(page)
    await message.focus()
    await page.keyboard.press("Escape")
    await expect(page.get_by_role("button", name="Stop")).to_be_focused()
    await page.keyboard.press("Enter")
    await answered(page)
    await expect(message).to_be_focused()


# Reloads and lost connections


async def test_a_reload_in_the_middle_continues(page: Page) -> None:
    await ask(page, f"long {WORDS}")
    await midway(page)
    await page.reload()
    await midway(page)
    await answered(page)
    assert await words_shown(page) == list(range(1, WORDS + 1))
    await assert_as_on_the_tape(page)


async def test_a_reload_while_tools_run_continues(page: Page) -> None:
    await ask(page, "Please work in parallel")
    await expect(page.locator('.call[data-status="running"]').first).to_be_visible(timeout=ANSWER_MS)
    await page.reload()
    await expect(page.locator(".call").first).to_be_visible()
    await answered(page)
    await assert_as_on_the_tape(page)


async def test_a_dropped_connection_continues_with_nothing_twice(page: Page, stack: Stack) -> None:
    async with Line.to(stack.ports[0]) as line:
        await page.goto(line.url)
        await ask(page, f"long {WORDS}")
        await midway(page)
        line.cut()
        await page.context.set_offline(True)
        await expect(page.locator("#connection")).to_have_text("Offline. Reconnecting…", timeout=10_000)
        before = await words_shown(page)
        assert before == list(range(1, len(before) + 1))
        assert len(before) < WORDS
        line.mend()
        await page.context.set_offline(False)
        await expect(page.locator("#connection")).to_be_hidden(timeout=2_000)
        await answered(page)
        assert await words_shown(page) == list(range(1, WORDS + 1))
        await assert_as_on_the_tape(page)
        await page.goto("about:blank")


async def test_a_connection_dropped_again_and_again_is_quiet_about_it(page: Page, stack: Stack) -> None:
    async with Line.to(stack.ports[0]) as line:
        await page.goto(line.url)
        await ask(page, f"long {WORDS}")
        await midway(page)
        for _ in range(5):
            line.cut()
            line.mend()
            await asyncio.sleep(0.3)
        await answered(page)
        assert await words_shown(page) == list(range(1, WORDS + 1))
        await assert_as_on_the_tape(page)
        await page.goto("about:blank")


async def test_an_edge_that_dies_is_outlived(page: Page, stack: Stack) -> None:
    await ask(page, f"long {WORDS}")
    await midway(page)
    stack.kill_edge()
    await expect(page.locator("#connection")).to_contain_text("Reconnecting", timeout=10_000)
    stack.start_edge()
    await answered(page)
    await expect(page.locator("#connection")).to_be_hidden()
    assert await words_shown(page) == list(range(1, WORDS + 1))
    await assert_as_on_the_tape(page)


async def test_a_takeover_shows_one_answer(page: Page, stack: Stack) -> None:
    await ask(page, f"long {WORDS}")
    await midway(page)
    stack.inferences[-1].end(signal.SIGKILL)
    stack.start_inference()
    await expect(page.locator(".attempt:visible")).to_contain_text("attempt 2", timeout=ANSWER_MS)
    await answered(page)
    assert await words_shown(page) == list(range(1, WORDS + 1))
    await assert_as_on_the_tape(page)


async def test_a_silent_connection_is_given_up(page: Page) -> None:
    """A connection that is dead but not closed: no byte, not even a heartbeat."""
    await ask(page, "long 5")
    await answered(page)
    await page.add_init_script("""
        const real = window.fetch;
        window.asked = 0;
        window.fetch = (url, options) => {
            if (!String(url).includes("/events") || ++window.asked > 1) return real(url, options);
            const body = new ReadableStream({ start: (c) => {
                options.signal.addEventListener("abort", () => c.error(options.signal.reason));
            } });
            return Promise.resolve(new Response(body, { headers: { "Content-Type": "text/event-stream" } }));
        };
    """)
    await page.clock.install()
    await page.reload()
    await page.wait_for_function("() => window.asked === 1")
    await page.clock.run_for(35_000)
    assert await page.evaluate("window.asked") == 1
    await page.clock.run_for(10_000)
    await page.wait_for_function("() => window.asked === 2")


async def test_a_hidden_tab_gives_its_connection_back(page: Page) -> None:
    """A browser opens six connections to a host: six forgotten tabs would block the seventh."""
    await ask(page, "long 5")
    await answered(page)
    await page.clock.install()
    await page.reload()
    root = page.locator("html")
    await expect(root).to_have_attribute("data-connection", "live")
    turn = """(hidden) => {
        Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    await page.evaluate(turn, True)
    await page.clock.run_for(65_000)
    await expect(root).to_have_attribute("data-connection", "paused")
    other = await page.context.new_page()
    await other.goto(page.url)
    await ask(other, "long 5 meanwhile")
    await answered(other, runs=2)
    await page.evaluate(turn, False)
    await expect(root).to_have_attribute("data-connection", "live")
    await page.clock.run_for(100)
    await answered(page, runs=2)


async def test_a_cursor_the_server_no_longer_has_loads_the_snapshot(page: Page) -> None:
    await ask(page, "long 5")
    await answered(page)
    gone = 0

    async def refuse_once(route: Route) -> None:
        nonlocal gone
        gone += 1
        if gone == 1:
            await problem(route, 410, "gone", "This cursor is older than what is kept.")
        else:
            await route.continue_()

    await page.route("**/events?*", refuse_once)
    await page.reload()
    await expect(page.locator(".run")).to_have_count(1)
    await ask(page, "long 5")
    await answered(page, runs=2)
    assert gone >= 2
    await assert_as_on_the_tape(page)


# Stop and refusals


async def test_stop(page: Page) -> None:
    await ask(page, f"long {WORDS}")
    await midway(page)
    await page.get_by_role("button", name="Stop").click()
    await expect(page.locator(".note")).to_have_text("Stopped.")
    shown = await words_shown(page)
    assert 40 <= len(shown) < WORDS
    await expect(page.get_by_role("button", name="Send")).to_be_visible()
    await assert_as_on_the_tape(page)
    await ask(page, "long 5")
    await answered(page, runs=2)


async def test_a_refused_message_is_not_lost(page: Page) -> None:
    keys: list[str | None] = []

    async def refuse(route: Route) -> None:
        keys.append(route.request.headers.get("idempotency-key"))
        await problem(route, 429, "rate_limited", "Too many messages in this minute.", {"Retry-After": "7"})

    await page.route("**/messages", refuse)
    await ask(page, "long 5 please")
    await expect(page.get_by_role("alert")).to_have_text("Too many messages in this minute. Try again in 7 s.")
    await expect(page.get_by_label("Message")).to_have_value("long 5 please")
    await page.get_by_role("button", name="Send").click()
    await expect(page.get_by_role("alert")).to_be_visible()
    assert keys[0]
    assert keys == keys[:1] * 2, "the same message, tried again, is the same message"
    await page.unroute("**/messages")
    await page.get_by_role("button", name="Send").click()
    await answered(page)
    await expect(page.locator(".run")).to_have_count(1)


async def test_a_conversation_that_does_not_exist(page: Page) -> None:
    await page.goto("/#no-such-conversation")
    await expect(page.get_by_text("This conversation does not exist")).to_be_visible()
    await page.locator("#missing").get_by_role("button", name="New chat").click()
    await ask(page, "long 5")
    await answered(page)


async def test_a_deployment_with_a_key(page: Page) -> None:
    async def guard(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer open sesame":
            await route.continue_()
        else:
            await problem(route, 401, "unauthorized", "A valid key is needed.")

    await page.route("**/v1/**", guard)
    await ask(page, "long 5")
    key = page.get_by_role("textbox", name="Key")
    await key.fill("wrong")
    await page.keyboard.press("Enter")
    await expect(page.get_by_text("That key was not accepted")).to_be_visible()
    await key.fill("open sesame")
    await page.keyboard.press("Enter")
    await answered(page)
    await page.reload()  # the tab keeps it
    await answered(page)


async def problem(route: Route, status: int, code: str, detail: str, headers: dict[str, str] | None = None) -> None:
    body = {"type": "about:blank", "title": code, "status": status, "detail": detail, "code": code}
    headers = {"Content-Type": "application/problem+json", **(headers or {})}
    await route.fulfill(status=status, headers=headers, body=json.dumps(body))


# Hostile text


async def test_hostile_text_stays_text(page: Page) -> None:
    await ask(page, f"{HOSTILE} long 5")
    await expect(page.locator(".question").first).to_have_text(f"{HOSTILE} long 5")
    await answered(page)
    assert await page.locator("#runs :is(script, img, iframe, object, form)").count() == 0
    assert await page.locator('#runs a[href^="javascript" i]').count() == 0
    assert await page.evaluate("window.hacked") is None


HOSTILE_MARKDOWN = [
    HOSTILE,
    "[a](JaVaScRiPt:alert(1)) [b](java\tscript:alert(1)) [c](data:text/html,x) [d](//evil.example) [e](/v1)",
    "![i](https://example.org/track.gif) <https://example.org/?a=<script>> <javascript:alert(1)>",
    "```<script>\n<script>x</script>\n```\n\n| <b>a</b> | b |\n|---|---|\n| <img src=x onerror=x> | [x](vbscript:x) |",
    "# <h1 onclick=x>\n- <li onclick=x>\n> <svg onload=x>",
    "[" * 20_000 + "](x)",
    "**a " * 5_000 + "*" * 5_000 + "`" * 5_000,
    "> " * 2_000 + "x\n" + "- " * 2_000 + "x\n" + "  " * 500 + "- x",
    "|" * 5_000 + "\n" + "|-" * 5_000,
]


async def test_hostile_markdown_makes_only_what_it_may(page: Page) -> None:
    script = """async (texts) => {
        const { markdown, progressive } = await import("/page/markdown.js");
        const names = new Set(), links = new Set(), attributes = new Set();
        let slowest = 0;
        for (const text of texts) {
            const box = document.createElement("div");
            document.body.append(box);
            const from = performance.now();
            box.append(...markdown(text));
            progressive(box)(text, true);
            slowest = Math.max(slowest, performance.now() - from);
            for (const node of box.querySelectorAll("*")) {
                names.add(node.localName);
                for (const { name } of node.attributes) attributes.add(name);
                if (node.localName === "a") links.add(node.protocol + " " + node.rel.includes("noopener"));
            }
            box.remove();
        }
        return [[...names], [...attributes], [...links], slowest];
    }"""
    names, attributes, links, slowest = await page.evaluate(script, HOSTILE_MARKDOWN)
    allowed = "p h3 h4 h5 h6 hr blockquote pre code ul ol li div table thead tbody tr th td strong em del a br span"
    assert set(names) <= set(allowed.split())
    assert set(attributes) <= {"class", "data-language", "href", "rel", "start", "tabindex", "target"}
    assert set(links) <= {"https: true", "http: true"}
    assert slowest < 2_000  # ms, for all of a text at once
    assert await page.evaluate("window.hacked") is None


# The pure parts, in the page's own runtime

STREAM = (
    "\ufeffretry: 2500\r\n: hello\r\n\r\n"
    'id: 7\r\nevent: token\r\ndata: {"text":"é – 漢字 👩‍🚀"}\r\n\r\n'
    "id:8\rdata: one\rdata:two\rdata\r\r"
    "event: ignored\n\n"
    "unknown: field\nid: 9\nid: bad\0id\ndata:  two spaces\n\n"
    ": hb\n\n"
    "retry: soon\nretry: 99\n\r\n"
    "data: last\nid: 10\r\n\n"
    "data: cut off"
)


async def test_the_parser_takes_bytes_split_anywhere(page: Page) -> None:
    script = """async (text) => {
        const { sseParser } = await import("/page/stream.js");
        const bytes = new TextEncoder().encode(text);
        const parse = (parts) => {
            const heard = [];
            const feed = sseParser({ onEvent: (event) => heard.push(event), onRetry: (ms) => heard.push(ms) });
            for (const part of parts) feed(part);
            return JSON.stringify(heard);
        };
        const found = new Set([parse([bytes]), parse(Array.from(bytes, (byte) => Uint8Array.of(byte)))]);
        for (let at = 0; at <= bytes.length; at++) found.add(parse([bytes.slice(0, at), bytes.slice(at)]));
        return [...found];
    }"""
    found = await page.evaluate(script, STREAM)
    assert len(found) == 1
    assert json.loads(found[0]) == [
        2500,
        {"id": "7", "type": "token", "data": '{"text":"é – 漢字 👩‍🚀"}'},
        {"id": "8", "type": "message", "data": "one\ntwo\n"},
        {"id": "9", "type": "message", "data": " two spaces"},
        99,
        {"id": "10", "type": "message", "data": "last"},
    ]


async def test_the_parser_is_bounded(page: Page) -> None:
    script = """async () => {
        const { sseParser, EVENT_CHARS_MAX } = await import("/page/stream.js");
        const piece = new TextEncoder().encode("x".repeat(100_000));
        const thrown = [];
        for (const between of ["", "\\ndata: "]) {
            const feed = sseParser({ onEvent: () => thrown.push("delivered") });
            feed(new TextEncoder().encode("data: "));
            try {
                for (let fed = 0; fed < EVENT_CHARS_MAX * 2; fed += piece.length) {
                    feed(piece);
                    feed(new TextEncoder().encode(between));
                }
            } catch (error) {
                thrown.push(error.name);
            }
        }
        return thrown;
    }"""
    assert await page.evaluate(script) == ["RangeError", "RangeError"]


async def test_an_event_counts_once_and_a_takeover_replaces(page: Page) -> None:
    def model(kind: str, attempt: int, **fields: Any) -> dict[str, Any]:
        return {"type": kind, "run": "r", "ts": 1, "step": 1, "attempt": attempt, **fields}

    tape = [
        {"type": "conversation", "run": "-", "ts": 1, "owner": "me", "title": "t"},
        {"type": "message", "run": "r", "ts": 1, "content": "hi"},
        model("step", 1, worker="a", trigger=2),
        model("token", 1, text="half an ans"),
        model("step", 2, worker="b", trigger=2, supersedes={"attempt": 1, "first": 4, "last": 4}),
        {"type": "from_the_future", "run": "r", "ts": 1},
        {"type": "toString", "run": "r", "ts": 1},
        model("token", 2, text="an "),
        model("token", 2, text="answer"),
        model("done", 2, reason="stop", duration_ms=5),
    ]
    script = """async (events) => {
        const { EMPTY, reduce } = await import("/page/state.js");
        let state = EMPTY;
        const seen = [];
        for (const event of events) {
            state = reduce(state, event);
            if (reduce(state, event) !== state) throw new Error("applied twice");
            seen.push(state.runs[0]?.steps[0]?.text ?? null);
        }
        if (events.reduce(reduce, state) !== state) throw new Error("applied again");
        return [seen, state.runs[0].status, state.runs[0].steps.length];
    }"""
    events = [{**event, "id": number} for number, event in enumerate(tape, start=1)]
    seen, status, steps = await page.evaluate(script, events)
    half = "half an ans"
    assert seen == [None, None, "", half, half, half, half, "an ", "an answer", "an answer"]
    assert (status, steps) == ("done", 1)


async def test_markdown_drawn_as_it_comes_equals_markdown_drawn_at_once(page: Page) -> None:
    text = (
        "Intro with **bold *both* bold**, `code`, snake_case and 2 * 3.\n# Title #\ntext\n\n"
        "1. one\n   - nested\n     deeper\n\n2. two\n\n   second paragraph\n10. ten\n\n"
        "| a | b |\n|:-:|--:|\n| 1 | `x` |\n| 2 | [l](https://example.org/a_(b)) |\nafter\n\n"
        "```py\nfor x in y:\n\n    print('# no heading')\n```\n> quote\n> - list\n\n---\n* * *\nEnd https://example.org/x."
    )
    script = """async (text) => {
        const { markdown, progressive } = await import("/page/markdown.js");
        const whole = document.createElement("div");
        whole.append(...markdown(text));
        const box = document.createElement("div");
        const update = progressive(box);
        for (let end = 1; end <= text.length; end++) update(text.slice(0, end), true);
        update(text, false);
        return [box.innerHTML, whole.innerHTML];
    }"""
    grown, whole = await page.evaluate(script, text)
    assert grown == whole
    for fragment in (
        "<strong>bold <em>both</em> bold</strong>",
        "<ol><li>one<ul><li>nested\ndeeper</li></ul></li>",
        '<td class="right"><code>x</code></td>',
        '<a href="https://example.org/a_(b)"',
        "\n\n    print('# no heading')",
        "snake_case and 2 * 3",
        ">https://example.org/x</a>.",
    ):
        assert fragment in whole
