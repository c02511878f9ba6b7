// What a conversation's events add up to, exactly as the server folds them (shared/tapeline/fold.py). Pure: no clock, no
// I/O; a state is never changed in place, so whoever draws it tells by identity what is new.

import { NEW_CALL, advanced, asked, joined, named, withCall } from "./call.ts";
import type { Call, Run, State, Step, StoredEvent, Usage, Written } from "./conversation.ts";
import { DELTAS } from "./schema.ts";
import { derived } from "./title.ts";
import { type Phase, type Signal, TRANSITIONS, signalOf } from "./transitions.ts";
import { isValid } from "./valid.ts";

type Of<Type extends StoredEvent["type"]> = Extract<StoredEvent, { type: Type }>;
type Writing = Of<"token"> | Of<"thinking"> | Of<"tool_input"> | Of<"answer">;

export const EMPTY: State = Object.freeze({
  id: "",
  title: "",
  owner: "",
  system: "",
  model: "",
  tools: null,
  metadata: {},
  created_ts: null,
  last_event_id: 0,
  runs: [],
  deleted: false,
  phase: "idle",
});

export const NEW_RUN = {
  replaces: "",
  replaced_by: "",
  waited_ms: 0,
  waiting_since: null,
  steps: [],
  stopped: false,
  reason: "",
  error: null,
  usage: {},
  first_token_ms: null,
  duration_ms: 0,
  ended_event_id: null,
  phase: "idle",
} as const;

export const NEW_STEP = {
  finish: null,
  asked: [],
  calls: [],
  usage: {},
  first_token_ms: null,
  superseded: false,
  fresh: null,
} as const;

const NOTHING: Written = { text: "", thinking: "", calls: [] };

/**
 * The state after `event`. One that was applied already changes nothing; one of an unknown type, or not what its type
 * says, nothing that is shown.
 */
export function reduce(state: State, event: StoredEvent): State {
  if (!(event.id > state.last_event_id)) return state;
  const next = isValid(event) ? applied(state, event) : state;
  return { ...next, last_event_id: event.id, phase: phaseOf(next) };
}

/** The state after these events, `state` being the one before them. */
export function fold(events: Iterable<StoredEvent>, state: State = EMPTY): State {
  for (const event of events) state = reduce(state, event);
  return state;
}

/** The run whose turn it is: the first that has not ended. */
export function activeRun({ runs, deleted }: Pick<State, "runs" | "deleted">): Run | undefined {
  return deleted ? undefined : runs.find((run) => !ended(run));
}

/** Whether `run` has its terminal event. */
export function ended(run: Run): boolean {
  return run.ended_event_id !== null;
}

export function phaseOf(state: Pick<State, "runs" | "deleted">): Phase {
  return (activeRun(state) ?? state.runs.at(-1))?.phase ?? "idle";
}

function applied(state: State, event: StoredEvent): State {
  switch (event.type) {
    case "conversation": {
      if (state.created_ts !== null) return state;
      const { owner, title = "", system = "", model = "", tools = null, metadata = {}, ts } = event;
      return titled({ ...state, owner, system, model, tools, metadata, created_ts: ts }, title);
    }
    case "title":
      return titled(state, event.title);
    case "deleted":
      return { ...state, deleted: true };
    case "message":
      return said(state, event);
    default: {
      const at = state.runs.findLastIndex((run) => run.run === event.run);
      const run = state.runs[at];
      if (!run || (ended(run) && event.type !== "tool_result")) return state;
      const changed = inRun(run, event);
      if (changed === run) return state;
      const next = { ...state, runs: state.runs.with(at, changed) };
      return ended(changed) && !ended(run) ? turned(next, event.ts) : next;
    }
  }
}

function titled(state: State, title: string): State {
  return { ...state, title: title || derived(state.runs[0]?.message.content ?? "") };
}

function said(state: State, event: Of<"message">): State {
  const { run, content, by = "", ts, id, replaces = "", model } = event;
  if (state.runs.some((one) => one.run === run)) return state;
  const first = state.runs.findIndex((one) => one.run === replaces);
  const isReplaced = (at: number) => first >= 0 && at >= first;
  const before = state.runs.map((one, at) => (isReplaced(at) ? { ...one, replaced_by: run } : one));
  const queued: Run = {
    ...NEW_RUN,
    run,
    status: "queued",
    message: { content, by, ts, event_id: id },
    replaces: first < 0 ? "" : replaces,
    model: model || state.model,
    active_ts: ts,
    facts: 1,
  };
  const next: Run = activeRun(state) ? queued : moved({ ...queued, status: "active" }, "turn");
  return titled({ ...state, runs: [...before, next] }, state.title);
}

/** The run before has ended: the next is due, and needs no event of its own. */
function turned(state: State, ts: number): State {
  const next = activeRun(state);
  if (next?.status !== "queued") return state;
  const turn: Run = moved({ ...next, status: "active", active_ts: ts }, "turn");
  return { ...state, runs: state.runs.with(state.runs.indexOf(next), turn) };
}

export function moved(run: Run, signal: Signal | null): Run {
  const phase = (signal && TRANSITIONS[run.phase][signal]) ?? run.phase;
  return phase === run.phase ? run : { ...run, phase };
}

/** The run after an event of its own. A fact counts even where it comes too late to change anything. */
function inRun(run: Run, event: StoredEvent): Run {
  const changed = written(run, event);
  const next = changed === run ? run : moved(changed, signalOf(event, changed));
  return DELTAS.has(event.type) ? next : waited({ ...next, facts: next.facts + 1 }, event.ts);
}

function written(run: Run, event: StoredEvent): Run {
  switch (event.type) {
    case "token":
      return inStep(run, event, (step) => ({ ...step, text: step.text + event.text }));
    case "thinking":
      return inStep(run, event, (step) => ({ ...step, thinking: step.thinking + event.text }));
    case "tool_input":
      return inStep(run, event, (step) => {
        const call = step.calls.find((one) => one.call === event.call) ?? { ...NEW_CALL, ...named(event) };
        const next = advanced(call, event, { input: call.input + event.text });
        return next === call ? step : withCall(step, next);
      });
    case "step":
      return claimed(run, event);
    case "answer":
      return answered(run, event);
    case "tool_call":
      return called(run, event);
    case "approval": {
      const { approved, by = "", reason = "" } = event;
      const edited = approved && event.arguments ? { arguments: event.arguments } : {};
      return inCall(run, event, { approved, decided_by: by, reason, ...edited });
    }
    case "tool_started": {
      const { worker, attempt = 1, delivery = 1, idempotent = false, id, ts } = event;
      const afresh = { progress: null, output: "" }; // an attempt before it no longer counts
      return inCall(run, event, { worker, attempt, delivery, idempotent, event_id: id, started_ts: ts, ...afresh });
    }
    case "tool_progress": {
      const { fraction = null, message = "", text = "" } = event;
      return inCall(run, event, { progress: { fraction, message } }, text);
    }
    case "tool_result": {
      const { outcome, is_error = false, content = null, stored = null, message = "", duration_ms = 0 } = event;
      const over = { progress: null, output: "" };
      return inCall(run, event, { outcome, is_error, content, stored, message, duration_ms, ...over });
    }
    case "stop":
      return { ...run, stopped: true };
    case "done":
      return { ...over(run, event), status: "done", reason: event.reason };
    case "error": {
      const { code, message, retryable = false } = event;
      return { ...over(run, event), status: "error", error: { code, message, retryable } };
    }
    default:
      return run;
  }
}

/** A worker claims a step: the next, or once more one that is being written. */
function claimed(run: Run, event: Of<"step">): Run {
  const { step: number, attempt, worker, trigger, delivery = 1, text = "", thinking = "", id } = event;
  const newest = run.steps.at(-1);
  const isTakeover = newest?.step === number;
  if (isTakeover ? attempt <= newest.attempt || newest.finish !== null : number !== run.steps.length + 1) return run;
  let step: Step = {
    ...NEW_STEP,
    step: number,
    attempt,
    event_id: id,
    worker,
    trigger,
    delivery,
    text,
    thinking,
  };
  if (isTakeover && !text && !thinking) {
    const calls = newest.calls.filter((call) => call.status === "writing");
    const superseded = Boolean(newest.text || newest.thinking || calls.length);
    const fresh = superseded ? NOTHING : null;
    step = { ...step, text: newest.text, thinking: newest.thinking, calls, superseded, fresh };
  }
  const before = isTakeover ? run.steps.slice(0, -1) : run.steps;
  return { ...run, model: event.model || run.model, steps: [...before, step] };
}

function answered(run: Run, event: Of<"answer">): Run {
  const { text = "", thinking = "", finish, calls = [], usage = {}, first_token_ms = null } = event;
  const next = inStep(run, event, (step) => {
    const issued = step.calls.filter((call) => call.status !== "writing");
    const shown = joined(issued, calls.map(asked));
    return { ...step, text, thinking, finish, asked: calls, calls: shown, usage, first_token_ms };
  });
  if (next === run) return run;
  return { ...next, usage: added(run.usage, usage), first_token_ms: run.first_token_ms ?? first_token_ms };
}

function called(run: Run, event: Of<"tool_call">): Run {
  const { call: id, needs_approval = false, timeout_ms = 0, deadline, ts } = event;
  const newest = run.steps.at(-1);
  if (!newest || newest.step !== event.step || newest.attempt !== event.attempt) return run;
  const issue = { arguments: event.arguments, deadline, issued_ts: ts };
  if (issuedIn(run, id)) return inCall(run, event, issue);
  const step = afresh(newest);
  const written = step.calls.find((call) => call.call === id) ?? { ...NEW_CALL, ...named(event) };
  const call = advanced(written, event, {
    ...issue,
    ...named(event),
    input: "",
    needs_approval,
    timeout_ms,
    issued_ts: needs_approval ? null : ts,
  });
  return withStep(run, withCall(step, call));
}

/** Adds up the time in which a person is waited for, by the clocks of those who wrote the events. */
function waited(run: Run, ts: number): Run {
  const waits = run.steps.at(-1)?.calls.some((call) => call.status === "waiting") ?? false;
  if (waits === (run.waiting_since !== null)) return run;
  if (run.waiting_since === null) return { ...run, waiting_since: ts };
  return { ...run, waited_ms: run.waited_ms + Math.max(0, ts - run.waiting_since), waiting_since: null };
}

function over(run: Run, event: Of<"done"> | Of<"error">): Run {
  const { usage = {}, first_token_ms = null, duration_ms = 0, id } = event;
  const newest = run.steps.at(-1);
  const steps = newest?.superseded ? withStep(run, afresh(newest)).steps : run.steps;
  return { ...run, steps, usage, first_token_ms, duration_ms, ended_event_id: id };
}

/** Changes the step that is being written, if the event is of it and of its attempt. */
function inStep(run: Run, event: Writing, change: (step: Step) => Step): Run {
  const step = run.steps.at(-1);
  if (step?.step !== event.step || step.attempt !== event.attempt || step.finish !== null) return run;
  const own = afresh(step);
  const next = change(own);
  if (next === own) return run;
  if (!step.superseded || event.type === "answer" || isAhead(next, step)) return withStep(run, next);
  return withStep(run, { ...step, fresh: { text: next.text, thinking: next.thinking, calls: next.calls } });
}

/** Whether `own` has come further than a lost attempt had: what is shown is replaced once, and does not shrink. */
function isAhead(own: Written, lost: Written): boolean {
  if (own.calls.length || own.text.length > lost.text.length) return true;
  return !lost.text && !lost.calls.length && own.thinking.length > lost.thinking.length;
}

/** Without what an earlier attempt wrote. */
function afresh(step: Step): Step {
  return step.superseded ? { ...step, ...step.fresh, superseded: false, fresh: null } : step;
}

function withStep(run: Run, step: Step): Run {
  return { ...run, steps: run.steps.with(-1, step) };
}

/** Changes an issued call, if its phase has an entry for what the event means. */
function inCall(run: Run, event: StoredEvent & { call: string }, change: Partial<Call>, output = ""): Run {
  const at = issuedIn(run, event.call);
  if (!at) return run;
  const [step, call] = at;
  const next = advanced(call, event, output ? { ...change, output: call.output + output } : change);
  if (next === call) return run;
  const changed = { ...step, calls: step.calls.with(step.calls.indexOf(call), next) };
  return { ...run, steps: run.steps.with(run.steps.indexOf(step), changed) };
}

function issuedIn(run: Run, id: string): [Step, Call] | undefined {
  for (let at = run.steps.length - 1; at >= 0; at--) {
    const step = run.steps[at] as Step;
    const call = step.calls.find((one) => one.call === id && one.status !== "writing");
    if (call) return [step, call];
  }
  return undefined;
}

function added(one: Usage, other: Usage): Usage {
  const sum: Record<string, number> = { ...one };
  for (const [key, count] of Object.entries(other)) sum[key] = (sum[key] ?? 0) + count;
  return sum;
}
