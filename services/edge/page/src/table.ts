// A table of an answer as DOM nodes, while it is still being written: row by row.
//
// Class names, for prose.css: div.table (a table's frame, scrolls) > table, p.left-out; a cell's alignment.

import { h } from "./dom.ts";
import { inlined } from "./inline.ts";
import type { Table, Tokens } from "./lexer.ts";

export function drawTable(token: Table): HTMLElement {
  const table = h("table");
  const frame = h("div.table", { tabindex: 0, role: "region", "aria-label": "Table" }); // it scrolls: for the keyboard
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

/** Draws what is not as `before`; the columns are. */
export function redrawTable(frame: HTMLElement, before: Table, token: Table): void {
  const body = frame.querySelector("tbody");
  if (!body) return;
  const firstOther = token.rows.findIndex((row, at) => !alikeRows(before.rows[at], row));
  const kept = firstOther < 0 ? token.rows.length : firstOther;
  while (body.rows.length > kept) body.deleteRow(-1);
  for (const row of token.rows.slice(kept)) drawRow(body, "td", row);
  noteLeftOut(frame, token);
}

/** Whether one can be drawn in place of the other. */
export function alikeHeaders(a: Table, b: Table): boolean {
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
  frame.append(h("p.left-out", {}, `${parts.join(" and ")} are not shown.`));
}
