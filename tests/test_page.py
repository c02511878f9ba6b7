"""The page at `/`, in a real browser on the real stack with the `demo` model: what a person sees stays whole
through reloads, lost connections and hostile text."""

import asyncio
import contextlib
import json
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
from playwright.async_api import Browser, CDPSession, Page, Route, expect

from tests.browser import axe
from tests.line import Line
from tests.model_server import ModelServer, answers, refuses
from tests.stack import Stack

# One browser for all.
pytestmark = pytest.mark.asyncio(loop_scope="module")

ANSWER_MS = 60_000  # an answer of the demo, the slow tool included
WORDS = 1_000
ENDLESS = 20 * WORDS  # for an answer that is to be stopped, however slow the machine
OFFLINE_S = 20
CHATS = 30  # in a row
LIST_PAGE = 40  # conversations that the side bar asks for at a time
NODES_A_CHAT_MAX = 20  # what a conversation may leave in the page: its line in the side bar
HEAP_A_CHAT_MAX = 60_000  # bytes
OTHER_MODEL = "openai:other"

HOSTILE = (
    "<script>window.hacked = 1</script>"
    '<img src=x onerror="window.hacked = 2">'
    "[x](javascript:window.hacked=3)"
    "<a href='javascript:window.hacked=4'>y</a>"
)
HOSTILE_ANSWER = "\n\n".join(
    (
        HOSTILE,
        "[a](JaVaScRiPt:alert(1)) [b](java\tscript:alert(1)) [c](data:text/html,x) ![i](https://example.org/track.gif)",
        "# <h1 onclick=x>\n- <li onclick=x>\n> <svg onload=x>",
        "bidi: \u202egnp.exe\u202c and \u2066isolated",
        "|" + " a |" * 10_000 + "\n|" + " - |" * 10_000 + "\n|" + " b |" * 10_000,
        "[" * 5_000 + "](x)",
        "**a " * 2_000 + "*" * 2_000,
        "> " * 1_000 + "x",
        "```js\nlet unclosed = '<script>window.hacked = 5</script>';\nTHE END",
    )
)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The whole of Tapeline with two models: the demo, and one that answers with whatever is hostile."""
    with ModelServer(
        answers("hostile", HOSTILE_ANSWER),
        refuses("be refused", 400, "No such thing."),
        answers("draw twice", calls=[("draw_lots", {"names": [name]}) for name in "ab"], after_results=False),
        answers("", "An ordinary answer."),
        chunk_chars=2_000,
    ) as server:
        env = {**server.environ, "TAPELINE_MODELS": f"demo,{OTHER_MODEL}"}
        stack = Stack(tmp_path_factory.mktemp("stack"), env)
        try:
            yield stack.start()
        finally:
            stack.stop()


async def ask(page: Page, text: str) -> None:
    await page.get_by_label("Message", exact=True).fill(text)
    await page.keyboard.press("Enter")


async def answered(page: Page, runs: int = 1) -> None:
    await expect(page.locator(".timings:visible")).to_have_count(runs, timeout=ANSWER_MS)
    await expect(page.locator(".code.pending")).to_have_count(0)


async def words_shown(page: Page) -> list[int]:
    """The numbers of the `word…`s of a long answer, as they stand on the page."""
    return [int(number) for number in re.findall(r"\bword(\d+)", await page.locator(".text").last.inner_text())]


async def midway(page: Page, words: int = WORDS) -> None:
    await expect(page.locator(".text").last).to_contain_text("word40 ", timeout=ANSWER_MS)
    assert max(await words_shown(page)) < words, "the answer was over before it could be disturbed"


async def assert_as_on_the_tape(page: Page) -> None:
    """The page's state is the server's snapshot, and it looks as if it had been loaded afresh."""
    # Whether it was created by this page or another, a conversation is its URL.
    script = """async () => {
        const { current, fromSnapshot } = window.tapeline;
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
    await expect(afresh.locator(".code.pending")).to_have_count(0)
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
    await expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    await assert_as_on_the_tape(page)


async def test_a_running_tool_counts_and_reports(page: Page) -> None:
    await ask(page, "search notes and stream")
    running = page.locator('.call[data-status="running"]')
    await expect(running.first).to_be_visible(timeout=ANSWER_MS)
    await expect(running.first.locator(".elapsed")).to_have_text(re.compile(r"^[1-9]\d*\.\d s$"), timeout=ANSWER_MS)
    await expect(page.locator(".call progress:visible").first).to_be_visible(timeout=ANSWER_MS)
    output = page.locator(".call .output:visible")
    await expect(output).to_have_text(re.compile("^27 → 82\n82 → 41\n"), timeout=ANSWER_MS)
    await page.reload()
    await expect(output).to_have_text(re.compile("^27 → 82\n82 → 41\n(.*\n)*9232 → "), timeout=ANSWER_MS)
    assert await output.evaluate("box => box.scrollTop + box.clientHeight > box.scrollHeight - 30"), "it follows"
    await answered(page)
    await expect(output).to_have_count(0)


async def test_each_approval_is_announced_and_nothing_ticks_while_nothing_runs(page: Page) -> None:
    await page.clock.install()
    await page.evaluate("""() => {
        const node = document.querySelector("#announcement");
        window.announced = [];
        const heard = (changes) => changes.forEach(({ addedNodes: [said] }) => window.announced.push(said.textContent));
        new MutationObserver(heard).observe(node, { childList: true });
        const real = Element.prototype.querySelectorAll;
        window.ticks = 0;
        Element.prototype.querySelectorAll = function (selector) {
            if (selector === "[data-since]") window.ticks += 1;
            return real.call(this, selector);
        };
    }""")
    await page.get_by_label("Model").select_option(OTHER_MODEL)
    await ask(page, "draw twice")
    await expect(page.get_by_role("button", name="Approve")).to_have_count(2, timeout=ANSWER_MS)
    announced = [words for words in await page.evaluate("window.announced") if words.startswith("Waiting for your")]
    assert " ".join(announced).count("draw_lots") == 2
    await page.clock.run_for(10_000)
    assert await page.evaluate("window.ticks") == 0
    for _ in range(2):
        await page.get_by_role("button", name="Deny").first.click()
    await answered(page)


async def test_a_call_waits_for_approval_and_its_arguments_can_be_edited(page: Page) -> None:
    await ask(page, "approval")
    call = page.locator('.call[data-status="waiting"]')
    await expect(call).to_contain_text("waits for approval", timeout=ANSWER_MS)
    other = await page.context.new_page()
    await other.goto(page.url)
    await expect(other.get_by_role("button", name="Approve")).to_be_visible()
    arguments = page.get_by_role("textbox", name="Arguments")
    assert json.loads(await arguments.input_value()) == {"names": ["tea", "coffee"]}
    await arguments.fill("water")
    await page.get_by_role("button", name="Approve").click()
    await expect(page.get_by_role("alert")).to_contain_text("JSON object")
    await arguments.fill('{"names": ["water"]}')
    await page.get_by_role("button", name="Approve").click()
    await answered(page)
    await answered(other)
    drawn = page.locator(".call", has_text="draw_lots")
    await expect(drawn.locator(".outcome")).to_have_text("drawn: water")
    await expect(other.get_by_role("button", name="Approve")).to_have_count(0)
    await assert_as_on_the_tape(page)
    await ask(other, "approval once more")
    await other.get_by_label("Reason for denying").fill("not today")
    await other.get_by_role("button", name="Deny").click()
    await answered(page, runs=2)
    drawn = page.locator(".call", has_text="draw_lots").last
    await expect(drawn.locator(".verdict")).to_have_text("Denied by local: not today")
    await expect(drawn).to_have_attribute("data-status", "failed")
    await other.close()


async def test_what_is_approved_is_what_is_read(page: Page) -> None:
    """Arguments that a bidi control would show in another order, as where a model was talked into them."""
    await ask(page, "approval")
    await expect(page.get_by_role("button", name="Approve")).to_be_visible(timeout=ANSWER_MS)

    async def spoof(route: Route) -> None:
        response = await route.fetch()
        await route.fulfill(response=response, body=(await response.text()).replace("coffee", "\u202efdp.exe"))

    await page.route(re.compile(r"/v1/conversations/\w+$"), spoof)
    await page.reload()
    arguments = page.get_by_role("textbox", name="Arguments")
    await expect(arguments).to_have_value(re.compile(r"\\u202efdp\.exe"))
    call = page.locator(".call", has_text="draw_lots")
    await expect(call.locator(".given")).to_contain_text("[U+202E]fdp.exe")
    assert "\u202e" not in (await call.text_content() or "") + await arguments.input_value()
    await page.get_by_role("button", name="Approve").click()
    await expect(call.locator(".outcome")).to_have_text(re.compile("^drawn: (tea|coffee)$"), timeout=ANSWER_MS)
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


async def test_two_tabs_see_the_same_and_each_can_stop(page: Page) -> None:
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
    await ask(page, f"long {ENDLESS}")
    await expect(page.locator(".run .text")).to_have_count(3, timeout=ANSWER_MS)
    await midway(page, ENDLESS)
    await other.get_by_role("button", name="Stop").click()
    await expect(page.locator(".note:visible")).to_have_text("Stopped.")
    await answered(other, runs=3)
    assert 40 <= len(await words_shown(page)) < ENDLESS
    assert await page.locator("#runs").inner_html() == await other.locator("#runs").inner_html()


async def test_the_list_is_the_servers_and_each_can_be_named_and_deleted(page: Page) -> None:
    await ask(page, "long 5 to be named")
    await answered(page)
    other = await page.context.new_page()
    await other.goto("/")
    await expect(other.get_by_role("link", name="long 5 to be named")).to_be_visible()
    entry = page.locator("#list li", has=page.locator("[aria-current]"))
    await entry.get_by_role("link").focus()
    await page.keyboard.press("Tab")
    await page.keyboard.press("Enter")  # Rename, by keys alone
    await page.get_by_role("textbox", name="Title").fill("Named here")
    await page.keyboard.press("Enter")
    await expect(page.locator("#title")).to_have_text("Named here")
    await expect(entry.get_by_role("link")).to_have_text("Named here")
    await expect(entry.get_by_role("button", name="Rename")).to_be_focused()
    await other.evaluate("window.dispatchEvent(new Event('focus'))")
    await expect(other.get_by_role("link", name="Named here")).to_be_visible()
    await other.goto(page.url)
    await answered(other)
    await entry.get_by_role("button", name="Delete").click()
    await page.get_by_role("button", name="Cancel").click()
    await expect(page.locator(".run")).to_have_count(1)
    await entry.get_by_role("button", name="Delete").click()
    await page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    await expect(page.get_by_role("link", name="Named here")).to_have_count(0)
    await expect(page.locator("#welcome")).to_be_visible()
    await expect(other.get_by_text("This conversation does not exist")).to_be_visible()
    await expect(other.get_by_role("link", name="Named here")).to_have_count(0)


async def test_answers_again_and_questions_edited_have_versions(page: Page) -> None:
    await ask(page, "long 5 first")
    await answered(page)
    await ask(page, "long 6 second")
    await answered(page, runs=2)
    last = page.locator(".run").last
    await last.get_by_role("button", name="Answer again").click()
    await expect(last.locator(".counter")).to_have_text("2/2", timeout=ANSWER_MS)
    await answered(page, runs=2)
    question = page.locator(".run").first
    await question.locator(".asked").hover()
    await question.get_by_role("button", name="Edit").click()
    edited = page.get_by_role("textbox", name="Edited message")
    await expect(edited).to_have_value("long 5 first")
    await edited.fill("long 7 instead")
    await page.keyboard.press("Enter")
    await expect(page.locator(".question:visible")).to_have_text(["long 7 instead"])
    await answered(page, runs=1)
    assert await words_shown(page) == [*range(1, 8)]
    await page.reload()
    await answered(page, runs=1)
    await expect(page.locator(".counter:visible")).to_have_text("2/2")
    await page.get_by_role("button", name="Earlier version").click()
    await expect(page.locator(".question:visible")).to_have_text(["long 5 first", "long 6 second"])
    await expect(page.locator(".counter:visible")).to_have_text(["1/2", "2/2"])
    await expect(page.get_by_role("button", name="Edit")).to_have_count(0)  # it counts no longer: nothing can follow it
    await page.get_by_role("button", name="Later version").first.click()
    await expect(page.locator(".question:visible")).to_have_text(["long 7 instead"])


async def test_the_model_is_the_persons_choice(page: Page) -> None:
    await page.get_by_label("Model").select_option(OTHER_MODEL)
    await ask(page, "who are you?")
    await answered(page)
    await expect(page.locator(".model")).to_have_text(OTHER_MODEL)
    await expect(page.locator(".badge")).to_be_hidden()
    await page.reload()
    await expect(page.get_by_label("Model")).to_have_value(OTHER_MODEL)


async def test_an_answer_is_copied_as_markdown(page: Page) -> None:
    await ask(page, "fail")
    await answered(page)
    copy = page.get_by_role("button", name="Copy the answer")
    await page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    await copy.click()
    await expect(page.locator(".actions .said")).to_have_text("Copied")
    copied = await page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith("**Scripted demo model, not an AI.** You said")
    assert "\n- `fail` failed: " in copied
    await expect(page.locator(".actions .said")).to_have_count(0)
    await page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")  # http, not localhost
    await copy.click()
    await expect(page.locator(".actions .said")).to_have_text("Copied")
    await expect(page.locator(".actions .said")).to_have_count(0)
    await page.evaluate("document.execCommand = () => false")
    await copy.click()
    await expect(page.locator(".actions .said")).to_contain_text("Not copied")


async def test_a_draft_is_kept_with_its_conversation(page: Page) -> None:
    await ask(page, "long 5 with a draft")
    await answered(page)
    here = page.url
    message = page.get_by_label("Message", exact=True)
    await message.fill("half a thou")
    await page.keyboard.press("Control+k")
    await expect(message).to_have_value("")
    await message.fill("another")
    await page.goto(here)
    await expect(message).to_have_value("half a thou")
    await page.reload()
    await expect(message).to_have_value("half a thou")
    await page.keyboard.press("Control+k")
    await expect(message).to_have_value("another")


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
    message = page.get_by_label("Message", exact=True)
    await message.fill("long")
    await page.keyboard.press("Shift+Enter")
    await page.keyboard.type(f"{ENDLESS} words")
    await expect(message).to_have_value(f"long\n{ENDLESS} words")
    await page.keyboard.press("Enter")
    await expect(message).to_have_value("")
    await expect(page.locator(".question").first).to_have_text(f"long\n{ENDLESS} words")
    await midway(page, ENDLESS)
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


async def test_nothing_is_being_written_in_a_replay(page: Page) -> None:
    await ask(page, f"long {ENDLESS}")
    await midway(page, ENDLESS)
    await expect(page.locator("html")).to_have_class("writing")
    await page.get_by_role("link", name="Replay").click()
    await expect(page.locator(".replay .summary")).to_contain_text("events", timeout=ANSWER_MS)
    await expect(page.locator("html")).not_to_have_class("writing")
    await page.get_by_role("link", name="Back to the chat").click()
    await page.get_by_role("button", name="Stop").click()
    await answered(page)


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
        await expect(page.locator("#connection")).to_have_text("Offline", timeout=10_000)
        await asyncio.sleep(OFFLINE_S)
        before = await words_shown(page)
        assert before == list(range(1, len(before) + 1))
        assert len(before) < WORDS
        line.mend()
        await page.context.set_offline(False)
        # That this is at once is for presence.test.ts: how soon a browser's network works is not for the page to say.
        await expect(page.locator("html")).to_have_attribute("data-connection", "live", timeout=ANSWER_MS)
        await expect(page.locator("#connection")).to_be_hidden()
        await answered(page)
        assert await words_shown(page) == list(range(1, WORDS + 1))
        await assert_as_on_the_tape(page)
        await page.goto("about:blank")


async def test_a_connection_dropped_again_and_again_is_quiet_about_it(page: Page, stack: Stack) -> None:
    async with Line.to(stack.ports[0]) as line:
        await page.goto(line.url)
        await ask(page, f"long {WORDS}")
        await midway(page)
        await page.evaluate("""() => {
            const root = document.documentElement, line = document.getElementById("connection");
            const seen = window.seen = { losses: 0, returns: 0, lostAt: null, saidAfterMs: [] };
            new MutationObserver(() => {
                if (root.dataset.connection === "live") {
                    if (seen.lostAt !== null) seen.returns += 1;
                    seen.lostAt = null;
                } else if (seen.lostAt === null) {
                    seen.losses += 1;
                    seen.lostAt = performance.now();
                }
            }).observe(root, { attributeFilter: ["data-connection"] });
            new MutationObserver(() => {
                if (!line.hidden) seen.saidAfterMs.push(performance.now() - seen.lostAt);
            }).observe(line, { attributeFilter: ["hidden"] });
        }""")
        for cut in range(1, 6):
            before = line.connections
            line.cut()
            line.mend()
            await page.wait_for_function("(cut) => window.seen.returns >= cut", arg=cut, timeout=ANSWER_MS)
            assert line.connections > before
        await expect(page.locator("#connection")).to_be_hidden()
        seen = await page.evaluate("window.seen")
        assert seen["losses"] == 5
        assert all(ms > 2_400 for ms in seen["saidAfterMs"]), "a short loss is nobody's business"
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


async def lost(page: Page) -> None:
    """Until the page says so, on its clock."""
    for _ in range(100):
        await page.clock.run_for(31_000)  # longer than between any two tries
        if await page.locator("html").get_attribute("data-connection") == "lost":
            break


async def test_a_server_that_stays_away_can_be_tried_by_hand(page: Page, stack: Stack) -> None:
    await ask(page, "long 5")
    await answered(page)
    here = page.url.rpartition("#")[2]
    async with Line.to(stack.ports[0]) as line:
        await page.clock.install()
        await page.goto(f"{line.url}/#{here}")
        root = page.locator("html")
        await expect(root).to_have_attribute("data-connection", "live")
        line.cut()
        await lost(page)
        await expect(page.locator("#connection")).to_have_text("The server cannot be reached.Try now")
        await expect(page.locator(".run")).to_have_count(1)  # and it can be read all the while
        line.mend()
        await page.get_by_role("button", name="Try now").click()
        await expect(root).to_have_attribute("data-connection", "live")
        await expect(page.locator("#connection")).to_be_hidden()
        await page.goto("about:blank")


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


async def test_what_is_said_of_a_connection_is_true(page: Page) -> None:
    """It is not "reconnecting" what was never connected, and who is refused is told why."""
    await ask(page, "long 5")
    await answered(page)
    go_on = asyncio.Event()

    async def hold(route: Route) -> None:
        await go_on.wait()
        await route.continue_()

    async def refuse(route: Route) -> None:
        await problem(route, 429, "too_many_streams", words, {"Retry-After": "1"})

    words = "You have 50 streams open, and no more are allowed. Close some of them, or come again later."
    snapshot, line = re.compile(r"/v1/conversations/\w+$"), page.locator("#connection")
    await page.route(snapshot, hold)
    await page.reload()
    await expect(line).to_have_text("Connecting…")
    await page.route("**/events?*", refuse)
    go_on.set()
    await expect(line).to_have_text(words)
    await page.set_viewport_size({"width": 390, "height": 844})
    await expect(page.get_by_role("link", name="Replay")).to_be_in_viewport(ratio=1)
    await page.unroute("**/events?*")
    await expect(line).to_be_hidden(timeout=ANSWER_MS)
    await expect(page.locator("html")).to_have_attribute("data-connection", "live")


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
    await ask(page, f"long {ENDLESS}")
    await midway(page, ENDLESS)
    await page.get_by_role("button", name="Stop").click()
    await expect(page.locator(".note")).to_have_text("Stopped.")
    shown = await words_shown(page)
    assert 40 <= len(shown) < ENDLESS
    await expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
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
    await expect(page.get_by_label("Message", exact=True)).to_have_value("long 5 please")
    await page.get_by_role("button", name="Send", exact=True).click()
    await expect(page.get_by_role("alert")).to_be_visible()
    assert keys[0]
    assert keys == keys[:1] * 2, "the same message, tried again, is the same message"
    await page.unroute("**/messages")
    await page.get_by_role("button", name="Send", exact=True).click()
    await answered(page)
    await expect(page.locator(".run")).to_have_count(1)


async def test_what_was_written_while_a_message_was_refused_is_kept_as_well(page: Page) -> None:
    go_on = asyncio.Event()

    async def refuse(route: Route) -> None:
        await go_on.wait()
        await problem(route, 429, "rate_limited", "Too many messages in this minute.")

    await page.route("**/messages", refuse)
    message = page.get_by_label("Message", exact=True)
    await ask(page, "long 5 please")
    await expect(message).to_have_value("")
    await message.fill("and another thing")
    go_on.set()
    await expect(message).to_have_value("long 5 please\n\nand another thing")
    await page.reload()
    await expect(message).to_have_value("long 5 please\n\nand another thing")


async def test_an_edit_that_is_refused_is_not_lost(page: Page) -> None:
    await ask(page, "long 5 first")
    await answered(page)
    await ask(page, "long 5 second")
    await answered(page, runs=2)

    async def refuse(route: Route) -> None:
        await problem(route, 429, "rate_limited", "Too many messages in this minute.")

    await page.route("**/messages", refuse)
    first, second = page.locator(".run").first, page.locator(".run").last
    await first.locator(".asked").hover()
    await first.get_by_role("button", name="Edit").click()
    edited = page.get_by_role("textbox", name="Edited message")
    await edited.fill("long 7 instead")
    await page.keyboard.press("Enter")
    await expect(first.get_by_role("alert")).to_have_text("Too many messages in this minute.")
    await expect(edited).to_have_value("long 7 instead")
    await expect(edited).to_be_focused()
    await expect(page.locator(".question:visible")).to_have_text(["long 5 second"])
    await page.keyboard.press("Escape")
    again = second.get_by_role("button", name="Answer again")
    await again.click()
    await expect(second.get_by_role("alert")).to_have_text("Too many messages in this minute.")
    await expect(again).to_be_focused()
    await page.unroute("**/messages")
    await again.click()
    await expect(page.locator(".counter:visible")).to_have_text("2/2", timeout=ANSWER_MS)
    await expect(page.get_by_label("Message", exact=True)).to_be_focused()
    await answered(page, runs=2)


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


async def test_who_gives_no_key_is_not_asked_each_time_they_come_back(page: Page) -> None:
    asked: list[str] = []

    async def guard(route: Route) -> None:
        asked.append(route.request.url)
        await problem(route, 401, "unauthorized", "A valid key is needed.")

    await page.route("**/v1/**", guard)
    await page.reload()
    await expect(page.get_by_role("textbox", name="Key")).to_be_focused()
    await page.keyboard.press("Escape")
    await expect(page.locator("#list-problem")).to_contain_text("This needs a key.")
    before = len(asked)
    await page.evaluate("window.dispatchEvent(new Event('focus'))")
    await page.evaluate("fetch('v1/models')")  # nothing was asked before that
    assert [url.rpartition("/")[2] for url in asked[before:]] == ["models"]
    await expect(page.get_by_role("dialog")).to_have_count(0)
    await page.get_by_role("button", name="Try again").click()
    await expect(page.get_by_role("textbox", name="Key")).to_be_focused()


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


async def test_a_hostile_answer_is_shown_whole_and_does_nothing(page: Page) -> None:
    await page.get_by_label("Model").select_option(OTHER_MODEL)
    await ask(page, "be hostile")
    await answered(page)
    text = page.locator(".text").last
    await expect(text).to_contain_text("THE END")
    await expect(text).to_contain_text("<script>window.hacked = 1</script>")
    assert (
        await page.locator("#runs :is(script, img, iframe, object, form, svg[onload], [onclick], [onerror])").count()
        == 0
    )
    assert await page.locator('#runs a:not([href^="http"])').count() == 0
    assert await page.evaluate("window.hacked") is None
    assert await page.evaluate("document.documentElement.scrollWidth") == 1280
    await ask(page, "long 5")  # and the page still works
    await answered(page, runs=2)


# What it leaves behind, and whom it keeps out


async def test_many_conversations_in_a_row_leave_nothing(page: Page) -> None:
    cdp = await page.context.new_cdp_session(page)
    await cdp.send("Performance.enable")

    async def chat(number: int) -> None:
        await page.get_by_role("button", name="New chat").click()
        await ask(page, f"long 5 number {number}")
        await answered(page)

    for number in range(3):
        await chat(number)
    nodes_before, heap_before = await left(cdp)
    for number in range(CHATS):
        await chat(number)
    nodes, heap = await left(cdp)
    print(
        f"{CHATS} conversations: {nodes_before} → {nodes} nodes, {heap_before / 1e6:.2f} → {heap / 1e6:.2f} MB of heap"
    )
    assert nodes - nodes_before <= CHATS * NODES_A_CHAT_MAX
    assert heap - heap_before <= CHATS * HEAP_A_CHAT_MAX
    await page.evaluate(
        """async (count) => {
        const make = (title) => fetch("v1/conversations", {
            method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ title }),
        });
        for (let made = 0; made < count; made++) await make(`empty ${made}`);
    }""",
        LIST_PAGE - CHATS,
    )
    await page.reload()
    entries = page.locator("#list li")
    await expect(entries).to_have_count(LIST_PAGE)
    await entries.last.scroll_into_view_if_needed()
    await expect(entries.nth(LIST_PAGE)).to_be_attached()


async def left(cdp: CDPSession) -> tuple[int, int]:
    """DOM nodes alive, whether on the page or not, and bytes of JavaScript's heap, after collection."""
    await cdp.send("HeapProfiler.collectGarbage")
    metrics = {it["name"]: it["value"] for it in (await cdp.send("Performance.getMetrics"))["metrics"]}
    return int(metrics["Nodes"]), int(metrics["JSHeapUsedSize"])


async def test_a_file_that_does_not_come_is_asked_for_again(page: Page) -> None:
    """As in a rolling upgrade, or in a tunnel: what is loaded when it is wanted may not be there."""
    colours, replay = "**/page/languages-*.js", "**/page/replay-*.js"
    await page.route(colours, lambda route: route.abort())
    await page.route(replay, lambda route: route.abort())
    await ask(page, "code")
    await answered(page)
    await expect(page.locator("figure.code")).not_to_have_count(0)
    await expect(page.locator(".hljs-keyword")).to_have_count(0)
    await page.get_by_role("link", name="Replay").click()
    await expect(page.get_by_role("alert")).to_contain_text("The replay could not be loaded.")
    await page.get_by_role("link", name="Back to the chat").click()
    await page.unroute(colours)
    await ask(page, "code")
    await answered(page, runs=2)
    await expect(page.locator(".hljs-keyword")).not_to_have_count(0)
    await page.get_by_role("link", name="Replay").click()
    await expect(page.get_by_role("alert")).to_contain_text("The replay could not be loaded.")
    await page.unroute(replay)
    await page.get_by_role("button", name="Try again").click()
    await expect(page.locator(".summary")).to_contain_text("events", timeout=ANSWER_MS)


@contextlib.asynccontextmanager
async def looked_at(browser: Browser, stack: Stack) -> AsyncIterator[tuple[Page, Callable[[str], Awaitable[None]]]]:
    """A page, and what looks at it with axe-core: in the end it has found nothing, in either theme."""
    context = await browser.new_context(base_url=stack.url, bypass_csp=True, reduced_motion="reduce")
    page = await context.new_page()
    await page.goto("/")
    await expect(page.get_by_label("Model")).to_be_visible()
    found: dict[str, list[str]] = {}

    async def look(where: str) -> None:
        if violations := await axe(page):
            found[where] = violations

    yield page, look
    await context.close()
    assert found == {}


async def test_nobody_is_kept_out(browser: Browser, stack: Stack) -> None:
    async with looked_at(browser, stack) as (page, look):
        await look("welcome")
        await ask(page, "Please work in parallel")
        await expect(page.locator('.call[data-status="running"]').first).to_be_visible(timeout=ANSWER_MS)
        await look("tools running")
        await answered(page)
        await page.locator(".thinking summary").first.click()
        await page.locator(".call summary").first.click()
        await look("tools and their answer")
        await page.get_by_role("button", name="Edit").click()
        await look("a question being edited")
        await page.keyboard.press("Escape")
        await page.get_by_role("button", name="Answer again").click()
        await expect(page.locator(".counter")).to_have_text("2/2", timeout=ANSWER_MS)
        await answered(page)
        await look("versions")
        await page.locator("#list li:has([aria-current]) button").last.click()
        await look("dialog")
        await page.keyboard.press("Escape")
        await page.keyboard.press("Control+k")
        await ask(page, "approval")
        await expect(page.get_by_role("button", name="Approve")).to_be_visible(timeout=ANSWER_MS)
        await look("approval")
        await page.set_viewport_size({"width": 390, "height": 844})
        await look("on a phone")
        await page.get_by_role("button", name="Conversations").click()
        await expect(page.get_by_role("button", name="New chat")).to_be_focused()
        await look("drawer")


async def test_nobody_is_kept_out_where_something_is_wrong(browser: Browser, stack: Stack) -> None:
    async with looked_at(browser, stack) as (page, look):
        await page.get_by_label("Model").select_option(OTHER_MODEL)
        await ask(page, "be refused")
        await expect(page.locator(".failure:visible")).to_be_visible(timeout=ANSWER_MS)
        await look("failure")
        await page.clock.install()
        await page.reload()
        await expect(page.locator("html")).to_have_attribute("data-connection", "live")
        await page.context.set_offline(True)
        await expect(page.locator("#connection")).to_have_text("Offline")
        await look("offline")
        await lost(page)
        await look("lost")
        await page.context.set_offline(False)
        await page.goto("/#no-such-conversation")
        await expect(page.get_by_text("This conversation does not exist")).to_be_visible()
        await look("missing")
