// Markdown read by `marked` (GFM), with bounds on what hostile text may cost. Pure.

import { Lexer, type Links, type Token, Tokenizer, type Tokens } from "marked";

export type { Links, Token, Tokens };

// Quotes and lists in one another, and inline marks; deeper is text. marked may read a quote twice for each level.
export const NESTING_MAX = 8;
export const COLUMNS_MAX = 50; // of a table: more are counted, not shown
export const ROWS_MAX = 1_000; // of a table
export const CELLS_MAX = 10_000; // of a table, rows times columns
const INLINE_WORK_MAX = 4_000_000; // characters times marks of one paragraph: reading it costs about that; more is text
const INLINE_CHARS_MAX = 100_000; // of one paragraph: a longer one is text

/** A table of which only a part is shown, and how much is not. */
export type Table = Tokens.Table & { rowsLeftOut?: number; columnsLeftOut?: number };

/** One reading of a text. `links`: what was defined before it. */
export class Bounded extends Lexer {
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
    const max = rowsMax(Math.min(columns, COLUMNS_MAX));
    const [rowsLeftOut, columnsLeftOut] = [lines.length - 2 - max, columns - COLUMNS_MAX];
    if (rowsLeftOut <= 0 && columnsLeftOut <= 0) return super.table(src);
    const shown = lines.slice(0, 2 + max).map(columnsLeftOut > 0 ? narrowed : (line) => line);
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

/** How many rows of a table are shown. */
export function rowsMax(columns: number): number {
  return Math.min(ROWS_MAX, Math.floor(CELLS_MAX / columns));
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
