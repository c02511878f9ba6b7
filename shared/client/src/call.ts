// A tool call, and the calls of a step. Pure.

import type { AnswerCall } from "./events.ts";
import type { Call, Step, StoredEvent } from "./conversation.ts";
import { CALL_TRANSITIONS, callSignalOf } from "./transitions.ts";

export const NEW_CALL = {
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

/** The call with this change, in the phase that the event leads to; as it is where its phase has no entry. */
export function advanced(call: Call, event: StoredEvent, change: Partial<Call>): Call {
  const signal = callSignalOf(event, call);
  const status = signal && CALL_TRANSITIONS[call.status][signal];
  return status ? { ...call, ...change, status } : call;
}

export function withCall(step: Step, call: Call): Step {
  const others = step.calls.filter((one) => one.call !== call.call);
  if (call.status === "writing" && others.length < step.calls.length) {
    return { ...step, calls: step.calls.map((one) => (one.call === call.call ? call : one)) };
  }
  const issued = others.filter((one) => one.status !== "writing");
  const written = others.filter((one) => one.status === "writing");
  return { ...step, calls: call.status === "writing" ? [...others, call] : [...issued, call, ...written] };
}

/** Those that were issued, then those that were not; of each id one. */
export function joined(issued: readonly Call[], written: readonly Call[]): Call[] {
  const calls = new Map<string, Call>();
  for (const call of [...issued, ...written]) if (!calls.has(call.call)) calls.set(call.call, call);
  return [...calls.values()];
}

export function asked({ call, tool, arguments: given }: AnswerCall): Call {
  return { ...NEW_CALL, call, tool, arguments: given };
}

export function named({ call, tool }: { call: string; tool: string }): { call: string; tool: string } {
  return { call, tool };
}
