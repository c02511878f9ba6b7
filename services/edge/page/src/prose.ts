// An answer's Markdown as DOM nodes, while it is still being written. Text only ever becomes text nodes: nothing the
// model says can become markup, script or a request. No mathematics: `$` is a dollar.
//
// Class names, for prose.css: div.table (a table's frame, scrolls) > table, p.left-out; span.host (where a link leads
// that claims otherwise); li.task; p.plain (HTML, or text beyond a limit, as written); figure.code is in highlight.ts.

import { visible } from "./bidi.ts";
import { alike, type Blocks, grown, NONE, whole } from "./blocks.ts";
import { type Code, code } from "./highlight.ts";
import type { Table, Token, Tokens } from "./lexer.ts";
import { target } from "./links.ts";
import { certain, type Open, shown } from "./words.ts";

const TEXT_CHARS_MAX = 400_000; // of an answer; the tape has all of it
const NODES_MAX = 30_000; // of an answer: what comes after is shown as it was written
const MARKS_MAX = 8; // combining marks on one letter
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
      return document.createElement("hr");
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
  const node = document.createElement(tag);
  node.dir = "auto";
  if (token.type === "list_item" && (token as Tokens.ListItem).task) node.className = "task";
  node.append(...blockParts(token).map(draw));
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
  const node = document.createElement(list.ordered ? "ol" : "ul");
  if (node instanceof HTMLOListElement && typeof list.start === "number" && list.start !== 1) node.start = list.start;
  node.append(...list.items.map((item) => nested("li", item)));
  return node;
}

function alikeLists(a: Tokens.List, b: Tokens.List): boolean {
  return a.ordered === b.ordered && a.start === b.start && a.loose === b.loose;
}

function drawCheckbox({ checked }: Tokens.Checkbox): HTMLElement {
  const box = document.createElement("input");
  box.type = "checkbox";
  box.toggleAttribute("checked", checked);
  box.disabled = true;
  box.setAttribute("aria-label", checked ? "Done" : "To do");
  return box;
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
  const node = document.createElement("p");
  node.className = "plain";
  node.dir = "auto";
  node.append(written(token));
  return node;
}

function written(token: Token): string {
  return bounded("text" in token ? token.text : token.raw).trim();
}

// Tables

function drawTable(token: Table): HTMLElement {
  const [frame, table] = [document.createElement("div"), document.createElement("table")];
  frame.className = "table";
  frame.tabIndex = 0; // it scrolls, so the keyboard must reach it
  frame.setAttribute("role", "region");
  frame.setAttribute("aria-label", "Table");
  drawRow(table.createTHead(), "th", token.header);
  const body = table.createTBody();
  for (const row of token.rows) drawRow(body, "td", row);
  frame.append(table);
  noteLeftOut(frame, token);
  return frame;
}

function drawRow(section: HTMLTableSectionElement, tag: "th" | "td", cells: readonly Tokens.TableCell[]): void {
  const row = section.insertRow();
  for (const cell of cells) {
    const node = inlined(tag, cell.tokens);
    if (tag === "th") node.setAttribute("scope", "col");
    if (cell.align) node.className = cell.align;
    row.append(node);
  }
}

function redrawTable(frame: HTMLElement, before: Table, token: Table): void {
  const body = frame.querySelector("tbody");
  if (!body) return;
  const firstOther = token.rows.findIndex((row, at) => !alikeRows(before.rows[at], row));
  const kept = firstOther < 0 ? token.rows.length : firstOther;
  while (body.rows.length > kept) body.deleteRow(-1);
  for (const row of token.rows.slice(kept)) drawRow(body, "td", row);
  noteLeftOut(frame, token);
}

function alikeHeaders(a: Table, b: Table): boolean {
  return alikeRows(a.header, b.header) && a.align.join() === b.align.join();
}

function alikeRows(a: readonly Tokens.TableCell[] | undefined, b: readonly Tokens.TableCell[]): boolean {
  return a === b || a?.length === b.length && b.every((cell, at) => JSON.stringify(cell) === JSON.stringify(a[at]));
}

function noteLeftOut(frame: HTMLElement, { rowsLeftOut, columnsLeftOut }: Table): void {
  frame.querySelector(".left-out")?.remove();
  const parts = [];
  if (columnsLeftOut) parts.push(`${columnsLeftOut.toLocaleString("en")} more columns`);
  if (rowsLeftOut) parts.push(`${rowsLeftOut.toLocaleString("en")} more rows`);
  if (!parts.length) return;
  const note = document.createElement("p");
  note.className = "left-out";
  note.textContent = `${parts.join(" and ")} are not shown.`;
  frame.append(note);
}

// Inline

const ENTITY = /&(?:#x([0-9a-f]{1,6})|#(\d{1,7})|([a-z]+));/gi;
const ENTITIES: Record<string, string> = {
  amp: "&",
  lt: "<",
  gt: ">",
  quot: '"',
  apos: "'",
  nbsp: "\u00a0",
  copy: "©",
  reg: "®",
  trade: "™",
  hellip: "…",
  ndash: "–",
  mdash: "—",
  lsquo: "‘",
  rsquo: "’",
  ldquo: "“",
  rdquo: "”",
  laquo: "«",
  raquo: "»",
  middot: "·",
  bull: "•",
  times: "×",
  deg: "°",
  plusmn: "±",
  rarr: "→",
  larr: "←",
  euro: "€",
  pound: "£",
};

type Tag = keyof HTMLElementTagNameMap;

function inlined<K extends Tag>(tag: K, tokens: readonly Token[] = []): HTMLElementTagNameMap[K] {
  const node = document.createElement(tag);
  node.dir = "auto";
  inline(node, tokens);
  node.normalize();
  return node;
}

function inline(parent: Node, tokens: readonly Token[]): void {
  for (const token of tokens) parent.appendChild(span(token));
}

function span(token: Token): Node {
  switch (token.type) {
    case "strong":
    case "em":
    case "del": {
      const node = document.createElement(token.type);
      inline(node, token.tokens ?? []);
      return node;
    }
    case "codespan": {
      const node = document.createElement("code");
      node.dir = "auto";
      node.append(bounded(visible(token.text)));
      return node;
    }
    case "br":
      return document.createElement("br");
    case "checkbox":
      return drawCheckbox(token as Tokens.Checkbox);
    case "link":
    case "image": // a loaded image would tell strangers who reads, and when
      return link(token as Tokens.Link | Tokens.Image);
    case "text":
      if ("tokens" in token && token.tokens) {
        const node = document.createDocumentFragment();
        inline(node, token.tokens);
        return node;
      }
      return document.createTextNode(bounded(decoded(token.text)));
    case "escape":
      return document.createTextNode(token.text);
    case "html":
      if (/^<br ?\/?>$/i.test(token.raw)) return document.createElement("br"); // the one way to break a table's line
      return document.createTextNode(bounded(token.raw));
    default:
      return document.createTextNode(bounded(token.raw));
  }
}

function link(token: Tokens.Link | Tokens.Image): Node {
  const content = document.createDocumentFragment();
  if (token.type === "link" && token.autolink) content.append(token.text); // literally: no entities in it
  else inline(content, token.tokens);
  const text = content.textContent ?? "";
  const found = target(token.href, text);
  if (!found) return document.createTextNode(visible(token.raw));
  const anchor = document.createElement("a");
  anchor.href = found.href;
  anchor.rel = "noopener noreferrer nofollow";
  anchor.target = "_blank";
  anchor.dir = "auto";
  const texts = document.createTreeWalker(content, NodeFilter.SHOW_TEXT);
  for (let node = texts.nextNode(); node; node = texts.nextNode()) node.nodeValue = visible(node.nodeValue ?? "");
  anchor.append(text.trim() ? content : found.href);
  if (!found.host) return anchor;
  const host = document.createElement("span");
  host.className = "host";
  host.dir = "ltr";
  host.textContent = ` (${found.host})`;
  const both = document.createDocumentFragment();
  both.append(anchor, host);
  return both;
}

function decoded(text: string): string {
  if (!text.includes("&")) return text;
  return text.replace(ENTITY, (all, hex?: string, digits?: string, name?: string) => {
    if (name !== undefined) return Object.hasOwn(ENTITIES, name) ? (ENTITIES[name] ?? all) : all;
    const point = hex === undefined ? Number(digits) : Number.parseInt(hex, 16);
    const isCharacter = point > 0 && point <= 0x10ffff && (point < 0xd800 || point > 0xdfff);
    return isCharacter ? String.fromCodePoint(point) : "\ufffd";
  });
}

const HEAPED = new RegExp(`(\\p{M}{${MARKS_MAX}})\\p{M}+`, "gu");

function bounded(text: string): string {
  return text.replace(HEAPED, "$1");
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
