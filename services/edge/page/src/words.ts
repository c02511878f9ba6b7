// What of a text that is still being written may be shown: never half a word, no mark that may yet turn into
// something else, code by lines, tables by rows. What is held back is shown when it is certain, or at the end. Pure.

import remend, { type RemendOptions } from "remend";
import { spans } from "./blocks.ts";
import type { Links, Token, Tokens } from "./lexer.ts";

const WORD_CHARS_MAX = 64; // a longer word is shown before it ends
const MARKS_CHARS_MAX = 1_000; // a longer line of nothing but marks is shown before it ends
const HEADER_CHARS_MAX = 1_000; // of a line that may become a table's header; a longer one is shown
const LINE_CHARS_MAX = 500; // a longer line of code is shown before it ends
const OPEN_CHARS_MAX = 10_000; // a paragraph longer than this shows marks that have not closed as they are

// What is open is closed, so that its marks are never seen. The rest of what remend does is not for us.
const CLOSING: RemendOptions = {
  linkMode: "text-only",
  katex: false,
  setextHeadings: false,
  comparisonOperators: false,
  htmlTags: false,
};

/** A block that is not finished. Two of the same text need not be drawn the same. */
export type Open = Token & { open?: true };

const MARKS = /^(?:[ \t>]|[-*+_=#~`|:.)\d]|\[[ xX]?\]?)*$/;

/** `text` without a last line of which only marks are there: `-` may be an item, a rule or a heading. */
export function certain(text: string): string {
  const line = text.lastIndexOf("\n") + 1;
  const marks = text.length - line <= MARKS_CHARS_MAX && MARKS.test(text.slice(line));
  return marks ? text.slice(0, line) : text;
}

// Scripts that put no spaces between words are shown by character, with the marks that belong to it.
const SCRIPTS = ["Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar"];
const SPACELESS = SCRIPTS.map((script) => `\\p{Script=${script}}`).join("");
const BOUNDARY = new RegExp(`^.*(?:\\s|[${SPACELESS}\\u3000-\\u303f\\uff00-\\uffef][\\p{M}\\u200d]*)`, "su");

/** `text` up to its last word boundary. It never shrinks as the text grows. */
export function words(text: string): string {
  let from = Math.max(0, text.length - WORD_CHARS_MAX);
  if (isLowSurrogate(text, from)) from -= 1;
  const end = BOUNDARY.exec(text.slice(from));
  if (end) return text.slice(0, from + end[0].length);
  if (from === 0) return "";
  return /[\ud800-\udbff]$/.test(text) ? text.slice(0, -1) : text;
}

function isLowSurrogate(text: string, at: number): boolean {
  return at > 0 && /[\udc00-\udfff]/.test(text.charAt(at));
}

/** Whether a block of code has its closing fence. */
export function closed(code: Tokens.Code): boolean {
  const fence = /^ {0,3}(`{3,}|~{3,})/.exec(code.raw)?.[1];
  if (!fence) return true;
  const raw = code.raw.trimEnd();
  const line = raw.slice(raw.lastIndexOf("\n") + 1).trim();
  return raw.includes("\n") && line.length >= fence.length && line === fence.charAt(0).repeat(line.length);
}

/**
 * The part of a text's last block that may be shown, or null while nothing of it may. `end` is the text's last
 * character: a space after a word and a line break after a row say that these are whole.
 */
export function shown(token: Token, end: string, links: Links): Open | null {
  switch (token.type) {
    case "code":
      return closed(token as Tokens.Code) ? token : { ...token, text: lines(token.text, end), open: true };
    case "table":
      return end === "\n" ? token : { ...token, rows: (token as Tokens.Table).rows.slice(0, -1), open: true };
    case "list": {
      const items = (token as Tokens.List).items;
      const last = items.at(-1);
      return last ? { ...token, items: [...items.slice(0, -1), inner(last, end, links)], open: true } : token;
    }
    case "blockquote":
      return inner(token as Tokens.Blockquote, end, links);
    case "paragraph":
    case "heading":
    case "text":
      return prose(token as Tokens.Paragraph | Tokens.Heading | Tokens.Text, end, links);
    case "html":
      return { ...token, text: words(token.text), open: true };
    default:
      return token;
  }
}

function inner(token: Tokens.Blockquote | Tokens.ListItem, end: string, links: Links): Open {
  const at = token.tokens.findLastIndex(({ type }) => type !== "space");
  const last = token.tokens[at];
  const part = last && shown(last, end, links);
  return { ...token, tokens: [...token.tokens.slice(0, Math.max(0, at)), ...(part ? [part] : [])], open: true };
}

function prose(token: Tokens.Paragraph | Tokens.Heading | Tokens.Text, end: string, links: Links): Open | null {
  const task = (token.tokens ?? []).filter(({ type }) => type === "checkbox");
  let text = /\s/.test(end) ? token.text : words(token.text);
  if (task.length) text = text.replace(/^\[[ xX]\][ \t]+/, "");
  const line = text.lastIndexOf("\n") + 1;
  const mayBeHeader = token.type !== "heading" && /^[ \t]*\|/.test(text.slice(line));
  if (mayBeHeader && text.length - line <= HEADER_CHARS_MAX) text = text.slice(0, line);
  text = text.trimEnd();
  if (!text) return null;
  if (text.length <= OPEN_CHARS_MAX) text = remend(text, CLOSING);
  return { ...token, tokens: [...task, ...spans(text, links)], open: true };
}

function lines(code: string, end: string): string {
  if (end === "\n") return code;
  const line = code.lastIndexOf("\n") + 1;
  if (code.length - line <= LINE_CHARS_MAX) return code.slice(0, Math.max(0, line - 1));
  return words(code);
}
