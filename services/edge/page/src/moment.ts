// One event of a log, as it is told: in a line, by its place, with the text that it is a part of. Pure.

import type { Attempt, Moment } from "./timeline.ts";

const LINE_CHARS_MAX = 160;

/** The index of the last of these, of which `of` grows, where it is no more than `value`; -1: there is none. */
export function lastUpTo<T>(values: readonly T[], value: number, of: (one: T) => number): number {
  let [low, high] = [0, values.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (of(values[middle]!) <= value) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

/** The place of the last moment at or before `at` ms on the strip; -1: there is none. */
export function placeAt(moments: readonly Moment[], at: number): number {
  return lastUpTo(moments, at, (moment) => moment.at);
}

/** Whether the attempt is the moment's own. */
export function wrote(attempt: Attempt, moment: Moment): boolean {
  return moment.run === attempt.run && moment.step === attempt.step && moment.attempt === attempt.attempt;
}

/** The nearest place from `place` in a direction, itself left out, whose moment is wanted; `place` where none is. */
export function next(
  moments: readonly Moment[],
  place: number,
  direction: 1 | -1,
  isWanted: (moment: Moment) => boolean,
): number {
  for (let at = place + direction; at >= 0 && at < moments.length; at += direction) {
    if (isWanted(moments[at]!)) return at;
  }
  return place;
}

/** The text an attempt wrote, counted or not, by kind. */
export function written(moments: readonly Moment[], attempt: Attempt): { thinking: string; text: string } {
  const parts: Record<string, string[]> = { thinking: [], token: [] };
  for (const moment of moments.slice(attempt.first, attempt.last + 1)) {
    if (wrote(attempt, moment)) parts[moment.type]?.push(plain(moment.event["text"]));
  }
  return { thinking: parts["thinking"]!.join(""), text: parts["token"]!.join("") };
}

/** What an event says, in a line. */
export function brief({ event, type }: Moment): string {
  const said = (...names: string[]) => names.map((name) => plain(event[name])).filter(Boolean).join(" · ");
  switch (type) {
    case "conversation":
      return line(said("title", "model", "owner"));
    case "approval":
      return line(`${event["approved"] ? "approved" : "denied"} ${said("by", "reason")}`);
    case "stop":
      return line(said("by", "reason"));
    case "step":
      return line(said("model", "resume"));
    case "answer":
      return line(said("finish", "text"));
    case "tool_call":
      return line(`${event["needs_approval"] ? "asks for approval · " : ""}${said("tool", "arguments")}`);
    case "tool_result":
      return line(said("outcome", event["is_error"] ? "message" : "content"));
    case "tool_started":
      return line(said("tool"));
    case "tool_input":
      return line(said("tool", "text"));
    case "tool_progress":
      return line(said("fraction", "message", "text"));
    case "error":
      return line(said("code", "message"));
    case "done":
      return line(said("reason"));
    case "misplaced":
      return line(`not its writer’s to write · ${said("kind", "event")}`);
    default:
      return line(said("content", "title", "text") || said("by"));
  }
}

function plain(value: unknown): string {
  if (value === null || value === undefined) return "";
  return typeof value === "string" ? value : JSON.stringify(value);
}

/** A text in a line, cut where it is long. */
export function line(value: string): string {
  return value.slice(0, LINE_CHARS_MAX).replaceAll("\n", " ↵ ");
}
