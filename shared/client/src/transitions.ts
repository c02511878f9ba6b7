// The phases of a run and of a tool call, and what moves one from phase to phase: the tables, what an event means for
// them, and nothing else. docs/client-states.md draws them. Pure.

import type { TapelineEvent } from "./events.ts";
import type { Call, Run } from "./conversation.ts";

/** What a run is doing. */
export type Phase = (typeof PHASES)[number];
export const PHASES = [
  "idle", // its turn has not come; a conversation without runs is idle too
  "waiting", // for the model's first word
  "generating", // text or thinking arrives
  "calling", // the model writes a tool call, or has asked for some and none of them runs
  "executing", // a tool runs
  "resuming", // all results are there, and the model's next word is not
  "complete",
  "stopped",
  "failed", // what was shown of it stays
] as const;

/** What an event means for a run, with one line for the legend of its diagram. */
export const SIGNALS = {
  turn: "its turn has come: no run before it is under way",
  begin: "a worker takes its first step, with nothing written of it: after another was lost, too",
  resume: "a worker takes a later step, with nothing written of it: after another was lost, too",
  text: "the model writes text or thinking",
  call: "the model writes a tool call, or has asked for it",
  start: "a tool begins to run",
  rest: "a call has ended; others are left, and none of them runs",
  results: "the last of the step's calls has ended",
  finish: "the run is done",
  stop: "the run is done because somebody stopped it",
  fail: "the run ended with an error",
} as const;
export type Signal = keyof typeof SIGNALS;

type Table<From extends string, On extends string> = Readonly<Record<From, Readonly<Partial<Record<On, From>>>>>;

/** A signal that a phase has no entry for leaves it as it is. */
export const TRANSITIONS: Table<Phase, Signal> = {
  idle: { turn: "waiting", stop: "stopped" },
  waiting: { text: "generating", call: "calling", finish: "complete", stop: "stopped", fail: "failed" },
  generating: {
    begin: "waiting",
    resume: "resuming",
    call: "calling",
    finish: "complete",
    stop: "stopped",
    fail: "failed",
  },
  calling: {
    begin: "waiting",
    resume: "resuming",
    text: "generating",
    start: "executing",
    results: "resuming",
    finish: "complete",
    stop: "stopped",
    fail: "failed",
  },
  executing: { rest: "calling", results: "resuming", stop: "stopped", fail: "failed" },
  resuming: { text: "generating", call: "calling", stop: "stopped", fail: "failed" },
  complete: {},
  stopped: {},
  failed: {},
};

/** How far a tool call is. */
export type CallPhase = (typeof CALL_PHASES)[number];
export const CALL_PHASES = [
  "writing", // the model writes it, or has asked for it just now
  "waiting", // for a person's decision
  "decided",
  "pending", // for a worker
  "running",
  "done",
] as const;

/** What an event means for a call. */
export const CALL_SIGNALS = {
  write: "the model writes a part of its arguments",
  ask: "a person is asked whether it may be made",
  decide: "a person has approved or denied it",
  issue: "its workers may take it",
  start: "a worker takes it, or takes it over",
  report: "its worker says how far it is",
  end: "it has its result",
} as const;
export type CallSignal = keyof typeof CALL_SIGNALS;

/** An event whose signal the call's phase has no entry for changes nothing of the call. */
export const CALL_TRANSITIONS: Table<CallPhase, CallSignal> = {
  writing: { write: "writing", ask: "waiting", issue: "pending" },
  waiting: { decide: "decided", end: "done" },
  decided: { issue: "pending", end: "done" },
  pending: { start: "running", end: "done" },
  running: { start: "running", report: "running", end: "done" },
  done: {},
};

/** What `event` means for the run it has just made `run`; null: nothing. */
export function signalOf(event: TapelineEvent, run: Run): Signal | null {
  const step = run.steps.at(-1);
  const calls = (step?.fresh ?? step)?.calls ?? []; // not those of an attempt that was lost
  switch (event.type) {
    case "step":
      if (event.text || event.thinking) return "text";
      return event.step === 1 ? "begin" : "resume";
    case "token":
    case "thinking":
    case "tool_input":
    case "answer":
      return calls.length ? "call" : "text";
    case "tool_call":
      return "call";
    case "tool_started":
      return "start";
    case "tool_result":
      if (calls.every((call) => call.status === "done")) return "results";
      return calls.some((call) => call.status === "running") ? null : "rest";
    case "done":
      return event.reason === "stopped" ? "stop" : "finish";
    case "error":
      return "fail";
    default:
      return null;
  }
}

/** The shortest way to where `run` is by what it holds: the phase of a run whose events were not seen. */
export function* signalsOf(run: Run): Generator<Signal> {
  if (run.status !== "queued") yield "turn";
  for (const { text, thinking, finish, calls } of run.steps) {
    if (calls.length) yield "call";
    else if (text || thinking || finish !== null) yield "text";
    if (calls.some((call) => call.status === "running")) yield "start";
    else if (calls.length && calls.every((call) => call.status === "done")) yield "results";
  }
  if (run.status === "error") yield "fail";
  else if (run.status === "done") yield run.reason === "stopped" ? "stop" : "finish";
}

/** What `event` means for `call`, as it is before the event; null: nothing. */
export function callSignalOf(event: TapelineEvent, call: Call): CallSignal | null {
  switch (event.type) {
    case "tool_input":
      return "write";
    case "tool_call":
      if (call.status !== "writing") return call.approved ? "issue" : null;
      return event.needs_approval ? "ask" : "issue";
    case "approval":
      return "decide";
    case "tool_started":
      return "start";
    case "tool_progress":
      return "report";
    case "tool_result":
      return "end";
    default:
      return null;
  }
}
