// The reducer against the vectors that the server's fold is held to, and what a view relies on.

import assert from "node:assert/strict";
import { readFileSync, readdirSync } from "node:fs";
import { test } from "node:test";

import type { Call, Run, Snapshot, State, StoredEvent } from "../../shared/client/src/conversation.ts";
import { fromSnapshot } from "../../shared/client/src/snapshot.ts";
import { EMPTY, activeRun, ended, fold, reduce } from "../../shared/client/src/state.ts";
import {
  CALL_TRANSITIONS,
  type CallPhase,
  type Phase,
  TRANSITIONS,
  callSignalOf,
  signalOf,
} from "../../shared/client/src/transitions.ts";
import { toSnapshot } from "./snapshot.ts";

interface Vector {
  name: string;
  events: StoredEvent[];
  snapshot: (Snapshot & { messages: unknown }) | null;
}

const FOLDER = new URL("../../shared/tapeline/schema/vectors/", import.meta.url);
const VECTORS = readdirSync(FOLDER).map((file): Vector => JSON.parse(readFileSync(new URL(file, FOLDER), "utf8")));
const TOKENS = 20_000;

const callsOf = (run?: Run): Call[] => run?.steps.flatMap((step) => step.calls) ?? [];

/** As one who comes now has it. */
function loaded(state: State): State {
  return fromSnapshot(JSON.parse(JSON.stringify(toSnapshot(state))));
}

/** Without what a superseded attempt has left on the screen: a snapshot does not know it. */
function without(state: State): State {
  const runs = state.runs.map((run) => ({
    ...run,
    steps: run.steps.map((step) =>
      step.superseded ? { ...step, ...step.fresh, superseded: false, fresh: null } : step,
    ),
  }));
  return { ...state, runs };
}

for (const { name, events, snapshot } of VECTORS) {
  test(name, () => {
    const whole = fold(events);
    const overs = whole.runs.filter(ended).flatMap((run) => run.steps);
    assert.ok(!overs.some((step) => step.superseded), "nothing comes any more that could take its place");
    if (snapshot) {
      const { messages: _, ...shown } = snapshot;
      assert.deepEqual({ ...toSnapshot(whole), id: shown.id }, shown);
      assert.deepEqual(fromSnapshot(snapshot), { ...without(whole), id: shown.id });
    } else {
      assert.equal(whole.deleted, true);
      assert.equal(activeRun(whole), undefined);
    }
    for (let count = 1; count < events.length; count++) {
      const part = fold(events.slice(0, count));
      if (part.deleted) break;
      assert.deepEqual(loaded(part), without(part), `a snapshot after ${count} events`);
      assert.deepEqual(without(fold(events.slice(count), loaded(part))), without(whole), `events after ${count}`);
    }
    assert.equal(fold(events, whole), whole, "applied again");
    for (const event of events) Object.freeze(event);
    let state = EMPTY;
    for (const event of events) {
      state = reduce(frozen(state), event);
      assert.equal(reduce(state, event), state, "applied twice");
    }
  });
}

function frozen<Value>(value: Value): Value {
  if (typeof value === "object" && value !== null && !Object.isFrozen(value)) {
    Object.freeze(value);
    Object.values(value).forEach(frozen);
  }
  return value;
}

test("the vectors reach every entry of the tables, and go nowhere else", () => {
  const seen = { run: new Set<string>(), call: new Set<string>() };
  for (const { name, events } of VECTORS) {
    let before = EMPTY;
    for (const event of events) {
      const after = reduce(before, event);
      for (const run of after.runs) {
        const was = before.runs.find((one) => one.run === run.run);
        if (was === run) continue;
        const from: Phase = was?.phase ?? "idle";
        const signal = was && event.run === run.run ? signalOf(event, run) : "turn";
        if (from !== run.phase) {
          assert.ok(signal && TRANSITIONS[from][signal] === run.phase, `${name}: ${from} –${signal}→ ${run.phase}`);
          seen.run.add(`${from} ${signal}`);
        }
        for (const call of callsOf(run)) {
          const old = callsOf(was).find((one) => one.call === call.call);
          if (old === call || event.type === "answer") continue;
          const begun: Call = old ?? { ...call, status: "writing", approved: null };
          const meant = callSignalOf(event, begun);
          const to: CallPhase | null | undefined = meant && CALL_TRANSITIONS[begun.status][meant];
          assert.equal(to, call.status, `${name}: ${begun.status} –${meant}→ ${call.status}`);
          seen.call.add(`${begun.status} ${meant}`);
        }
      }
      before = after;
    }
  }
  assert.deepEqual([...seen.run].sort(), entries(TRANSITIONS));
  assert.deepEqual([...seen.call].sort(), entries(CALL_TRANSITIONS));
});

function entries(table: Record<string, object>): string[] {
  return Object.entries(table)
    .flatMap(([from, row]) => Object.keys(row).map((signal) => `${from} ${signal}`))
    .sort();
}

const model = (id: number, run: string, fields: object): StoredEvent =>
  ({ id, run, ts: id, step: 1, attempt: 1, ...fields }) as StoredEvent;

test("what a lost attempt wrote stays until its successor has come further, and is replaced once", () => {
  const LOST = "Two hundred words of an answer. ";
  const input = { call: "a1", tool: "add", text: "{" };
  let id = 0;
  const begun = (...events: object[]): State =>
    fold(
      [
        { type: "message", content: "Go on." },
        { type: "step", worker: "w", trigger: 1 },
        ...events,
        { type: "step", attempt: 2, worker: "v", trigger: 1 },
      ].map((event) => model(++id, "r", event)),
    );
  const after = (state: State, event: object): State => reduce(state, model(++id, "r", { attempt: 2, ...event }));
  const shown = (state: State) => {
    const { superseded, text, thinking, calls } = state.runs[0]!.steps[0]!;
    return [superseded, text, thinking, calls.length];
  };

  let state = begun({ type: "thinking", text: "Hm." }, { type: "token", text: LOST });
  assert.deepEqual([state.phase, ...shown(state)], ["waiting", true, LOST, "Hm.", 0]);
  state = after(state, { type: "thinking", text: "Well, let me see." });
  let own = "";
  for (const word of LOST.split(/(?<= )/)) {
    state = after(state, { type: "token", text: word.toUpperCase() });
    own += word.toUpperCase();
    assert.deepEqual([state.phase, ...shown(state)], ["generating", true, LOST, "Hm.", 0]);
    assert.equal(state.runs[0]!.steps[0]!.fresh?.text, own);
  }
  for (const [event, ...as] of [
    [{ type: "token", text: "And" }, false, `${own}And`, "Well, let me see.", 0],
    [{ type: "tool_input", ...input }, false, own, "Well, let me see.", 1],
    [{ type: "answer", finish: "stop", text: "Short." }, false, "Short.", "", 0],
    [{ type: "tool_call", call: "a1", tool: "add", arguments: {}, deadline: 1 }, false, own, "Well, let me see.", 1],
    [{ type: "done", reason: "stop" }, false, own, "Well, let me see.", 0],
    [{ type: "step", attempt: 3, worker: "u", trigger: 1 }, true, LOST, "Hm.", 0],
  ] as const) {
    assert.deepEqual(shown(after(state, event)), as, event.type);
  }

  const thought = begun({ type: "thinking", text: "Hm." });
  assert.deepEqual(shown(after(thought, { type: "thinking", text: "Hm" })), [true, "", "Hm.", 0]);
  assert.deepEqual(shown(after(thought, { type: "token", text: "A" })), [false, "A", "", 0]);
  const called = begun({ type: "tool_input", ...input });
  assert.deepEqual(shown(after(called, { type: "thinking", text: "Hm. Well." })), [true, "", "", 1]);
  assert.equal(after(called, { type: "thinking", text: "Hm." }).phase, "generating", "of the lost call nothing counts");
});

test("a token makes five new objects, however much was said before it", () => {
  let id = 0;
  let state = EMPTY;
  for (const run of ["a", "b", "c"]) {
    state = reduce(state, { id: ++id, type: "message", run, ts: id, content: "Go on." });
    for (const step of [1, 2]) {
      const asked = { call: `${run}${step}`, tool: "add", arguments: {} };
      state = reduce(state, model(++id, run, { type: "step", step, worker: "w", trigger: 1 }));
      if (run === "c" && step === 2) break;
      state = reduce(state, model(++id, run, { type: "answer", step, finish: "tool_calls", calls: [asked] }));
      state = reduce(state, model(++id, run, { type: "tool_call", step, ...asked, deadline: 1 }));
    }
    if (run !== "c") state = reduce(state, model(++id, run, { type: "done", reason: "stop" }));
  }
  const known = new Set(objects(state));
  let made = 0;
  for (let count = 0; count < TOKENS; count++) {
    state = reduce(state, model(++id, "c", { type: "token", step: 2, text: "x " }));
    for (const object of objects(state)) {
      if (known.has(object)) continue;
      known.add(object);
      made += 1; // the state, its runs, the run, its steps, the step
    }
  }
  assert.equal(made, 5 * TOKENS);
  assert.equal(state.runs[2]?.steps[1]?.text.length, 2 * TOKENS);
  assert.equal(state.phase, "generating");
});

function* objects(value: unknown): Generator<object> {
  if (typeof value !== "object" || value === null) return;
  yield value;
  for (const part of Object.values(value)) yield* objects(part);
}
