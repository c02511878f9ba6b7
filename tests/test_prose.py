"""How the page draws an answer's Markdown: the pure parts in Node, the drawing in a real browser under the edge's own
content security policy, fed with what a hostile model might say."""

import json
import os
import random
import re
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import pytest_asyncio
from playwright.async_api import Page, async_playwright

from services.edge.app import CSP
from tests import ROOT
from tests.browser import CHROMIUM_FLAGS, chromium

pytestmark = pytest.mark.asyncio(loop_scope="module")

PAGE = ROOT / "services" / "edge" / "page"
NODE = ROOT / ".venv" / "bin" / "node"
SEED = int(os.environ.get("TAPELINE_TEST_SEED", time.time_ns() % 1_000_000))
NODES_MAX = 40_000  # of one answer, whatever it says: prose.ts counts them roughly
SLOWEST_MS = 10_000  # of one hostile text of a megabyte, on a busy machine; what is quadratic takes minutes


class Served(SimpleHTTPRequestHandler):
    """A folder, as the edge would serve it."""

    def end_headers(self) -> None:
        self.send_header("Content-Security-Policy", CSP)
        super().end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Served, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def built(folder: Path) -> None:
    """The modules from their sources, and a page to draw on."""
    esbuild = PAGE / "node_modules" / ".bin" / "esbuild"
    options = ["--bundle", "--splitting", "--format=esm", "--target=es2022", "--loader:.svg=copy", f"--outdir={folder}"]
    sources = [str(PAGE / "src" / name) for name in ("prose.ts", "page.css")]
    subprocess.run([NODE, esbuild, *sources, *options, "--log-level=warning"], check=True, timeout=60)
    style = '<link rel="icon" href="data:,"><link rel="stylesheet" href="page.css">'
    (folder / "index.html").write_text(f'<!doctype html><meta charset="utf-8"><title>x</title>{style}<main></main>')


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def page(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Page]:
    """One page for all. Anything it logs, asks or fetches but for its own files fails the module."""
    folder = tmp_path_factory.mktemp("prose")
    built(folder)
    with served(folder) as url:
        async with async_playwright() as playwright:
            browser = await playwright.chromium.launch(executable_path=chromium(), args=CHROMIUM_FLAGS)
            page = await browser.new_page()
            seen: list[str] = []
            page.on("console", lambda message: seen.append(message.text))
            page.on("pageerror", lambda error: seen.append(str(error)))
            page.on("dialog", lambda dialog: seen.append(dialog.message))
            page.on("request", lambda request: seen.append(request.url))
            await page.goto(url)
            await page.evaluate(HARNESS)
            yield page
            own = re.compile(re.escape(url) + r"/([\w.-]*\.(js|css))?$")
            assert [what for what in seen if not own.match(what)] == []
            assert await page.evaluate("window.hacked") is None
            await browser.close()


HARNESS = """async () => {
    const { prose } = await import("/prose.js");
    const main = document.querySelector("main");
    const box = () => {
        const node = document.createElement("div");
        node.className = "text";
        main.append(node);
        return node;
    };
    const settled = async (node) => {
        while (node.querySelector(".pending")) await new Promise((wake) => setTimeout(wake, 5));
        return node;
    };
    window.atOnce = async (text) => {
        const node = box();
        prose(node)(text, false);
        return settled(node);
    };
    // Draws what `text` is up to each of `ends`, then all of it.
    window.bySteps = async (text, ends) => {
        const node = box();
        const update = prose(node);
        for (const end of ends) update(text.slice(0, end), true);
        update(text, true);
        update(text, false);
        return settled(node);
    };
    window.prose = prose;
    window.box = box;
}"""

# Hostile answers

LINKS = [
    "javascript:window.hacked=1",
    "JaVaScRiPt:window.hacked=1",
    "java\tscript:window.hacked=1",
    "java&#10;script:window.hacked=1",
    "&#106;avascript:window.hacked=1",
    "&#x6A;&#x61;vascript:window.hacked=1",
    "javascript&colon;window.hacked=1",
    "\x01javascript:window.hacked=1",
    "data:text/html,<script>window.hacked=1</script>",
    "data:image/svg+xml;base64,PHN2Zy8+",
    "vbscript:msgbox",
    "VBSCRIPT:x",
    "file:///etc/passwd",
    "blob:https://example.org/1",
    "//evil.example/x",
    "/v1/conversations",
    "\\\\evil.example\\x",
    "%6Aavascript:window.hacked=1",
]
ADDRESSES = [f"[x]({it}) [x](<{it}>) ![x]({it}) <{it}> [x][r{at}]\n\n[r{at}]: {it}" for at, it in enumerate(LINKS)]
HOSTILE = {
    "script": "<script>window.hacked = 1</script>\n\n<SCRIPT SRC=https://evil.example/x.js></SCRIPT>",
    "handlers": '<img src=x onerror="window.hacked=2"> <b onclick=x>y</b>\n\n'
    '<details open ontoggle=x><svg onload="x"><a xlink:href=x>',
    "addresses": "\n\n".join(ADDRESSES),
    "images": "![i](https://evil.example/track.gif) <img src=https://evil.example/t.gif> ![i][r]\n\n[r]: https://evil.example/t",
    "frames": "<iframe src=https://evil.example></iframe>\n\n<object data=x></object><embed src=x><base href=https://evil.example>",
    "styles": "<style>@import 'https://evil.example'</style>\n\n"
    "<link rel=stylesheet href=https://evil.example><meta http-equiv=refresh content=0>",
    "comments": "<!-- <script>window.hacked=1</script> -->\n\n<!--> <script>x</script> -->\n\n"
    "<![CDATA[x]]> <?php x ?> <!DOCTYPE x>",
    "svg": "<svg><script>window.hacked=1</script></svg>\n\n<math><mtext></p><style><img src=x onerror=x>",
    "in code": "```<script>\n<script>x</script>\n```\n\n`<img src=x onerror=x>`\n\n"
    "```html\n<script>window.hacked=1</script>\n```",
    "in a table": "| <b>a</b> | b |\n|---|---|\n| <img src=x onerror=x> | [x](vbscript:x) |",
    "names": "```__proto__\nx\n```\n```constructor\nx\n```\n[__proto__] [constructor]\n\n[x]: __proto__",
    "10 000 columns": "|a" * 10_000 + "|\n" + "|-" * 10_000 + "|\n" + ("|x" * 10_000 + "|\n") * 5,
    "100 000 rows": "|a|b|\n|-|-|\n" + "|1|2|\n" * 100_000,
    "quotes": "> " * 10_000 + "x\ny",
    "lists": "- " * 10_000 + "x\n" + "\n".join("  " * depth + "- x" for depth in range(300)),
    "quoted lists": "> - " * 5_000 + "x",
    "brackets in one another": "[" * 10_000 + "x" + "]" * 10_000 + "(https://example.org)",
    "marks in one another": "**a _b ~~c " * 3_000 + "`" * 500,
    "unclosed fence": "```py\nprint(1)\n\n# <script>x</script>\n" * 3,
    "paragraphs": "a\n\n" * 50_000,
    "items": "- a\n" * 20_000,
    "rules": "---\n" * 50_000,
    "bidi": "a \u202eb\u202d c\u2066 d\n\n`x\u202ey` [x\u202ey](https://example.org/\u202e) <https://example.org/\u2066a>\n\n```js\nx\u202e\n```",
    "zalgo": ("Z" + "\u0301\u0327\u0488" * 2_000) * 20,
    "NUL": "a\0b `c\0d` [e\0](https://example.org/\0)\n\n```\n\0\n```",
    "lone surrogates": "a\ud800b \udc00 `c\udfff` [\ud83d](https://example.org/\ud83d)\n\n```js\n'\ud800'\n```\n\ud83d",
    "one word": "x" * 1_000_000,
    **{
        f"a million {it}": it * 1_000_000
        for it in ("`", "*", "[", "|", "_", "<", ">", "#", "~", "\\", "!", "&", "-", "]", "(", ":")
    },
    "half a million starts": "![" * 500_000,
    "addresses without end": "http://" * 100_000,
    "code in one line": "```js\n" + "({[" * 100_000,
}
ALLOWED = {
    "p",
    "h3",
    "h4",
    "h5",
    "h6",
    "hr",
    "blockquote",
    "pre",
    "code",
    "ul",
    "ol",
    "li",
    "div",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "strong",
    "em",
    "del",
    "a",
    "br",
    "span",
    "figure",
    "figcaption",
    "button",
    "input",
}
ATTRIBUTES = {
    "aria-label",
    "checked",
    "class",
    "dir",
    "disabled",
    "href",
    "rel",
    "role",
    "scope",
    "start",
    "tabindex",
    "target",
    "type",
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_answer_is_only_text(page: Page, name: str) -> None:
    """As it is at once, and as it is in twenty steps, it makes only what it may, and not too much of it."""
    text = HOSTILE[name]
    script = """async ([json, random]) => {
        const text = JSON.parse(json), names = new Set(), links = new Set(), attributes = new Set();
        const ends = random.map((part) => Math.floor(part * text.length));
        const from = performance.now();
        const boxes = [await atOnce(text), await bySteps(text, ends)];
        const took = performance.now() - from;
        const count = Math.max(...boxes.map((box) => box.querySelectorAll("*").length));
        for (const node of document.querySelectorAll(".text *")) {
            names.add(node.localName);
            for (const { name } of node.attributes) attributes.add(name);
            if (node.localName === "a") links.add([node.protocol, node.rel, node.target].join(" "));
        }
        const isSame = boxes[0].isEqualNode(boxes[1]);
        for (const box of boxes) box.remove();
        return [[...names], [...attributes], [...links], count, isSame, took];
    }"""
    pick = random.Random(SEED)
    ends = sorted(pick.random() ** 2 for _ in range(20))
    names, attributes, links, count, same, took = await page.evaluate(script, [json.dumps(text), ends])
    print(f"{name}: {len(text)} characters, {count} nodes, {took:.0f} ms")
    assert set(names) <= ALLOWED
    assert set(attributes) <= ATTRIBUTES
    assert {link.split(" ", 1)[1] for link in links} <= {"noopener noreferrer nofollow _blank"}
    assert {link.split(" ", 1)[0] for link in links} <= {"https:", "http:", "mailto:"}
    assert count < NODES_MAX
    assert same, f"seed {SEED}: drawn by steps it is another"
    assert took < SLOWEST_MS


MIX = (
    "Intro with **bold *both* bold**, `code`, snake_case and 2 * 3, ~~gone~~, [r] and <br>a line.\n# Title #\ntext\n\n"
    "1. one\n   - nested\n     deeper\n\n2. two\n\n   second paragraph\n10. ten\n\n- [ ] todo\n- [x] done\n\n"
    "| a | b |\n|:-:|--:|\n| 1 | `x` |\n| 2 | [l](https://example.org/a_(b)) |\n\nafter\n\n"
    "```py\nfor x in y:\n\n    print('# no heading')\n```\n> quote\n> - list\n>   ```js\n>   let x;\n"
    ">   ```\n\n---\n* * *\n"
    "漢字と仮名 עברית 👩‍🚀 &amp; &lt; \\* $x$\n\n    indented\n\n<div>\nhtml\n</div>\n\nSetext\n---\n![alt](https://example.org/i.png)"
    "\n\n[r]: https://example.org/r\n\nEnd https://example.org/x."
)


async def test_drawn_as_it_comes_equals_drawn_at_once(page: Page) -> None:
    script = """async ([text, runs]) => {
        const whole = await atOnce(text);
        const other = [];
        for (const ends of [Array.from(text, (_, at) => at), ...runs]) {
            const box = await bySteps(text, ends);
            if (!box.isEqualNode(whole)) other.push([ends, box.innerHTML]);
            box.remove();
        }
        const html = whole.innerHTML;
        whole.remove();
        return [html, other];
    }"""
    pick = random.Random(SEED)
    pieces = MIX.split("\n\n")
    for _ in range(12):
        text = "\n\n".join(pick.sample(pieces, len(pieces))) if _ else MIX
        runs = [sorted(pick.randrange(len(text)) for _ in range(pick.randrange(60))) for _ in range(3)]
        html, other = await page.evaluate(script, [text, runs])
        assert other == [], f"seed {SEED}: {text!r} drawn at once is {html}"
        if text != MIX:
            continue
        for fragment in (
            "<strong>bold <em>both</em> bold</strong>",
            '<h3 dir="auto">Title</h3>',
            '<ol><li dir="auto"><p dir="auto">one</p><ul><li dir="auto"><span dir="auto">nested\n',
            '<td dir="auto" class="right"><code dir="auto">x</code></td>',
            '<th dir="auto" scope="col" class="center">a</th>',
            'href="https://example.org/a_(b)"',
            'href="https://example.org/r"',
            "<del>gone</del>",
            '<input type="checkbox" checked="" disabled="" aria-label="Done">',
            "<br>a line",
            '<span class="hljs-keyword">for</span>',
            "snake_case and 2 * 3",
            ">https://example.org/x</a>.",
            "&lt;div&gt;",
            "עברית 👩‍🚀 &amp; &lt; * $x$",
        ):
            assert fragment in html, html


async def test_what_is_done_stays_and_what_is_open_is_held_back(page: Page) -> None:
    script = """async () => {
        const node = box(), update = prose(node), seen = [];
        const say = (text, writing = true) => { update(text, writing); return node.innerText.trim(); };
        seen.push(say("One **wo"), say("One **wor d"));
        seen.push(node.querySelector("strong").textContent);
        const start = "One.\\n\\nTwo.\\n\\nThree.\\n\\n";
        const table = start + "| a | b |\\n|--|--|\\n| 1 | 2 |\\n| 3";
        say(start + "| a | b");
        const [first, second] = node.children;
        seen.push(node.querySelectorAll("table").length, node.lastElementChild.textContent);
        say(table);
        const row = node.querySelector("tbody tr");
        seen.push(node.querySelectorAll("tbody tr").length);
        say(table + " | 4 |\\n\\n```js\\nlet x = 1;\\nlet");
        seen.push(first === node.children[0] && second === node.children[1], row === node.querySelector("tbody tr"));
        const code = node.querySelector("pre code");
        seen.push(code.textContent, code.children.length);
        say(table + " | 4 |\\n\\n```js\\nlet x = 1;\\nlet y;\\n```\\n");
        while (node.querySelector(".pending")) await new Promise((wake) => setTimeout(wake, 5));
        seen.push(code === node.querySelector("pre code"), code.textContent);
        seen.push(code.querySelectorAll(".hljs-keyword").length);
        seen.push(say("Another attempt"), say("Another attempt", false));
        node.remove();
        return seen;
    }"""
    code = "let x = 1;\nlet y;\n"
    assert [it.rstrip() if isinstance(it, str) else it for it in await page.evaluate(script)] == [
        *("One", "One wor", "wor", 0, "Three.", 1, True, True, "let x = 1;", 0, True, code.rstrip(), 2),
        *("Another", "Another attempt"),
    ]


async def test_code_has_a_name_and_can_be_copied(page: Page) -> None:
    node = await page.evaluate_handle("atOnce('```python\\nprint(1) # \\u202e\\n```')")
    await page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    await page.get_by_role("button", name="Copy").click()
    await page.get_by_role("button", name="Copied").wait_for()
    assert await page.evaluate("navigator.clipboard.readText()") == "print(1) # \u202e"
    figure = page.locator("figure.code")
    assert await figure.locator(".language").inner_text() == "python"
    assert await figure.locator("code").inner_text() == "print(1) # [U+202E]"
    await node.evaluate("(node) => node.remove()")


async def test_code_can_be_read_in_both_themes(page: Page) -> None:
    script = r"""() => {
        const probe = document.body.appendChild(document.createElement("i"));
        const light = (name) => {
            probe.style.color = `var(${name}, var(--sunken))`; // what is missing has no contrast
            const parts = getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map((it) => it / 255);
            const [r, g, b] = parts.map((it) => it <= 0.04045 ? it / 12.92 : ((it + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const colours = ["keyword", "string", "number", "title", "type", "comment", "deletion"];
        const names = ["--ink", "--soft", ...colours.map((name) => `--code-${name}`)];
        return Object.fromEntries(names.map((name) => {
            const [dark, bright] = [light(name), light("--sunken")].sort((a, b) => a - b);
            return [name, (bright + 0.05) / (dark + 0.05)];
        }));
    }"""
    for theme in ("light", "dark"):
        await page.emulate_media(color_scheme=theme)
        contrasts = await page.evaluate(script)
        assert all(contrast >= 4.5 for contrast in contrasts.values()), (theme, contrasts)
    await page.emulate_media(color_scheme="light")
