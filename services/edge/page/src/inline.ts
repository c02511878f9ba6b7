// What is within a line of an answer, as DOM nodes: marks, code, links, entities.
//
// Class names, for prose.css: span.host (where a link leads that claims otherwise).

import { visible } from "./bidi.ts";
import { h } from "./dom.ts";
import type { Token, Tokens } from "./lexer.ts";
import { target } from "./links.ts";

const MARKS_MAX = 8; // combining marks on one letter

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

/** An element with these inline tokens in it. */
export function inlined<K extends Tag>(tag: K, tokens: readonly Token[] = []): HTMLElementTagNameMap[K] {
  const node = h(tag, { dir: "auto" });
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
      const node = h(token.type);
      inline(node, token.tokens ?? []);
      return node;
    }
    case "codespan":
      return h("code", { dir: "auto" }, bounded(visible(token.text)));
    case "br":
      return h("br");
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
      if (/^<br ?\/?>$/i.test(token.raw)) return h("br"); // the one way to break a table's line
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
  const rel = "noopener noreferrer nofollow";
  const anchor = h("a", { href: found.href, rel, target: "_blank", dir: "auto" });
  const texts = document.createTreeWalker(content, NodeFilter.SHOW_TEXT);
  for (let node = texts.nextNode(); node; node = texts.nextNode()) node.nodeValue = visible(node.nodeValue ?? "");
  anchor.append(text.trim() ? content : found.href);
  if (!found.host) return anchor;
  const both = document.createDocumentFragment();
  both.append(anchor, h("span.host", { dir: "ltr" }, ` (${found.host})`));
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

/** A task's box, which is not for its reader to tick. */
export function drawCheckbox({ checked }: Tokens.Checkbox): HTMLElement {
  const said = checked ? "Done" : "To do";
  return h("input", { type: "checkbox", checked: checked ? "" : null, disabled: "", "aria-label": said });
}

const HEAPED = new RegExp(`(\\p{M}{${MARKS_MAX}})\\p{M}+`, "gu");

/** `text` with no more marks on a letter than a person may need. */
export function bounded(text: string): string {
  return text.replace(HEAPED, "$1");
}
