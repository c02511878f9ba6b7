// The list of conversations as it grows from what the server tells at different times. Pure.

import type { Entry as Listed } from "@tapeline/client";

const DAY_MS = 86_400_000;

export type Entry = Pick<Listed, "id" | "title" | "created_ts">;

/** Both lists as one, newest first; `fresh` is right about what is in both. */
export function merged(known: readonly Entry[], fresh: readonly Entry[]): Entry[] {
  const renewed = new Set(fresh.map(({ id }) => id));
  const all = [...fresh, ...known.filter(({ id }) => !renewed.has(id))];
  return all.sort((a, b) => b.created_ts - a.created_ts);
}

/** The list after its beginning was loaded anew: what should be in `fresh` and is not has been deleted. */
export function renewed(known: readonly Entry[], fresh: readonly Entry[], isAll: boolean): Entry[] {
  const oldest = isAll ? 0 : (fresh.at(-1)?.created_ts ?? Infinity);
  return merged(known.filter(({ created_ts }) => created_ts < oldest), fresh);
}

/** The list with what this page has done while it was asked for: an entry that it made or changed, or null: deleted. */
export function changed(entries: readonly Entry[], changes: ReadonlyMap<string, Entry | null>): Entry[] {
  const mine = [...changes.values()].filter((entry) => entry !== null);
  return merged(entries.filter(({ id }) => changes.get(id) !== null), mine);
}

export interface Group {
  name: string;
  entries: Entry[];
}

/** By day, as people remember them; `now` in ms since the epoch. */
export function grouped(entries: readonly Entry[], now: number): Group[] {
  const midnight = new Date(now).setHours(0, 0, 0, 0);
  const nameOf = ({ created_ts }: Entry) => {
    if (created_ts >= midnight) return "Today";
    if (created_ts >= midnight - DAY_MS) return "Yesterday";
    return created_ts >= midnight - 7 * DAY_MS ? "The week before" : "Earlier";
  };
  const groups: Group[] = [];
  for (const entry of entries) {
    const name = nameOf(entry);
    if (groups.at(-1)?.name === name) groups.at(-1)!.entries.push(entry);
    else groups.push({ name, entries: [entry] });
  }
  return groups;
}
