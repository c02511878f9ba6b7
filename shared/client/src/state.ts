// What a conversation is, folded from its events, exactly as the server folds them (shared/tapeline/fold.py). Pure: no
// clock, no I/O; a state is never changed in place, so whoever draws it tells by identity what is new. Field names are
// those of the snapshot, `GET /v1/conversations/{id}`; what a reader needs besides says so.

import type * as events from "./events.ts";
import type { CallPhase, Phase, Signal } from "./transitions.ts";
import { CALL_TRANSITIONS, TRANSITIONS, callSignalOf, signalOf, signalsOf } from "./transitions.ts";
import { DELTAS } from "./schema.ts";
import { derived } from "./title.ts";
import { isValid } from "./valid.ts";

/**
 * An event as it is on the tape, with its place there: the cursor, which only grows. One of a type that this version
 * does not know comes as well; pass over it.
 */
export type StoredEvent = events.TapelineEvent & { readonly id: number };

/** A conversation. */
export interface State {
  readonly id: string; // empty where it was folded from events, which do not say it
  readonly title: string; // as given, else made of what was said first
  readonly owner: string;
  readonly system: string;
  readonly model: string;
  readonly tools: readonly string[] | null;
  readonly metadata: Readonly<Record<string, unknown>>;
  readonly created_ts: number | null; // ms since the epoch; null until its first event
  readonly last_event_id: number; // the newest event folded in
  readonly runs: readonly Run[];
  readonly deleted: boolean; // not in a snapshot: who asks for one is told 404
  readonly phase: Phase; // not in a snapshot: that of the active run, else of the newest
}

/** A message and all that answers it. */
export interface Run {
  readonly run: string;
  readonly status: "queued" | "active" | "done" | "error";
  readonly message: Said;
  readonly replaces: string; // the run whose place it takes; empty: none
  readonly replaced_by: string; // the newest run in whose favour it no longer counts; empty: none
  readonly model: string;
  readonly active_ts: number; // when its turn came, ms since the epoch
  readonly waited_ms: number; // how long people were waited for, until `waiting_since`
  readonly waiting_since: number | null; // since when a person is waited for, ms since the epoch
  readonly steps: readonly Step[];
  readonly stopped: boolean; // somebody asked for its end
  readonly reason: string; // why it is done
  readonly error: Failure | null;
  readonly usage: Usage;
  readonly first_token_ms: number | null;
  readonly duration_ms: number;
  readonly facts: number;
  readonly ended_event_id: number | null;
  readonly phase: Phase; // not in a snapshot
}

/** One step of the model, by its newest attempt. */
export interface Step {
  readonly step: number;
  readonly attempt: number;
  readonly event_id: number; // of the claim
  readonly worker: string;
  readonly trigger: number;
  readonly delivery: number;
  readonly text: string;
  readonly thinking: string;
  readonly finish: string | null; // null while the model is still writing it
  readonly asked: readonly events.AnswerCall[];
  readonly calls: readonly Call[]; // those that were issued; then, not so in a snapshot, those only written so far
  readonly usage: Usage;
  readonly first_token_ms: number | null;
  readonly superseded: boolean; // not in a snapshot: what it holds is a lost attempt's, until its own has as much
  readonly fresh: Written | null; // not in a snapshot: where `superseded`, what its own attempt has written so far
}

/** What the model has written of a step. */
export type Written = Pick<Step, "text" | "thinking" | "calls">;

/** One tool call. */
export interface Call {
  readonly call: string;
  readonly tool: string;
  readonly arguments: unknown;
  readonly input: string; // not in a snapshot's calls but its `inputs`: the arguments so far, while the model writes
  readonly deadline: number; // ms since the epoch; of the decision while it waits, then of the call
  readonly needs_approval: boolean;
  readonly timeout_ms: number;
  readonly approved: boolean | null;
  readonly decided_by: string;
  readonly reason: string; // as whoever decided gave it
  readonly status: CallPhase; // its phase; `writing` is not in a snapshot
  readonly issued_ts: number | null; // when workers could take it, ms since the epoch
  readonly worker: string;
  readonly attempt: number;
  readonly delivery: number;
  readonly idempotent: boolean; // whether what its worker has begun may be run again
  readonly event_id: number; // of the worker's claim
  readonly started_ts: number | null;
  readonly progress: { readonly fraction: number | null; readonly message: string } | null;
  readonly output: string; // what it has put out while it runs; its result takes the place of this
  readonly outcome: events.ToolResult["outcome"] | null;
  readonly is_error: boolean;
  readonly content: unknown;
  readonly stored: events.Stored | null; // it is too large for the event: its size, and how it begins
  readonly message: string;
  readonly duration_ms: number;
}

/** What the user said. */
export interface Said {
  readonly content: string;
  readonly by: string;
  readonly ts: number;
  readonly event_id: number;
}

/** Why a run failed. */
export interface Failure {
  readonly code: string;
  readonly message: string;
  readonly retryable: boolean;
}

export type Usage = Readonly<Record<string, number>>;

/** What `GET /v1/conversations/{id}` answers, as far as a state needs it. */
export type Snapshot = Omit<State, "runs" | "deleted" | "phase"> & {
  readonly runs: readonly (Omit<Run, "steps" | "phase"> & {
    readonly steps: readonly (Omit<Step, "calls" | "superseded" | "fresh"> & {
      readonly calls: readonly Omit<Call, "input">[];
      readonly inputs: readonly { readonly call: string; readonly tool: string; readonly text: string }[];
    })[];
  })[];
};

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

const NEW_RUN = {
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

const NEW_STEP = {
  finish: null,
  asked: [],
  calls: [],
  usage: {},
  first_token_ms: null,
  superseded: false,
  fresh: null,
} as const;

const NOTHING: Written = { text: "", thinking: "", calls: [] };

const NEW_CALL = {
  arguments: null,
  input: "",
  deadline: 0,
  needs_approval: false,
  timeout_ms: 0,
  approved: null,
  decided_by: "",
  reason: "",
  status: "writing",
  issued_ts: null,
  worker: "",
  attempt: 0,
  delivery: 0,
  idempotent: false,
  event_id: 0,
  started_ts: null,
  progress: null,
  output: "",
  outcome: null,
  is_error: false,
  content: null,
  stored: null,
  message: "",
  duration_ms: 0,
} as const;

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

/** The run whose turn it is: the first that has not ended. */
export function activeRun({ runs, deleted }: Pick<State, "runs" | "deleted">): Run | undefined {
  return deleted ? undefined : runs.find((run) => !ended(run));
}

/** Whether `run` has its terminal event. */
export function ended(run: Run): boolean {
  return run.ended_event_id !== null;
}

function phaseOf(state: Pick<State, "runs" | "deleted">): Phase {
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

function moved(run: Run, signal: Signal | null): Run {
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

/** The call with this change, in the phase that the event leads to; as it is where its phase has no entry. */
function advanced(call: Call, event: StoredEvent, change: Partial<Call>): Call {
  const signal = callSignalOf(event, call);
  const status = signal && CALL_TRANSITIONS[call.status][signal];
  return status ? { ...call, ...change, status } : call;
}

function withCall(step: Step, call: Call): Step {
  const others = step.calls.filter((one) => one.call !== call.call);
  if (call.status === "writing" && others.length < step.calls.length) {
    return { ...step, calls: step.calls.map((one) => (one.call === call.call ? call : one)) };
  }
  const issued = others.filter((one) => one.status !== "writing");
  const written = others.filter((one) => one.status === "writing");
  return { ...step, calls: call.status === "writing" ? [...others, call] : [...issued, call, ...written] };
}

/** Those that were issued, then those that were not; of each id one. */
function joined(issued: readonly Call[], written: readonly Call[]): Call[] {
  const calls = new Map<string, Call>();
  for (const call of [...issued, ...written]) if (!calls.has(call.call)) calls.set(call.call, call);
  return [...calls.values()];
}

function asked({ call, tool, arguments: given }: events.AnswerCall): Call {
  return { ...NEW_CALL, call, tool, arguments: given };
}

function named({ call, tool }: { call: string; tool: string }): { call: string; tool: string } {
  return { call, tool };
}

function added(one: Usage, other: Usage): Usage {
  const sum: Record<string, number> = { ...one };
  for (const [key, count] of Object.entries(other)) sum[key] = (sum[key] ?? 0) + count;
  return sum;
}
