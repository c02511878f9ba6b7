// A conversation's log as an auditor reads it: who wrote what and when, which attempts count, how long each tool was
// waited for, and whether anything is missing. Pure: no DOM, no clock, no I/O.

import { DELTAS, WRITERS } from "@tapeline/client";

import { line, wrote } from "./moment.ts";

export const SILENCE_MS_MAX = 10_000; // a longer silence is cut to this, as the server does where it replays

/** An event as the log has it: its place put in front of what its writer said, of which nothing is sure but `type`. */
export interface Logged {
  readonly id: number;
  /** The conversation's event before it; null where its writer did not say. */
  readonly prev?: number | null;
  readonly type: string;
  readonly [field: string]: unknown;
}

export type Writer = "input" | "model" | "tool" | "unknown";

/** One event on the timeline. */
export interface Moment {
  readonly event: Logged;
  readonly id: number;
  readonly prev: number | null;
  readonly type: string;
  readonly fact: boolean;
  /** ms since the epoch, by its writer's clock. */
  readonly ts: number;
  /** ms from the beginning, long silences cut short: where it stands on the strip. */
  readonly at: number;
  /** ms since the event before, where that is a silence that was cut short; else 0. */
  readonly silence_ms: number;
  readonly writer: Writer;
  /** Who claimed the attempt it belongs to; empty where nobody had to. */
  readonly worker: string;
  readonly run: string;
  readonly step: number | null;
  readonly attempt: number | null;
  /** The attempt that took the place of this event's own; null where it counts. */
  readonly superseded_by: number | null;
  readonly call: string;
  /** What the log does not have between the event before and this one. */
  readonly hole: Hole | null;
}

/** Events that were there, or may have been: after `after`, up to `last`. */
export interface Hole {
  readonly after: number;
  readonly last: number;
}

/** One attempt at a step, from its claim to its last event. */
export interface Attempt {
  readonly kind: "attempt";
  readonly run: string;
  readonly step: number;
  readonly attempt: number;
  readonly worker: string;
  readonly model: string;
  /** Its claim's place among the moments, and its last event's. */
  readonly first: number;
  last: number;
  readonly claimed_ts: number;
  /** When the first delta came. */
  first_ts: number | null;
  ended_ts: number;
  /** How its answer finished; empty: it has none. */
  finish: string;
  deltas: number;
  superseded_by: number | null;
  /** Of the text before it, where it goes on from there. */
  readonly resume: string;
}

/** One worker's attempt at a tool call; a call that nobody took has one, without a start. */
export interface Execution {
  readonly kind: "execution";
  readonly run: string;
  readonly step: number | null;
  readonly call: string;
  readonly tool: string;
  readonly attempt: number;
  readonly worker: string;
  /** The place among the moments of the event it began with, and of the one it ended with. */
  readonly first: number;
  /** The place of its claim. */
  readonly started: number | null;
  last: number;
  /** When workers could take the call; for a later attempt, when the one before it was given up. */
  readonly issued_ts: number;
  readonly started_ts: number | null;
  ended_ts: number | null;
  /** How long a person was waited for before that. */
  readonly approval_ms: number;
  readonly queue_ms: number | null;
  execution_ms: number | null;
  /** The result's; `lost`: another worker took over; empty: the log has no end of it. */
  outcome: string;
}

/** One message and what came of it. */
export interface RunSpan {
  readonly run: string;
  /** From 1. */
  readonly number: number;
  readonly title: string;
  readonly first: number;
  last: number;
  /** Of its terminal event: done's reason or error's code; empty: it has not ended. */
  outcome: string;
  failed: boolean;
}

export interface Timeline {
  readonly moments: readonly Moment[];
  readonly runs: readonly RunSpan[];
  /** Attempts and executions, in the order they began. */
  readonly work: readonly (Attempt | Execution)[];
  /** Length of the strip, ms. */
  readonly length_ms: number;
  readonly holes: number;
  /** Events whose writers did not say what they follow: nothing proves what comes before these. */
  readonly unproven: number;
  readonly takeovers: number;
}

/** What is known of a call before anybody takes it. */
interface Asked {
  readonly tool: string;
  readonly step: number | null;
  place: number;
  waits: boolean; // for a person
  readonly asked_ts: number;
  issued_ts: number;
  current: Execution | null;
}

type Open<T> = { -readonly [K in keyof T]: T[K] };

/**
 * The timeline of `events`, in the order of the log. `view`: `compact` where deltas were left out, so that what an
 * event follows need not be here.
 */
export function timeline(events: readonly Logged[], view: "full" | "compact" = "full"): Timeline {
  const moments: Open<Moment>[] = [];
  const runs = new Map<string, RunSpan>();
  const steps = new Map<string, Attempt[]>(); // each with its attempts, the newest last
  const calls = new Map<string, Asked>();
  const work: (Attempt | Execution)[] = [];
  let before: Moment | null = null;
  let latest = 0; // by any writer's clock
  let holes = 0;
  let unproven = 0;
  let takeovers = 0;

  for (const [place, event] of events.entries()) {
    const ts: number = number(event["ts"]) ?? before?.ts ?? 0;
    // Two writers' clocks need not agree. What one of them is ahead is not waited for again with each of its events,
    // unless it is so far ahead that it must be wrong.
    const passed = before ? Math.max(0, ts - latest) : 0;
    latest = ts < latest - SILENCE_MS_MAX ? ts : Math.max(ts, latest);
    const prev = event.prev ?? null;
    const hole = view === "full" ? holeBefore(prev, before?.id ?? 0) : null;
    if (hole) holes += 1;
    if (prev === null) unproven += 1;
    const run = text(event["run"]);
    const call = text(event["call"]);
    const moment: Open<Moment> = {
      event,
      id: event.id,
      prev,
      type: event.type,
      fact: !DELTAS.has(event.type),
      ts,
      at: (before?.at ?? 0) + Math.min(passed, SILENCE_MS_MAX),
      silence_ms: passed > SILENCE_MS_MAX ? passed : 0,
      writer: Object.hasOwn(WRITERS, event.type) ? WRITERS[event.type]! : "unknown",
      worker: text(event["worker"]),
      run,
      step: number(event["step"]),
      attempt: number(event["attempt"]),
      superseded_by: null,
      call,
      hole,
    };
    moments.push(moment);
    before = moment;

    const span = runs.get(run);
    if (span) span.last = place;
    else if (event.type === "message") {
      const title = line(text(event["content"]));
      runs.set(run, { run, number: runs.size + 1, title, first: place, last: place, outcome: "", failed: false });
    }
    if (span && !span.outcome && (event.type === "done" || event.type === "error")) {
      span.failed = event.type === "error";
      span.outcome = text(event[span.failed ? "code" : "reason"]) || event.type;
    }
    if (moment.writer === "model") inStep(moment, place);
    if (call && moment.writer !== "unknown") inCall(moment, place);
  }
  for (const attempt of work) {
    if (attempt.kind !== "attempt" || attempt.superseded_by === null) continue;
    for (const moment of moments.slice(attempt.first, attempt.last + 1)) {
      if (wrote(attempt, moment) && (!moment.fact || moment.type === "step")) moment.superseded_by = attempt.superseded_by;
    }
  }
  return {
    moments,
    runs: [...runs.values()],
    work: work.sort((one, other) => one.first - other.first),
    length_ms: before?.at ?? 0,
    holes,
    unproven,
    takeovers,
  };

  function inStep(moment: Open<Moment>, place: number): void {
    const { event, run, step, attempt, ts } = moment;
    if (step === null || attempt === null) return;
    const key = `${step} ${run}`;
    const attempts = steps.get(key) ?? [];
    if (event.type === "step") {
      const known = attempts.at(-1);
      if (known && attempt <= known.attempt) return;
      if (known) {
        known.superseded_by = attempt;
        takeovers += 1;
      }
      const claim: Attempt = {
        kind: "attempt",
        run,
        step,
        attempt,
        worker: moment.worker,
        model: text(event["model"]),
        first: place,
        last: place,
        claimed_ts: ts,
        first_ts: null,
        ended_ts: ts,
        finish: "",
        deltas: 0,
        superseded_by: null,
        resume: text(event["resume"]),
      };
      steps.set(key, [...attempts, claim]);
      work.push(claim);
      return;
    }
    const owner = attempts.find((one) => one.attempt === attempt);
    if (!owner) return;
    if (!moment.fact) {
      moment.worker = owner.worker; // the fence lets nobody else add to the attempt
      owner.first_ts ??= ts;
      owner.deltas += 1;
    } else if (event.type === "answer") owner.finish = text(event["finish"]);
    else return;
    owner.last = place;
    owner.ended_ts = ts;
  }

  function inCall(moment: Open<Moment>, place: number): void {
    const { event, call, ts } = moment;
    const tool = text(event["tool"]);
    const known = calls.get(call);
    if (event.type === "tool_call") {
      const waits = event["needs_approval"] === true && !known;
      if (known) Object.assign(known, { issued_ts: ts, place, waits }); // written again: it was approved
      else calls.set(call, { tool, step: moment.step, place, waits, asked_ts: ts, issued_ts: ts, current: null });
      return;
    }
    if (!known) return;
    moment.step ??= known.step;
    if (event.type === "tool_started") {
      const earlier = known.current;
      if (earlier?.ended_ts === null) Object.assign(earlier, ending(earlier, ts, place, "lost"));
      moment.attempt ??= 1;
      known.current = execution(moment, known, place, moment.attempt);
      work.push(known.current);
    } else if (event.type === "tool_progress" && known.current) {
      moment.worker ||= known.current.worker;
      moment.attempt ??= known.current.attempt;
    } else if (event.type === "tool_result") {
      if (!known.current) work.push((known.current = execution(moment, known, place, 0)));
      if (known.current.ended_ts !== null) return;
      Object.assign(known.current, ending(known.current, ts, place, text(event["outcome"])));
      moment.attempt ??= known.current.attempt || null;
    }
  }
}

/** One more worker at a call; attempt 0: it ended, and nobody had taken it. */
function execution(moment: Moment, asked: Asked, place: number, attempt: number): Execution {
  const { run, call, ts, worker } = moment;
  const issued_ts = asked.current ? ts : asked.issued_ts;
  return {
    kind: "execution",
    run,
    step: asked.step,
    call,
    tool: asked.tool,
    attempt,
    worker: attempt ? worker : "",
    first: asked.current ? place : asked.place,
    started: attempt ? place : null,
    last: place,
    issued_ts,
    started_ts: attempt ? ts : null,
    ended_ts: null,
    approval_ms: asked.current ? 0 : Math.max(0, (asked.waits ? ts : issued_ts) - asked.asked_ts),
    queue_ms: asked.waits ? null : Math.max(0, ts - issued_ts), // where it was denied it was in no queue
    execution_ms: null,
    outcome: "",
  };
}

function ending(one: Execution, ts: number, place: number, outcome: string): Partial<Execution> {
  const execution_ms = one.started_ts === null ? null : Math.max(0, ts - one.started_ts);
  return { ended_ts: ts, last: place, outcome, execution_ms };
}

function holeBefore(prev: number | null, seen: number): Hole | null {
  return prev === null || prev === seen ? null : { after: Math.min(seen, prev), last: Math.max(seen, prev) };
}

function text(value: unknown): string {
  return typeof value === "string" ? value : "";
}

function number(value: unknown): number | null {
  return typeof value === "number" && Number.isFinite(value) ? value : null;
}
