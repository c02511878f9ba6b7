// Markdown as blocks, while the text still grows: how little of it has to be read again. Pure.

import { type Begun, begun, continued } from "./begun.ts";
import { Bounded, type Links, type Token } from "./lexer.ts";

// What follows one of these is read the same with or without it; what follows a paragraph's last line is not.
const BREAKS = new Set(["space", "heading", "hr"]);

/** A text as blocks. The first `done` of them stay as they are, whatever is appended; only `whole` may change them. */
export interface Blocks {
  readonly text: string;
  readonly blocks: readonly Token[];
  readonly done: number;
  readonly doneChars: number;
  /** From reference definitions that are done. */
  readonly links: Links;
  /** Whether any reference definition was seen: one may change blocks before it. */
  readonly defines: boolean;
  /** Of the first that is not done. */
  readonly begun: Begun | null;
}

export const NONE: Blocks = { text: "", blocks: [], done: 0, doneChars: 0, links: {}, defines: false, begun: null };

/** The blocks of a text that is still being written. Where it continues `before`, only its unfinished end is read. */
export function grown(before: Blocks, text: string): Blocks {
  text = normal(text);
  if (text === before.text) return before;
  const known = text.startsWith(before.text) ? before : { ...NONE, blocks: before.blocks };
  const rest = text.slice(known.doneChars);
  let lexer = new Bounded(known.links);
  const goesOn = known.begun && continued(known.begun, rest, (text) => lexer.lex(text));
  if (!goesOn) lexer = new Bounded(known.links);
  const tail = kept(goesOn ?? lexer.lex(rest), before.blocks, known.done);
  const blocks = [...known.blocks.slice(0, known.done), ...tail];
  const defines = known.defines || Object.keys(lexer.tokens.links).length > 0;

  // The first line of the next block ends a block, and the next but one, once it has a whole line, shows that this
  // line stays as it is.
  const solid = tail.flatMap(({ type }, at) => (type === "space" ? [] : [at]));
  const lastChars = tail.slice(solid.at(-1)).reduce((chars, { raw }) => chars + raw.length, 0);
  if (!text.includes("\n", text.length - lastChars)) solid.pop();
  let { done, doneChars } = known;
  const links = { ...known.links };
  let [at, chars] = [done, doneChars];
  for (const token of tail.slice(0, solid.at(-2) ?? 0)) {
    if (!text.startsWith(token.raw, chars)) break; // marked has changed it: no telling where it ends
    chars += token.raw.length;
    at += 1;
    if (token.type === "def") links[token.tag] ??= { href: token.href, title: token.title };
    if (BREAKS.has(token.type)) [done, doneChars] = [at, chars];
  }
  const stays = goesOn && done === known.done ? known.begun : null;
  const open = defines ? null : begun(blocks[done], text.slice(doneChars), stays); // else a definition in it were lost
  return { text, blocks, done, doneChars, links, defines, begun: open };
}

/** The blocks of a finished text; those that are as in `before` are the same objects. */
export function whole(before: Blocks, text: string): Blocks {
  const all = grown(before, text);
  if (!all.defines) return all;
  return { ...NONE, text: all.text, blocks: kept(new Bounded({}).lex(all.text), all.blocks, 0), defines: true };
}

/** The inline tokens of `text`. */
export function spans(text: string, links: Links): Token[] {
  return new Bounded(links).inlineTokens(text);
}

/** Whether two blocks are drawn the same. Their text does not say: what is around it decides how it is read. */
export function alike(a: Token, b: Token): boolean {
  return a === b || (a.type === b.type && a.raw === b.raw && JSON.stringify(a) === JSON.stringify(b));
}

function kept(fresh: readonly Token[], before: readonly Token[], from: number): Token[] {
  return fresh.map((token, at) => {
    const old = before[from + at];
    return old && alike(old, token) ? old : token;
  });
}

function normal(text: string): string {
  if (text.includes("\r")) text = text.replace(/\r\n?/g, "\n");
  return text.includes("\0") ? text.replaceAll("\0", "\ufffd") : text;
}
