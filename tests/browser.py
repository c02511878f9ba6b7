"""A real browser for tests of the page: Debian's Chromium, driven by Playwright."""

import os
import re
import shutil
from collections.abc import AsyncIterator
from typing import Final

import pytest
import pytest_asyncio
from playwright.async_api import Browser, ConsoleMessage, Page, async_playwright, expect

from tests import PATIENT_S, ROOT
from tests.stack import Stack

CHROMIUM_FLAGS: Final = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # Else each window begins four more processes, with the browser's own pages that somebody might open.
    "--disable-features=PreloadTopChromeWebUI,MediaRouter,OptimizationHints,PaintHolding",
]
AXE: Final = ROOT / "tests" / "node" / "node_modules" / "axe-core" / "axe.min.js"
NOT_OURS: Final = re.compile(r"Failed to load resource: ")  # the browser's own line about a request that failed

expect.set_options(timeout=1000 * PATIENT_S / 2)


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


async def axe(page: Page) -> list[str]:
    """What axe-core finds wrong with the page as it is, in both themes. Its context must bypass the CSP."""
    if not await page.evaluate("'axe' in window"):
        await page.evaluate(AXE.read_text())
    found: list[str] = await page.evaluate("""async () => {
        const found = [];
        for (const [theme, rules] of [["light", {}], ["dark", { runOnly: ["color-contrast"] }]]) {
            document.documentElement.dataset.theme = theme;
            const { violations } = await axe.run(rules);
            for (const { id, nodes } of violations) found.push(...nodes.map(({ html }) => `${theme} ${id} ${html}`));
        }
        return found;
    }""")
    return found
