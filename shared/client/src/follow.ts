// One reader of one conversation: each event once and in order, through whatever happens to its connections.

import { backoffMs } from "./backoff.ts";
import { pieces } from "./body.ts";
import type { Presence } from "./presence.ts";
import { Lost, Refused } from "./refused.ts";
import { type Frame, Malformed, Parser } from "./sse.ts";
import type { StoredEvent } from "./state.ts";
import type { Times } from "./times.ts";
import { isKnown } from "./valid.ts";

/**
 * connecting: asking. live: reading. waiting: it broke, and is tried again at `retryAt`. offline: as waiting, the
 * device having no network. paused: nobody looks. lost: refused for good, or failing for too long.
 */
export type ConnectionState = "connecting" | "live" | "waiting" | "offline" | "paused" | "lost";

export interface Connection {
  readonly state: ConnectionState;
  /** What ended the last try; null where nothing did. */
  readonly reason: Error | null;
  /** When it is tried again, ms since the epoch by this device's clock; null where it is not, or is under way. */
  readonly retryAt: number | null;
}

export interface Opened {
  response: Response;
  /** The sequence after which the response begins. */
  cursor: number;
}

/** What is followed. */
export interface Source {
  /** Asks for what comes after `cursor`; null: nothing was read yet, or the log has no such place any more (410). */
  open(cursor: number | null, signal: AbortSignal): Promise<Opened>;
  /** Nothing of interest can follow this event. */
  isLast(event: StoredEvent): boolean;
  /** Asking again is no use. */
  isFinal(refused: Refused, cursor: number | null): boolean;
}

export interface Following {
  times: Times;
  presence: Presence;
  signal: AbortSignal;
  onConnection(connection: Connection): void;
  /** Go on trying for ever, and only say that it is lost. */
  isPatient?: boolean;
}

/**
 * The events as they come, those of one piece of the response together. Ends after the last event, where there is no
 * more (204), or once `signal` is aborted. Throws `Refused` where that is final, and `Lost` after `times.giveUpMs`.
 */
export async function* follow(source: Source, following: Following): AsyncGenerator<StoredEvent[], void> {
  const { times, presence, signal, onConnection, isPatient = false } = following;
  let cursor: number | null = null;
  let retryMs = times.retryMs;
  let failures = 0; // tries in a row without a good connection
  let failingSince: number | null = null;
  let attempt: AbortController | null = null; // of the connection under way
  let readingSince = 0; // when it was last waited for more of it
  let reason: Error | null = null; // what ended the last try
  let wake: (() => void) | null = null; // ends the wait between two connections
  let isUrgent = false; // do not wait before the next try

  const say = (state: ConnectionState, reason: Error | null = null, retryAt: number | null = null) => {
    if (!signal.aborted) onConnection({ state, reason, retryAt });
  };
  const sleep = (ms: number) =>
    new Promise<void>((resolve) => {
      const timer = ms < Infinity ? setTimeout(() => wake?.(), ms) : undefined;
      wake = () => {
        clearTimeout(timer);
        wake = null;
        resolve();
      };
    });
  const onPresence = (silentMs: number) => {
    if (presence.isPaused) attempt?.abort(new Lost("Nobody is looking.", 0));
    else {
      failures = 0;
      failingSince = null;
      if (wake) wake();
      else if (attempt && Date.now() - readingSince >= silentMs) {
        isUrgent = true;
        attempt.abort(new Lost("The connection may be a dead one.", 0));
      }
    }
  };
  const onAbort = () => {
    attempt?.abort(signal.reason);
    wake?.();
  };

  const forget = presence.subscribe(onPresence);
  signal.addEventListener("abort", onAbort);
  try {
    while (!signal.aborted) {
      if (presence.isPaused) {
        say("paused");
        await sleep(Infinity);
        continue;
      }
      const startedAt = (readingSince = Date.now());
      let isGood = false;
      let openedAt: number | null = null;
      attempt = new AbortController();
      say("connecting", reason);
      reason = null;
      try {
        const { response, cursor: from } = await source.open(cursor, attempt.signal);
        cursor = from;
        if (response.status === 204) return;
        checkType(response);
        say("live");
        openedAt = Date.now();
        const parser = new Parser();
        for await (const bytes of pieces(response, attempt, times.silenceMs)) {
          const batch: StoredEvent[] = [];
          let isLast = false;
          try {
            for (const frame of parser.feed(bytes)) {
              const event = eventIn(frame);
              if (isLast || event.id <= cursor) continue;
              cursor = event.id;
              batch.push(event);
              isLast = source.isLast(event);
            }
          } catch (error) {
            reason = errorOf(error);
          }
          retryMs = parser.retryMs ?? retryMs;
          if (batch.length) {
            isGood = true;
            failures = 0;
            failingSince = null;
            yield batch;
          }
          if (isLast) return;
          if (reason) throw reason;
          readingSince = Date.now();
        }
      } catch (error) {
        reason = errorOf(error);
      } finally {
        attempt.abort(); // whatever ended it, leave no half-read response behind
        attempt = null;
      }
      if (signal.aborted) return;

      let asked = 0;
      if (reason instanceof Refused) {
        if (source.isFinal(reason, cursor)) throw reason;
        if (reason.status === 410) cursor = null;
        asked = reason.retryAfterMs ?? 0;
      }
      if (isUrgent || presence.isPaused) {
        isUrgent = false;
        continue;
      }
      const now = Date.now();
      if (isGood || (openedAt !== null && now - openedAt >= times.steadyMs)) {
        failures = 0;
        failingSince = null;
      }
      failures += 1;
      failingSince ??= startedAt;
      const leftMs = times.giveUpMs - (now - failingSince);
      if (leftMs <= 0) reason = new Lost("The server could not be reached.", now - failingSince, reason);
      if (leftMs <= 0 && !isPatient) throw reason;
      const backoff = presence.isOffline ? times.backoffMaxMs : backoffMs(failures, retryMs, times.backoffMaxMs);
      const wait = Math.min(Math.max(asked, backoff), isPatient ? Infinity : leftMs); // one last try before giving up
      say(leftMs <= 0 ? "lost" : presence.isOffline ? "offline" : "waiting", reason, now + wait);
      await sleep(wait);
    }
  } finally {
    forget();
    signal.removeEventListener("abort", onAbort);
  }
}

function checkType(response: Response): void {
  const type = response.headers.get("Content-Type") ?? "none";
  if (!/^text\/event-stream\b/i.test(type)) throw new Malformed(`not an event stream but ${type}: some proxy's page?`);
}

/** What the edge calls what is stored where that is no event, or not its writer's to write. */
const ODD = ["undecodable", "misplaced"];

/** The event in `frame`. Its type is the edge's word, who checks what writers may say: theirs is worth nothing here. */
function eventIn({ id, type, data }: Frame): StoredEvent {
  const sequence = Number(id);
  if (!/^\d+$/.test(id) || !Number.isSafeInteger(sequence)) throw new Malformed(`an event without its place: ${id}`);
  const event = parsed(data);
  const says = event?.["type"];
  if (ODD.includes(type) || (says !== type && isKnown(String(says)))) {
    const shown = says === type ? event : {};
    return { ...shown, type, run: "", ts: 0, id: sequence } as unknown as StoredEvent;
  }
  if (typeof says !== "string") throw new Malformed(`event ${id} is not JSON`);
  return { ...event, id: sequence } as StoredEvent;
}

function parsed(data: string): Record<string, unknown> | null {
  try {
    return JSON.parse(data) as Record<string, unknown> | null;
  } catch {
    return null;
  }
}

function errorOf(thrown: unknown): Error {
  return thrown instanceof Error ? thrown : new Error(String(thrown));
}
