// From what the server answers to a state. Pure.

import { NEW_CALL, asked, joined } from "./call.ts";
import type { Run, Snapshot, State } from "./conversation.ts";
import { EMPTY, NEW_RUN, NEW_STEP, moved, phaseOf } from "./state.ts";
import { signalsOf } from "./transitions.ts";

/** The state that a snapshot describes. */
export function fromSnapshot(snapshot: Snapshot): State {
  const { id, title, owner, system, model, tools, metadata, created_ts, last_event_id } = snapshot;
  const runs = snapshot.runs.map((shown) => {
    const steps = shown.steps.map(({ inputs, ...step }) => {
      const calls = step.calls.map((call) => ({ ...NEW_CALL, ...call }));
      const written = inputs.map(({ call, tool, text }) => ({ ...NEW_CALL, call, tool, input: text }));
      return { ...NEW_STEP, ...step, calls: joined(calls, [...written, ...step.asked.map(asked)]) };
    });
    const run: Run = { ...NEW_RUN, ...shown, steps };
    return [...signalsOf(run)].reduce(moved, run);
  });
  const state = { id, title, owner, system, model, tools, metadata, created_ts, last_event_id, runs };
  return { ...EMPTY, ...state, phase: phaseOf({ runs, deleted: false }) };
}
