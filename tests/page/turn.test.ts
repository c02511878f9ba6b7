// Which runs of a conversation are shown, and what the list of conversations becomes.

import assert from "node:assert/strict";
import { test } from "node:test";
import { changed, type Entry, grouped, merged, renewed } from "../../services/edge/page/src/list.ts";
import { turns } from "../../services/edge/page/src/turn.ts";
import { EMPTY, fold } from "../../shared/client/src/state.ts";

/** Runs by name, each of which may replace another: `b2:b`. */
function said(...names: string[]) {
  const events = names.map((name, at) => {
    const [run = "", replaces = ""] = name.split(":");
    return { type: "message" as const, id: at + 1, run, ts: at, content: run, replaces };
  });
  return fold(events, EMPTY).runs;
}

/** The turns as `run 1/2`, in brackets where they count no longer. */
function shown(runs: ReturnType<typeof said>, chosen: Record<string, string> = {}): string[] {
  return turns(runs, new Map(Object.entries(chosen))).map(({ run, index, versions, counts }) => {
    const name = versions.length > 1 ? `${run.run} ${index + 1}/${versions.length}` : run.run;
    return counts ? name : `(${name})`;
  });
}

test("a run that replaces another stands in its place, and what followed that one is a version away", () => {
  assert.deepEqual(shown([]), []);
  assert.deepEqual(shown(said("a", "b")), ["a", "b"]);
  const runs = said("a", "b", "c", "b2:b", "d", "b3:b2");
  assert.deepEqual(shown(runs), ["a", "b3 3/3"]);
  assert.deepEqual(shown(runs, { a: "b" }), ["a", "(b 1/3)", "(c)"]);
  assert.deepEqual(shown(runs, { a: "b2" }), ["a", "(b2 2/3)", "(d)"]);
  assert.deepEqual(shown(runs, { a: "no such run" }), ["a", "b3 3/3"]);
});

test("the first can be replaced, and what the server does with a run of an old branch is what is shown", () => {
  assert.deepEqual(shown(said("a", "b", "a2:a", "c")), ["a2 2/2", "c"]);
  assert.deepEqual(shown(said("a", "b", "a2:a", "c"), { "": "a" }), ["(a 1/2)", "(b)"]);
  // c2 replaces c, of a branch that counts no longer: as b2 came after c, it goes too, and c2 follows a.
  assert.deepEqual(shown(said("a", "b", "c", "b2:b", "c2:c")), ["a", "c2 3/3"]);
});

const entry = (id: string, created_ts: number, title = id): Entry => ({ id, title, created_ts });

test("the list takes what is newer from the server, also what is gone", () => {
  const known = [entry("d", 4), entry("c", 3), entry("b", 2), entry("a", 1)];
  assert.deepEqual(merged(known, [entry("e", 5), entry("c", 3, "named")]), [
    entry("e", 5),
    entry("d", 4),
    entry("c", 3, "named"),
    entry("b", 2),
    entry("a", 1),
  ]);
  const fresh = [entry("e", 5), entry("c", 3)]; // d was deleted
  assert.deepEqual(renewed(known, fresh, false).map(({ id }) => id), ["e", "c", "b", "a"]);
  assert.deepEqual(renewed(known, fresh, true).map(({ id }) => id), ["e", "c"]);
  assert.deepEqual(renewed(known, [], false), known); // a page of what was deleted says nothing of the others
  assert.deepEqual(renewed(known, [], true), []);
});

test("what was done while the list was asked for is not undone by the answer", () => {
  const answer = [entry("b", 2, "old name"), entry("a", 1)];
  const changes = new Map([["c", entry("c", 3)], ["b", entry("b", 2, "renamed")], ["a", null], ["gone before", null]]);
  assert.deepEqual(changed(answer, changes), [entry("c", 3), entry("b", 2, "renamed")]);
  assert.deepEqual(changed(answer, new Map()), answer);
});

test("the list is by days", () => {
  const now = new Date(2026, 10, 23, 9).getTime();
  const at = (...day: [number, number, number?]) => new Date(2026, ...day).getTime();
  const entries = [at(10, 23, 1), at(10, 22, 23), at(10, 22, 1), at(10, 18), at(9, 1)].map((ts) => entry(`${ts}`, ts));
  assert.deepEqual(
    grouped(entries, now).map(({ name, entries }) => [name, entries.length]),
    [
      ["Today", 1],
      ["Yesterday", 2],
      ["The week before", 1],
      ["Earlier", 1],
    ],
  );
});
