// An answer's Markdown as DOM nodes, while it is still being written. Text only ever becomes text nodes: nothing the
// model says can become markup, script or a request. No mathematics: `$` is a dollar.
//
// Class names, for prose.css: li.task; p.plain (HTML, or text beyond a limit, as written); the others are in table.ts,
// inline.ts and highlight.ts.

import { alike, type Blocks, grown, NONE, whole } from "./blocks.ts";
import { h } from "./dom.ts";
import { type Code, code } from "./highlight.ts";
import { bounded, drawCheckbox, inlined } from "./inline.ts";
import type { Table, Token, Tokens } from "./lexer.ts";
import { alikeHeaders, drawTable, redrawTable } from "./table.ts";
import { certain, type Open, shown } from "./words.ts";

const TEXT_CHARS_MAX = 400_000; // of an answer; the tape has all of it
const NODES_MAX = 30_000; // of an answer: what comes after is shown as it was written
const LEVEL_MIN = 3; // of a heading: the page's own are above

interface Drawn {
  readonly token: Open;
  readonly node: HTMLElement;
  readonly size: number;
}

/**
 * Keeps `container` showing a Markdown text that grows. `writing`: more may come, so what is not certain yet is held
 * back. Only what has changed is drawn again. The container holds nothing else.
 */
export function prose(container: HTMLElement): (text: string, writing: boolean) => void {
  let blocks: Blocks = NONE;
  let drawn: Drawn[] = [];
  let seen = "";
  let wasWriting = true;
  return function update(text, writing) {
    if (text === seen && writing === wasWriting) return;
    [seen, wasWriting] = [text, writing];
    const rest = text.length - TEXT_CHARS_MAX;
    if (rest > 0) text = text.slice(0, TEXT_CHARS_MAX);
    const sure = writing && rest <= 0;
    blocks = sure ? grown(blocks, certain(text)) : whole(blocks, text);
    const tokens = visibleBlocks(blocks, sure, blocks.text.slice(-1));
    if (rest > 0) tokens.push(plain(`… ${rest.toLocaleString("en")} more characters are not shown.`));
    drawn = redrawn(container, drawn, tokens);
  };
}

function visibleBlocks({ blocks, links }: Blocks, writing: boolean, end: string): Open[] {
  const last = writing ? blocks.findLastIndex(({ type }) => type !== "space") : -1;
  const seen: Open[] = [];
  blocks.forEach((token, at) => {
    if (token.type === "space" || token.type === "def") return;
    const part = at === last ? shown(token, end, links) : token;
    if (part) seen.push(part);
  });
  return seen;
}

/** Draws `tokens` where `before` was drawn. */
function redrawn(container: HTMLElement, before: readonly Drawn[], tokens: readonly Open[]): Drawn[] {
  const drawn: Drawn[] = [];
  let left = NODES_MAX;
  for (const [at, full] of tokens.entries()) {
    const old = before[at];
    let size = old && old.token === full ? old.size : sizeOf(full);
    const isOver = size > left;
    const token = isOver ? plain(tokens.slice(at).map(({ raw }) => raw).join("\n\n")) : full;
    if (isOver) size = 0;
    if (!old) {
      const node = draw(token);
      container.append(node);
      drawn.push({ token, node, size });
    } else if (same(old.token, token)) drawn.push({ ...old, token });
    else {
      drawn.push({ token, node: redraw(old.node, old.token, token), size });
    }
    left -= size;
    if (isOver) break;
  }
  for (const { node } of before.slice(drawn.length)) node.remove();
  return drawn;
}

function plain(text: string): Open {
  return { type: "plain", raw: text, text };
}

function same(a: Open, b: Open): boolean {
  return a === b || (!a.open && !b.open && alike(a, b));
}

type Part = Token | Tokens.TableCell | readonly Tokens.TableCell[];

const sizes = new WeakMap<Part, number>();

/** About how many nodes a token makes, or a table's row. */
function sizeOf(part: Part): number {
  let size = sizes.get(part);
  if (size === undefined) sizes.set(part, (size = 2 + innerOf(part).reduce((sum, inner) => sum + sizeOf(inner), 0)));
  return size;
}

function innerOf(part: Part): readonly Part[] {
  if (!("tokens" in part) && "type" in part && part.type === "table") return [part.header, ...part.rows];
  return "type" in part ? partsOf(part) : "tokens" in part ? part.tokens : part;
}

function partsOf(token: Token): readonly Token[] {
  return token.type === "list" ? (token as Tokens.List).items : ("tokens" in token && token.tokens) || [];
}

// Blocks

const codes = new WeakMap<HTMLElement, Code>();

function draw(token: Open): HTMLElement {
  switch (token.type) {
    case "code":
      return drawCode(token as Tokens.Code & Open);
    case "table":
      return drawTable(token as Table);
    case "list":
      return drawList(token as Tokens.List);
    case "list_item":
      return nested("li", token);
    case "blockquote":
      return nested("blockquote", token);
    case "heading":
      return inlined(`h${Math.min((token as Tokens.Heading).depth + LEVEL_MIN - 1, 6)}` as "h3", token.tokens);
    case "hr":
      return h("hr");
    case "checkbox":
      return drawCheckbox(token as Tokens.Checkbox);
    case "text": // a tight list's item
      return inlined("span", token.tokens ?? [token]);
    case "paragraph":
      return inlined("p", token.tokens);
    default: // HTML, and what goes beyond a limit
      return asWritten(token);
  }
}

/** Draws `token` where `before` is: in its node, if it can stay. The node that now shows it. */
function redraw(node: HTMLElement, before: Open, token: Open): HTMLElement {
  if (before.type === token.type) {
    switch (token.type) {
      case "code":
        if (languageOf(before as Tokens.Code) !== languageOf(token as Tokens.Code)) break;
        codes.get(node)?.update(token.text, !token.open);
        return node;
      case "table":
        if (!alikeHeaders(before as Table, token as Table)) break;
        redrawTable(node, before as Table, token as Table);
        return node;
      case "list":
        if (!alikeLists(before as Tokens.List, token as Tokens.List)) break;
        redrawParts(node, before, token);
        return node;
      case "list_item":
      case "blockquote":
        if ((before as Tokens.ListItem).task !== (token as Tokens.ListItem).task) break;
        redrawParts(node, before, token);
        return node;
      case "heading":
      case "paragraph":
      case "text": {
        const fresh = draw(token);
        if (fresh.localName !== node.localName) break;
        takeOver(node, fresh);
        return node;
      }
      case "html":
      case "plain":
        if (node.firstChild instanceof Text) grow(node.firstChild, written(token));
        return node;
    }
  }
  const fresh = draw(token);
  node.replaceWith(fresh);
  return fresh;
}

function nested(tag: "li" | "blockquote", token: Token): HTMLElement {
  const node = h(tag, { dir: "auto" }, ...blockParts(token).map(draw));
  if (token.type === "list_item" && (token as Tokens.ListItem).task) node.className = "task";
  return node;
}

function blockParts(token: Token): Token[] {
  return partsOf(token).filter(({ type }) => type !== "space" && type !== "def");
}

function redrawParts(node: HTMLElement, before: Token, token: Token): void {
  const [old, parts] = [blockParts(before), blockParts(token)];
  parts.forEach((part, at) => {
    const [child, was] = [node.children[at], old[at]];
    if (!(child instanceof HTMLElement) || !was) node.append(draw(part));
    else if (!same(was, part)) redraw(child, was, part);
  });
  while (node.children.length > parts.length) node.lastElementChild?.remove();
}

function drawList(list: Tokens.List): HTMLElement {
  const items = list.items.map((item) => nested("li", item));
  if (!list.ordered) return h("ul", {}, ...items);
  return h("ol", { start: list.start === 1 || list.start === "" ? null : list.start }, ...items);
}

function alikeLists(a: Tokens.List, b: Tokens.List): boolean {
  return a.ordered === b.ordered && a.start === b.start && a.loose === b.loose;
}

function drawCode(token: Tokens.Code & Open): HTMLElement {
  const view = code(languageOf(token));
  view.update(token.text, !token.open);
  codes.set(view.node, view);
  return view.node;
}

function languageOf({ lang }: Tokens.Code): string {
  return /^\S*/.exec(lang?.trim() ?? "")?.[0].toLowerCase() ?? "";
}

function asWritten(token: Token): HTMLElement {
  return h("p.plain", { dir: "auto" }, written(token));
}

function written(token: Token): string {
  return bounded("text" in token ? token.text : token.raw).trim();
}

/** Gives `node` the children of `fresh`, and lets those that are the same stay: a selection in them does too. */
function takeOver(node: HTMLElement, fresh: HTMLElement): void {
  const [old, children] = [[...node.childNodes], [...fresh.childNodes]];
  let at = 0;
  while (at < old.length && at < children.length && old[at]?.isEqualNode(children[at] ?? null)) at += 1;
  const [was, is] = [old[at], children[at]];
  if (was instanceof Text && is instanceof Text) {
    grow(was, is.data);
    at += 1;
  }
  for (const child of old.slice(at)) child.remove();
  node.append(...children.slice(at));
}

function grow(node: Text, text: string): void {
  if (text.startsWith(node.data)) node.appendData(text.slice(node.length));
  else node.data = text;
}
