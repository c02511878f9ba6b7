// What a conversation is. Field names are those of the snapshot, `GET /v1/conversations/{id}`; what a reader needs besides
// says so.

import type * as events from "./events.ts";
import type { CallPhase, Phase } from "./transitions.ts";

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
