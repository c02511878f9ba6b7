// What may be shown of a text under way.

import assert from "node:assert/strict";
import { test } from "node:test";
import { escaped, visible } from "../../services/edge/page/src/bidi.ts";
import { grown, NONE } from "../../services/edge/page/src/blocks.ts";
import type { Tokens } from "../../services/edge/page/src/lexer.ts";
import { target } from "../../services/edge/page/src/links.ts";
import { certain, shown, words } from "../../services/edge/page/src/words.ts";

/** What these tests look at of any token. */
interface Token {
  type: string;
  raw: string;
  text?: string;
  tokens?: Token[];
  open?: true;
}

/** What is shown of `text`'s last block while it is written. */
function last(text: string): Token | null {
  const blocks = grown(NONE, certain(text));
  const token = blocks.blocks.findLast(({ type }) => type !== "space");
  return token ? (shown(token, blocks.text.slice(-1), {}) as Token | null) : null;
}

/** The inline text of it, its marks named: `bold<strong>`. */
function spelled(text: string): string {
  const spell = (tokens: readonly Token[] = []): string =>
    tokens.map((it) => (it.type === "text" ? it.raw : `<${it.type} ${spell(it.tokens) || it.text}>`)).join("");
  return spell(last(text)?.tokens);
}

test("prose is shown by whole words, and never less than before", () => {
  const text = "A few words, naïve 👩‍🚀 emoji 漢字と仮名です。 ภาษาไทย עברית\nan_underscore then  two";
  let before = "";
  for (let end = 1; end <= text.length; end += 1) {
    const now = words(text.slice(0, end));
    assert.ok(now.startsWith(before), `${JSON.stringify(before)} → ${JSON.stringify(now)}`);
    if (/^[\x21-\x7e]+$/.test(now.slice(-1))) assert.fail(`half a word: ${now}`);
    before = now;
  }
  assert.equal(words("漢字と仮"), "漢字と仮");
  assert.equal(words("wor"), "");
  assert.equal(words("x".repeat(65)), "x".repeat(65));
  assert.equal(words(`${"x".repeat(70)}\ud83d`), "x".repeat(70));
});

test("marks that have not closed are not seen", () => {
  assert.equal(spelled("say **bo"), "say");
  assert.equal(spelled("say **bold te"), "say <strong bold>");
  assert.equal(spelled("say ~~gone an "), "say <del gone an>");
  assert.equal(spelled("run `npm insta"), "run <codespan npm>");
  assert.equal(spelled("see [the docs](https://exa"), "see the");
  assert.equal(spelled("see [the docs](https://example.org) "), "see <link the docs>");
  assert.equal(spelled("2 * 3 is 6 "), "2 * 3 is 6");
  assert.equal(spelled("snake_case na"), "snake_case");
});

test("a mark is nothing before it is certain", () => {
  const open = ["#", "##", "-", "- ", "--", "1", "1.", "1. ", "> ", "> - ", "```", "***", "| ", "|--", "- [", "- [x] "];
  for (const marks of open) {
    assert.equal(certain(`before\n${marks}`), "before\n", marks);
    assert.equal(certain(`before\n${marks}\n`), `before\n${marks}\n`);
  }
  assert.equal(certain("- item"), "- item");
  assert.equal(certain(`x\n${"*".repeat(2_000)}`).length, 2_002);
});

test("code is shown by lines, tables by rows, lists by items", () => {
  assert.equal(last("```js\nlet x;\nlet y")?.text, "let x;");
  assert.equal(last("```js\nlet x;\nlet y;\n")?.text, "let x;\nlet y;");
  assert.equal(last("```js\nlet x;\n```\n")?.open, undefined);
  assert.ok((last(`\`\`\`\n${"x ".repeat(300)}y`)?.text ?? "").length > 500);
  assert.equal(last("| a | b |"), null);
  assert.equal(last("| a | b |\n|--"), null);
  const rows = (text: string): number | undefined => (last(text) as Tokens.Table | null)?.rows.length;
  assert.equal(rows("| a | b |\n|--|--|\n"), 0);
  assert.equal(rows("| a | b |\n|--|--|\n| 1 | 2"), 0);
  assert.equal(rows("| a | b |\n|--|--|\n| 1 | 2 |\n"), 1);
  assert.equal(rows("| a | b |\n|--|--|\n| 1 | 2 |\n| 3 | 4"), 1);
  const list = last("- one\n- two thr") as Tokens.List;
  assert.deepEqual(
    list.items.map((item) => item.tokens.map((it) => (it as Tokens.Text).tokens?.[0]?.raw)),
    [["one"], ["two"]],
  );
});

test("a link leads only where it may, and says where if its text says otherwise", () => {
  const BAD = [
    "javascript:alert(1)", "JaVaScRiPt:alert(1)", "java\tscript:alert(1)", "\u0001javascript:alert(1)",
    " javascript:x", "data:text/html,x", "vbscript:x", "//evil.example", "/v1", "file:///etc/passwd", "blob:https://x/1",
    "about:blank", "x", "", "https://",
  ];
  for (const address of BAD) assert.equal(target(address, "x"), null, address);
  const host = (address: string, text: string): string | null | undefined => target(address, text)?.host;
  assert.equal(host("https://example.org/a", "the docs"), null);
  assert.equal(host("https://example.org/a", "https://example.org/b"), null);
  assert.equal(host("https://example.org/a", "example.org"), null);
  assert.equal(host("https://evil.example/", "https://bank.example/login"), "evil.example");
  assert.equal(host("https://evil.example/", "bank.example"), "evil.example");
  assert.equal(host("https://evil.example/", "Go to https://bank.example now"), "evil.example");
  assert.equal(host("https://evil.example/", "www.bank.example/x"), "evil.example");
  assert.equal(host("https://evil.example/", "bank\u200b.example"), "evil.example");
  assert.equal(host("https://bank.example@evil.example/", "https://bank.example@evil.example/"), "evil.example");
  assert.equal(host("https://bаnk.example/", "bank.example"), "xn--bnk-6cd.example");
  assert.equal(host("mailto:me@evil.example", "me@bank.example"), "evil.example");
  assert.equal(host("mailto:me@bank.example", "me@bank.example"), null);
});

test("what reorders text is shown by its number, in JSON as JSON has it", () => {
  assert.equal(visible("a\u202eb\u2066"), "a[U+202E]b[U+2066]");
  const json = JSON.stringify({ "to\u061c": ["a\u202eb\u2066"] }, null, 2);
  assert.match(escaped(json), /^[\x20-\x7e\n]*$/);
  assert.deepEqual(JSON.parse(escaped(json)), JSON.parse(json));
});
