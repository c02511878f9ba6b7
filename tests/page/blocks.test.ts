// Markdown read as it grows is Markdown read at once. Run with `node --test`; TAPELINE_TEST_SEED repeats a failed run.

import assert from "node:assert/strict";
import { test } from "node:test";
import { type Blocks, grown, NONE, whole } from "../../services/edge/page/src/blocks.ts";
import { COLUMNS_MAX, ROWS_MAX, type Table, type Token } from "../../services/edge/page/src/lexer.ts";

const SEED = Number(process.env["TAPELINE_TEST_SEED"] ?? Date.now() % 1_000_000);
const TEXTS = 3_000;

/** Mulberry32: small, and the same everywhere. */
function random(seed: number): (below: number) => number {
  return (below) => {
    seed = (seed + 0x6d2b79f5) | 0;
    let mixed = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) % below;
  };
}

const LINES = [
  "", "", "", " ", "plain words", "two  spaces  ", "# heading", "## heading ##", "===", "---", "- - -", "***",
  "* * *", "- item", "- ", "* item", "+ item", "1. one", "2. two", "10) ten", "1.", "   - nested", "  deeper",
  "    far", "\tcode", "- [ ] todo", "- [x] done", "```", "```py", "````", "~~~", "  ```", "```a`b",
  "let x = 1;", "> quote", "> - in quote", "> > twice", ">", "| a | b |", "|---|---|", "|:-:|--:|",
  "| 1 | `x` |", "a | b", "--|--", "<div>", "</div>", "<!-- open", "close -->", "<script>", "</script>",
  "<b>x</b> y", "<?php", "**bold** and *em*", "**open", "`code` and `open", "~~gone~~",
  "[text](https://example.org)", "[text](https://exa", "[ref]", "[ref][]", "![alt](https://example.org/i.png)",
  "https://example.org/x.", "a\\", "&amp; &#x41;", "漢字と仮名", "עברית", "**", "\r", "$x$", "1984 was",
];
const DEFINITIONS = ["[ref]: https://example.org", "[text]: <https://e.example> 'title'", "[ref]: /x", "[a]:", '"t"', "(t"];

function written(pick: (below: number) => number, lines: readonly string[]): string {
  return Array.from({ length: 1 + pick(14) }, () => lines[pick(lines.length)] ?? "").join("\n") + (pick(2) ? "\n" : "");
}

function drawn(tokens: readonly Token[]): Token[] {
  return tokens.filter(({ type }) => type !== "space" && type !== "def");
}

function fed(text: string, pick: (below: number) => number): Blocks {
  let [blocks, at] = [NONE, 0];
  while (at < text.length) {
    const before = blocks;
    at += 1 + pick(pick(3) ? 4 : 40);
    blocks = grown(before, text.slice(0, at));
    assert.ok(blocks.done >= before.done, "done goes back");
    for (let index = 0; index < before.done; index += 1) assert.equal(blocks.blocks[index], before.blocks[index]);
  }
  return blocks;
}

test("blocks that grow are, at the end, those of the whole text", () => {
  const pick = random(SEED);
  for (let count = 0; count < TEXTS; count += 1) {
    const text = written(pick, count % 3 ? LINES : [...LINES, ...DEFINITIONS, ...DEFINITIONS]);
    const blocks = fed(text, pick);
    const said = `seed ${SEED}, text ${JSON.stringify(text)}`;
    assert.deepEqual(drawn(whole(blocks, text).blocks), drawn(whole(NONE, text).blocks), said);
    if (!blocks.defines) assert.deepEqual(drawn(blocks.blocks), drawn(whole(NONE, text).blocks), said);
  }
});

test("a long answer is not read again from its start", () => {
  const paragraph = "Some **words** and `code`, then more.\n\n- one\n- two\n\n```js\nlet x;\n```\n\n";
  let blocks = NONE;
  for (let count = 1; count <= 200; count += 1) {
    blocks = grown(blocks, paragraph.repeat(count));
    assert.ok(blocks.text.length - blocks.doneChars <= 2 * paragraph.length);
  }
});

const ITEMS = [
  "- item", "- item with **bold**", "- ", "-", "-x", "  - nested", "    deeper", "  lazy", "plain", "", "", "- [ ] todo",
  "- [x] done", "1. one", "2. two", "3) three", "* other", "---", "- ---", "  ```", "  code", " - aside", "   - aside",
  "# no item", "- > quote", "\t- tab", "-\ttab",
];
const ROWS = ["| 1 | 2 |", "| `x` | **y** |", "3 | 4", "| 5", "| 6 | 7 | 8 |", "| a\\|b | c |", "plain", "", "> quote", "|"];

test("a long list or table is read from its end on, and is the same", () => {
  const pick = random(SEED);
  for (let count = 0; count < TEXTS / 10; count += 1) {
    const isTable = count % 2 > 0;
    const [kind, other] = isTable ? [ROWS.slice(0, 6), ROWS] : [ITEMS.slice(pick(8), 12), ITEMS];
    const lines = Array.from({ length: 4 + pick(60) }, () => written(pick, pick(30) ? kind : other).split("\n")[0]);
    const text = (isTable ? ["| a | b |", "|--|:-:|", ...lines] : ["- first", ...lines]).join("\n") + (pick(2) ? "\n" : "");
    let [blocks, at, isPart] = [NONE, 0, false];
    while (at < text.length) {
      at += 1 + pick(pick(3) ? 4 : 40);
      blocks = grown(blocks, text.slice(0, at));
      isPart ||= blocks.begun !== null;
      const said = `seed ${SEED}, text ${JSON.stringify(text.slice(0, at))}`;
      assert.deepEqual(drawn(blocks.blocks), drawn(whole(NONE, text.slice(0, at)).blocks), said);
    }
  }
});

test("what is done of a long list or table is not read again", () => {
  for (const [head, part] of [["", "- some **words**\n"], ["", "1. some\n\n   more\n\n"], ["|a|b|\n|-|-|\n", "| some | `words` |\n"]]) {
    let blocks = NONE;
    for (let count = 1; count <= 2 * ROWS_MAX; count += 1) {
      blocks = grown(blocks, head + part!.repeat(count));
      if (count > 3) assert.ok(blocks.text.length - blocks.begun!.chars <= 3 * part!.length);
    }
    assert.deepEqual(blocks.blocks, whole(NONE, blocks.text).blocks);
  }
});

test("a definition at the end makes links of what is before it, and leaves the rest as it was", () => {
  const blocks = fed("Plain.\n\nSee [it].\n\nMore.\n\nAnd more.\n\n[it]: https://example.org\n", () => 0);
  const all = whole(blocks, blocks.text);
  const [plain, see] = drawn(all.blocks);
  assert.equal(plain, drawn(blocks.blocks)[0]);
  assert.notEqual(see, drawn(blocks.blocks)[1]);
  assert.match(JSON.stringify(see), /"href":"https:\/\/example.org"/);
});

test("another text is read anew, and what is alike is kept", () => {
  const first = grown(NONE, "same\n\nfirst attempt\n\nand more");
  const second = grown(first, "same\n\nsecond");
  assert.equal(second.blocks[0], first.blocks[0]);
  assert.deepEqual(second.blocks, whole(NONE, "same\n\nsecond").blocks);
});

test("tables are cut, and say by how much", () => {
  const lines = ["a", "-", "x"].map((cell) => `${`|${cell}`.repeat(10_000)}|`);
  const wide = drawn(whole(NONE, lines.join("\n")).blocks)[0] as Table;
  assert.equal(wide.header.length, COLUMNS_MAX);
  assert.equal(wide.columnsLeftOut, 10_000 - COLUMNS_MAX);
  const long = drawn(whole(NONE, `|a|b|\n|-|-|\n${"|1|2|\n".repeat(100_000)}\nafter`).blocks) as [Table, Token];
  assert.equal(long[0].rows.length, ROWS_MAX);
  assert.equal(long[0].rowsLeftOut, 100_000 - ROWS_MAX);
  assert.equal(long[1].raw, "after");
  const escaped = drawn(whole(NONE, "|a\\|b|c|\n|-|-|\n|1\\|2|3|").blocks)[0] as Table;
  assert.deepEqual(escaped.rows[0]?.map(({ text }) => text), ["1|2", "3"]);
});

const COSTLY = [
  "> ", "- ", "> - ", "[", "*", "`", "|", "* ", "** a", "![", "_a ", "a@", "<", "<!--", "http://", "[a](b",
  "\\", "1.", "#", "~~a ", "`a``b```c````", " ", "\n", "&#", "> a\n", "- a\n", "a\n", "<a ", "[a]: x\n", "a\n=",
  "| - ",
];

test("no text is costly to read for its length", { timeout: 60_000 }, () => {
  // Counted, not timed by the clock of a busy machine: ten times the text may take about ten times, never a hundred.
  for (const part of COSTLY) {
    const took = [20_000, 200_000].map((chars) => {
      const text = `${part.repeat(chars / part.length)}x`;
      const from = process.cpuUsage();
      whole(NONE, text);
      const { user, system } = process.cpuUsage(from);
      return (user + system) / 1_000;
    });
    const [little = 0, much = 0] = took;
    assert.ok(much < Math.max(40 * little, 700), `${JSON.stringify(part)}: ${little} ms, ten times as long ${much} ms`);
  }
});
