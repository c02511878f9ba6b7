"""`scripts/bench page`: how an answer feels in a real browser, on the whole stack with a stand-in model provider.

Smoothness: a long answer at speed; tasks over 50 ms, frames late by more than half of one, heap. Beside it, drawing
alone, without network: as the page does, and by reading and drawing all of the text again each time, as a ratio; and
the worst there is, an answer that is all one list or one table.
Latency: a provider that takes 200 ms to its first token and 8 s in all; from sending to the first words on the
screen, against waiting for all of it. Prints Markdown.
"""

import argparse
import asyncio
import tempfile
from pathlib import Path
from typing import Any

from playwright.async_api import Browser, Page, async_playwright

from tests.browser import CHROMIUM_FLAGS, chromium
from tests.model_server import ModelServer, answers
from tests.stack import Stack
from tests.test_prose import HARNESS, built, served

TOKEN_CHARS = 4
FIRST_MS = 200
WHOLE_S = 8
REDRAWN_EVERY = 16  # the slow way takes minutes: only every so many updates are measured

PART = """## Part {n}: what streaming costs

Each **token** of an answer is a word or a *part* of one, and `code` has many: see [the docs](https://example.org/{n})
and the list. A reader sees whole words, never half of one, and nothing moves that has been read already.

- The first point is short.
- The second has `inline code` and **bold text** in it, and runs on for a line or two as models like to do.
  - A nested one, number {n}.

| Way | Direction | Cost | Fit |
|---|---|--:|:-:|
| Polling | client | {n} | poor |
| SSE | server | 1 | ideal |

```python
def part_{n}(tokens: list[str]) -> str:
    # Joins what came so far, and counts it.
    total = sum(len(token) for token in tokens)
    return f"{{total}} characters in {{len(tokens)}} tokens"
```

"""

ITEM = "- The point has `inline code` and **bold text** in it, and runs on for a line or two as models like to do.\n"
TABLE = "| Way | Direction | Cost |\n|---|---|--:|\n"
ROW = "| Polling, as `it` was | client and **server** | 12 |\n"
BLOCK_CHARS = 60_000  # of one list, one table: about as many rows as the page shows of one

WATCH = """() => {
    window.watch = () => {
        const seen = { tasks: [], late: 0, frames: 0 };
        const observer = new PerformanceObserver((list) => {
            for (const { duration } of list.getEntries()) seen.tasks.push(duration);
        });
        observer.observe({ type: "longtask" });
        let before = performance.now(), isOn = true;
        const frame = (now) => {
            seen.frames += 1;
            if (now - before > 1.5 * 1000 / 60) seen.late += Math.round((now - before) / (1000 / 60)) - 1;
            before = now;
            if (isOn) requestAnimationFrame(frame);
        };
        requestAnimationFrame((now) => { before = now; requestAnimationFrame(frame); });
        return async () => {
            await new Promise((wake) => setTimeout(wake, 200));
            isOn = false;
            for (const { duration } of observer.takeRecords()) seen.tasks.push(duration);
            observer.disconnect();
            return { ...seen, heap: performance.memory.usedJSHeapSize };
        };
    };
}"""

DRAW = """async ([text, chars, redraws]) => {
    const node = box(), stop = watch();
    let update = prose(node), busy = 0, updates = 0;
    for (let end = chars; end < text.length + chars; end += chars) {
        await new Promise(requestAnimationFrame);
        const from = performance.now();
        if (redraws) {
            node.replaceChildren();
            update = prose(node);
        }
        update(text.slice(0, end), end < text.length);
        void node.offsetHeight; // its layout too
        busy += performance.now() - from;
        updates += 1;
    }
    const seen = await stop();
    node.remove();
    return { ...seen, busy: busy / updates };
}"""

# Marks when a person sends, when words are on the screen, and when the answer is whole.
SENT = """() => {
    const times = { sent: performance.now() };
    window.times = times;
    const look = () => {
        const texts = [...document.querySelectorAll(".answer .text")];
        if (!times.first && texts.some((node) => node.innerText.trim())) times.first = performance.now();
        if (document.querySelector(".run[data-status=done]")) times.whole = performance.now();
        else requestAnimationFrame(look);
    };
    requestAnimationFrame(look);
}"""


def row(name: str, seen: dict[str, Any], busy: str = "") -> str:
    tasks, heap_mb = seen["tasks"], seen["heap"] / 1e6
    longest = max(tasks, default=0)
    frames = f"{seen['late']} of {seen['frames']}"
    return f"| {name} | {len(tasks)} | {sum(tasks):.0f} | {longest:.0f} | {frames} | {heap_mb:.0f} | {busy} |"


async def opened(browser: Browser, url: str) -> Page:
    page = await browser.new_page(viewport={"width": 1280, "height": 800})
    await page.goto(url)
    await page.evaluate(WATCH)
    return page


async def ask(page: Page, content: str) -> None:
    await page.fill("#content", content)
    await page.click("#send")


async def answered(page: Page, timeout_ms: float) -> None:
    await page.locator(".run[data-status=done]").wait_for(state="attached", timeout=timeout_ms)


async def smoothness(browser: Browser, stack: Stack, text: str, options: argparse.Namespace, drawing: str) -> None:
    print(f"{len(text) // TOKEN_CHARS:,} tokens, {len(text):,} characters; tasks over 50 ms\n")
    print("| way | long tasks | their sum, ms | longest, ms | late frames | heap, MB | ms an update |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    page = await opened(browser, stack.url)
    await page.evaluate("() => void (window.stop = watch())")
    await ask(page, "a long one")
    await answered(page, 300_000)
    shown = await page.locator(".answer .text").first.inner_text()
    assert shown.count("Part ") == text.count("## Part "), await page.locator(".answer").inner_text()
    print(row(f"page, on the stack at about {options.rate} tokens/s", await page.evaluate("stop()")), flush=True)
    await page.close()
    took = []
    for name, redraws in (("drawing alone", False), ("drawing all again each time", True)):
        page = await opened(browser, drawing)
        await page.evaluate(HARNESS)
        chars = max(1, options.rate // 60) * TOKEN_CHARS * (REDRAWN_EVERY if redraws else 1)
        seen = await page.evaluate(DRAW, [text, chars, redraws])
        took.append(seen["busy"])
        print(row(name, seen, f"{seen['busy']:.1f}"), flush=True)
        await page.close()
    for name, block in (("one list alone", ITEM), ("one table alone", ROW)):
        page = await opened(browser, drawing)
        await page.evaluate(HARNESS)
        whole = (TABLE if block is ROW else "") + block * (BLOCK_CHARS // len(block))
        seen = await page.evaluate(DRAW, [whole, max(1, options.rate // 60) * TOKEN_CHARS, False])
        print(row(f"{name}, {len(whole):,} characters", seen, f"{seen['busy']:.1f}"), flush=True)
        await page.close()
    print(f"\nDrawing only what changed takes {100 * took[0] / took[1]:.1f}% of the time.\n")


async def latency(browser: Browser, stack: Stack, rounds: int) -> None:
    print(f"A provider that takes {FIRST_MS} ms to its first token and {WHOLE_S} s in all\n")
    print("| round | first words, ms | all of it, ms | less waiting |")
    print("|--:|--:|--:|--:|")
    for number in range(1, rounds + 1):
        page = await opened(browser, stack.url)
        await page.fill("#content", "a slow one")
        await page.evaluate(
            f"document.querySelector('#send').addEventListener('click', {SENT}, {{ once: true, capture: true }})"
        )
        await page.click("#send")
        await answered(page, 60_000)
        times = await page.evaluate("new Promise((done) => requestAnimationFrame(() => done(window.times)))")
        first, whole = times["first"] - times["sent"], times["whole"] - times["sent"]
        print(f"| {number} | {first:.0f} | {whole:.0f} | {100 * (1 - first / whole):.1f}% |", flush=True)
        await page.close()


async def measure(options: argparse.Namespace) -> None:
    text = ""
    while len(text) < options.tokens * TOKEN_CHARS:
        text += PART.format(n=text.count("## Part") + 1)
    words = " ".join(f"word{number}" for number in range(1, 200))
    slow_chunks = len(words) / TOKEN_CHARS
    fixtures = (
        answers("a long one", text, chunk_chars=TOKEN_CHARS, first_ms=FIRST_MS, chunks_per_s=options.rate),
        answers(
            "a slow one",
            words,
            chunk_chars=TOKEN_CHARS,
            first_ms=FIRST_MS,
            chunks_per_s=slow_chunks / (WHOLE_S - FIRST_MS / 1_000),
        ),
    )
    with tempfile.TemporaryDirectory() as folder, ModelServer(*fixtures) as model:
        (Path(folder) / "drawing").mkdir()
        built(Path(folder) / "drawing")
        stack = await asyncio.to_thread(Stack, Path(folder), {**model.environ, "TAPELINE_MODEL": "openai:bench"})
        try:
            await asyncio.to_thread(stack.start_inference)
            await asyncio.to_thread(stack.add_edge)
            async with async_playwright() as playwright:
                flags = [*CHROMIUM_FLAGS, "--enable-precise-memory-info"]
                browser = await playwright.chromium.launch(executable_path=chromium(), args=flags)
                with served(Path(folder) / "drawing") as drawing:
                    await smoothness(browser, stack, text, options, drawing)
                await latency(browser, stack, options.rounds)
                await browser.close()
        finally:
            stack.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--rate", type=int, default=1_000, help="tokens a second")
    parser.add_argument("--rounds", type=int, default=3, help="of latency")
    asyncio.run(measure(parser.parse_args()))
