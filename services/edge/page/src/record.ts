// One event as it is stored, and what the attempt that it is of wrote.

import { escaped } from "./bidi.ts";
import { h } from "./dom.ts";
import { duration } from "./duration.ts";
import { indented } from "./lines.ts";
import { written, wrote } from "./moment.ts";
import { number } from "./quantity.ts";
import type { Attempt, Execution, Moment, Timeline } from "./timeline.ts";

const JSON_CHARS_MAX = 50_000; // of one event

export interface Record {
  readonly node: HTMLElement;
  /**
   * Shows the moment at `place`, stored as `json`; `chosen` in place of the attempt that it is of. `hasText`: the log
   * has what attempts wrote.
   */
  show(timeline: Timeline, place: number, json: string, chosen: Attempt | Execution | null, hasText: boolean): void;
}

export function record(): Record {
  const node = h("div.record");
  let shown: unknown[] = [];
  return {
    node,
    show(timeline, place, json, chosen, hasText) {
      const now = [timeline, place, chosen];
      if (now.every((part, at) => part === shown[at])) return;
      shown = now;
      const moment = timeline.moments[place]!;
      const attempt = chosen ?? (moment.superseded_by === null ? null : attemptOf(moment, timeline));
      const parts: Node[] = [h("h2", {}, `Event ${moment.id}`), h("p.hint", {}, told(moment))];
      if (attempt?.kind === "attempt") parts.push(textOf(attempt, timeline, hasText, chosen !== null));
      const label = `Event ${moment.id} as it is stored`;
      node.replaceChildren(...parts, h("pre", { tabindex: "0", "aria-label": label }, stored(json)));
    },
  };
}

function attemptOf(moment: Moment, { work }: Timeline): Attempt | null {
  const isIts = (one: Attempt | Execution): one is Attempt => one.kind === "attempt" && wrote(one, moment);
  return work.find(isIts) ?? null;
}

function textOf(attempt: Attempt, { moments }: Timeline, hasText: boolean, isOpen: boolean): HTMLElement {
  const { thinking, text } = written(moments, attempt);
  const by = attempt.superseded_by === null ? "" : `, superseded by ${attempt.superseded_by}`;
  const body = h("div.written");
  if (thinking) body.append(h("p.thought", {}, thinking));
  body.append(h("p", {}, text || (hasText ? "It wrote no text." : "Its text has expired.")));
  const summary = h("summary", {}, `What attempt ${attempt.attempt}${by} wrote`);
  return h("details.attempt-text", isOpen ? { open: "" } : {}, summary, body);
}

function stored(json: string): string {
  const text = escaped(indented(json));
  const more = text.length - JSON_CHARS_MAX;
  return more > 0 ? `${text.slice(0, JSON_CHARS_MAX)}\n… ${number(more)} more characters: the export has them` : text;
}

function told({ prev, hole, superseded_by, attempt, silence_ms }: Moment): string {
  const parts = [prev === null ? "Its writer did not say what it follows." : `Follows ${prev || "nothing: it is the first"}.`];
  if (hole) parts.push(`The log does not have what is between ${hole.after} and ${hole.last}.`);
  if (superseded_by !== null) parts.push(`Attempt ${attempt}, superseded by ${superseded_by}: it does not count.`);
  if (silence_ms) parts.push(`${duration(silence_ms)} after the event before.`);
  return parts.join(" ");
}
