// How much of a list or a table that is still being written stays as it is: all but its last items or rows. What comes
// is read after that, so that a long one costs no more than a short one. Pure.

import { rowsMax, type Table, type Token, type Tokens } from "./lexer.ts";

const OPEN = 2; // items or rows that may change: the last one grows, and as it does it may become a part of the other

const BLANK_END = /\n\n[ \t]*$/; // a blank line between two items makes their list loose

export interface Begun {
  /** Only what stays. */
  readonly block: Tokens.List | Table;
  /** Items; lines of rows, of which not all may be shown. */
  readonly count: number;
  /** Of the text, from the beginning of the block. */
  readonly chars: number;
}

/** What stays of `block`, whose text `text` begins with. `before`: what stayed of it before. */
export function begun(block: Token | undefined, text: string, before: Begun | null): Begun | null {
  if (!block || !text.startsWith(block.raw.trimEnd())) return null; // marked has changed it: no telling where it ends
  if (isList(block)) return begunList(block, before);
  return isTable(block) ? begunTable(block, text, before) : null;
}

/** `text`, the block's from its beginning, read by `lex` after what stays; null: all of it has to be read. */
export function continued({ block, count, chars }: Begun, text: string, lex: (text: string) => Token[]): Token[] | null {
  const rest = text.slice(chars);
  const head = isList(block) ? listHead(block, rest) : tableHead(text);
  const [first, ...others] = lex(head + rest);
  if (!first) return null;
  const raw = text.slice(0, chars) + first.raw.slice(head.length);
  if (isList(block) && isList(first) && first.ordered === block.ordered && first.loose === block.loose) {
    const items = first.items.slice(head ? 1 : 0);
    return items.length ? [{ ...block, raw, items: [...block.items, ...items] }, ...others] : null;
  }
  if (isTable(block) && isTable(first) && first.rows.length) {
    const max = rowsMax(block.header.length);
    const left = count + first.rows.length + (first.rowsLeftOut ?? 0) - max;
    const rows = [...block.rows, ...first.rows].slice(0, max);
    return [{ ...block, raw, rows, ...(left > 0 ? { rowsLeftOut: left } : {}) }, ...others];
  }
  return null;
}

function begunList(list: Tokens.List, before: Begun | null): Begun | null {
  const count = list.items.length - OPEN;
  if (count <= (before?.count ?? 0)) return before;
  // Whether a list is loose may be for its last items to say, and they may yet say otherwise.
  const isSure = (before && isList(before.block) && before.block.loose) || list.items.slice(0, count).some(({ raw }) => BLANK_END.test(raw));
  if (list.loose && !isSure) return before;
  let chars = before?.chars ?? 0;
  for (const { raw } of list.items.slice(before?.count ?? 0, count)) chars += raw.length;
  return { block: { ...list, items: list.items.slice(0, count) }, count, chars };
}

function begunTable(table: Table, text: string, before: Begun | null): Begun | null {
  const count = table.rows.length + (table.rowsLeftOut ?? 0) - OPEN;
  if (count <= (before?.count ?? 0)) return before;
  let chars = before?.chars ?? tableHead(text).length;
  for (let row = before?.count ?? 0; row < count; row += 1) chars = text.indexOf("\n", chars) + 1;
  const { rowsLeftOut: _, ...all } = table;
  return { block: { ...all, rows: table.rows.slice(0, count) }, count, chars };
}

/** What makes the rest of a loose list one too: an item, and a blank line. */
function listHead({ loose, raw }: Tokens.List, rest: string): string {
  if (!loose) return "";
  const [indent = ""] = /^ */.exec(rest) ?? [];
  const [bullet = ""] = /\d{1,9}[.)]|[-*+]/.exec(raw) ?? [];
  return `${indent}${bullet} x\n\n`;
}

/** A table's first two lines, without which there is none. */
function tableHead(text: string): string {
  return text.slice(0, text.indexOf("\n", text.indexOf("\n") + 1) + 1);
}

const isList = (block: Token): block is Tokens.List => block.type === "list";
const isTable = (block: Token): block is Table => block.type === "table";
