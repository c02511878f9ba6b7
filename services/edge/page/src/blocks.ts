// Markdown as blocks, while the text still grows. `marked` reads it (GFM); this module decides how little of it has to
// be read again, and bounds what hostile text may cost. Pure.

import { Lexer, type Links, type Token, Tokenizer, type Tokens } from "marked";

export type { Links, Token, Tokens };

// Quotes and lists in one another, and inline marks; deeper is text. marked may read a quote twice for each level.
export const NESTING_MAX = 8;
export const COLUMNS_MAX = 50; // of a table: more are counted, not shown
export const ROWS_MAX = 1_000; // of a table
export const CELLS_MAX = 10_000; // of a table, rows times columns
const INLINE_WORK_MAX = 4_000_000; // characters times marks of one paragraph: reading it costs about that; more is text
const INLINE_CHARS_MAX = 100_000; // of one paragraph: a longer one is text

// What follows one of these is read the same with or without it; what follows a paragraph's last line is not.
const BREAKS = new Set(["space", "heading", "hr"]);

/** A table of which only a part is shown, and how much is not. */
export type Table = Tokens.Table & { rowsLeftOut?: number; columnsLeftOut?: number };

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
}

export const NONE: Blocks = { text: "", blocks: [], done: 0, doneChars: 0, links: {}, defines: false };

/** The blocks of a text that is still being written. Where it continues `before`, only its unfinished end is read. */
export function grown(before: Blocks, text: string): Blocks {
  text = normal(text);
  if (text === before.text) return before;
  const known = text.startsWith(before.text) ? before : { ...NONE, blocks: before.blocks };
  const lexer = new Bounded(known.links);
  const tail = kept(lexer.lex(text.slice(known.doneChars)), before.blocks, known.done);
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
  return { text, blocks, done, doneChars, links, defines };
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

class Bounded extends Lexer {
  #depth = 0;

  constructor(links: Links) {
    super({ gfm: true, tokenizer: new BoundedTokenizer() });
    Object.assign(this.tokens.links, links);
  }

  override inlineTokens(src: string, tokens: Token[] = []): Token[] {
    if (this.#depth >= NESTING_MAX || isCostly(src)) {
      tokens.push({ type: "text", raw: src, text: src, escaped: false });
      return tokens;
    }
    this.#depth += 1;
    try {
      return super.inlineTokens(src, tokens);
    } finally {
      this.#depth -= 1;
    }
  }
}

class BoundedTokenizer extends Tokenizer {
  #depth = 0;

  override blockquote(src: string): Tokens.Blockquote | undefined {
    return this.#within(() => super.blockquote(src));
  }

  override list(src: string): Tokens.List | undefined {
    return this.#within(() => super.list(src));
  }

  override table(src: string): Tokens.Table | undefined {
    const raw = this.rules.block.table.exec(src)?.[0];
    if (raw === undefined) return undefined;
    const lines = raw.trimEnd().split("\n");
    const columns = pipes(lines[0] ?? "");
    const rowsMax = Math.min(ROWS_MAX, Math.floor(CELLS_MAX / Math.min(columns, COLUMNS_MAX)));
    const [rowsLeftOut, columnsLeftOut] = [lines.length - 2 - rowsMax, columns - COLUMNS_MAX];
    if (rowsLeftOut <= 0 && columnsLeftOut <= 0) return super.table(src);
    const shown = lines.slice(0, 2 + rowsMax).map(columnsLeftOut > 0 ? narrowed : (line) => line);
    if (columnsLeftOut > 0 && pipes(lines[1] ?? "") !== columns) return undefined; // no table: its delimiters differ
    const table: Table | undefined = super.table(shown.join("\n"));
    if (!table) return undefined;
    table.raw = raw.replace(/\n+$/, "");
    if (rowsLeftOut > 0) table.rowsLeftOut = rowsLeftOut;
    if (columnsLeftOut > 0) table.columnsLeftOut = columnsLeftOut;
    return table;
  }

  #within<T>(read: () => T | undefined): T | undefined {
    if (this.#depth >= NESTING_MAX) return undefined;
    this.#depth += 1;
    try {
      return read();
    } finally {
      this.#depth -= 1;
    }
  }
}

const PIPE = /\\[\s\S]|\|/g;

/** How many columns a table's line has. */
function pipes(line: string): number {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  let count = 1;
  for (const [found] of inner.matchAll(PIPE)) if (found === "|") count += 1;
  return count;
}

/** The first `COLUMNS_MAX` cells of a table's line. */
function narrowed(line: string): string {
  line = line.trim();
  let left = COLUMNS_MAX + (line.startsWith("|") ? 1 : 0);
  for (const { 0: found, index } of line.matchAll(PIPE)) {
    if (found === "|" && --left === 0) return line.slice(0, index + 1);
  }
  return line;
}

function isCostly(text: string): boolean {
  if (text.length > INLINE_CHARS_MAX) return true;
  if (text.length * text.length < INLINE_WORK_MAX) return false;
  const marks = text.match(/[\\`*_~[\]<>!@&]|:\/\/|www\./g)?.length ?? 0;
  return text.length * marks > INLINE_WORK_MAX;
}
