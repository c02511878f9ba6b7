// One reader of one conversation: each event once and in order, through whatever happens to its connections.

import { backoffMs } from "./backoff.ts";
import { pieces } from "./body.ts";
import type { News, Presence } from "./presence.ts";
import { Lost, Refused } from "./refused.ts";
import { type Frame, Malformed, Parser } from "./sse.ts";
import type { StoredEvent } from "./conversation.ts";
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
 * more (204), or once `signal` is aborted. Throws `Refused` where that is final, or asks for more patience than is left,
 * and `Lost` after `times.giveUpMs`.
 */
export async function* follow(source: Source, following: Following): AsyncGenerator<StoredEvent[], void> {
  const { times, presence, signal, onConnection, isPatient = false } = following;
  let cursor: number | null = null;
  let retryMs = times.retryMs;
  let failures = 0; // tries in a row without a good connection
  let failingSince: number | null = null;
  let isLost = false; // it has failed for too long
  let settling = 0; // tries that do not count, since the network is back
  let dueAt = 0; // the next try, ms since the epoch
  let notBefore = 0; // the server has asked for so much patience: only who wants it now passes over that
  let attempt: AbortController | null = null; // of the connection under way
  let readingSince = 0; // when it was last waited for more of it
  let reason: Error | null = null; // what ended the last try
  let wake: ((isTime: boolean) => void) | null = null; // ends the wait between two connections
  let isUrgent = false; // do not wait before the next try

  const say = (state: ConnectionState, reason: Error | null = null, retryAt: number | null = null) => {
    if (!signal.aborted) onConnection({ state, reason, retryAt });
  };
  /** Whether it was waited to the end. */
  const sleep = (ms: number) =>
    new Promise<boolean>((resolve) => {
      const timer = ms < Infinity ? setTimeout(() => wake?.(true), ms) : undefined;
      wake = (isTime) => {
        clearTimeout(timer);
        wake = null;
        resolve(isTime);
      };
    });
  const onPresence = (news: News) => {
    if (news === "online") {
      failures = 0;
      failingSince = null;
      settling = SETTLING_TRIES;
    } else if (news === "asked") {
      failures = 0;
      notBefore = 0;
    }
    if (presence.isPaused) attempt?.abort(new Lost("Nobody is looking.", 0));
    else if (!attempt) dueAt = 0;
    else if (news !== "seen" || Date.now() - readingSince >= times.staleMs) {
      isUrgent = true;
      attempt.abort(new Lost("The connection may be a dead one.", 0));
    }
    wake?.(false);
  };
  const onAbort = () => {
    attempt?.abort(signal.reason);
    wake?.(false);
  };

  const forget = presence.subscribe(onPresence);
  signal.addEventListener("abort", onAbort);
  try {
    while (!signal.aborted) {
      if (presence.isPaused) {
        const slept = sleep(Infinity);
        say("paused");
        await slept;
        continue;
      }
      const readyAt = Math.max(dueAt, notBefore);
      const waitMs = readyAt - Date.now();
      if (waitMs > 0) {
        const slept = sleep(waitMs); // before it is said: whoever hears it may end it
        say(isLost ? "lost" : presence.isOffline ? "offline" : "waiting", reason, readyAt);
        if (await slept) dueAt = notBefore = 0; // whatever the clock says by now
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
        isLost = false;
        settling = 0;
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

      let afterMs = 0;
      if (reason instanceof Refused) {
        if (source.isFinal(reason, cursor)) throw reason;
        if (reason.status === 410) cursor = null;
        afterMs = reason.retryAfterMs ?? 0;
      }
      const now = Date.now();
      dueAt = 0;
      notBefore = now + afterMs;
      if (isUrgent || presence.isPaused) {
        isUrgent = false;
        continue;
      }
      if (isGood || (openedAt !== null && now - openedAt >= times.steadyMs)) {
        failures = 0;
        failingSince = null;
      }
      if (settling && !(reason instanceof Refused)) {
        settling -= 1;
        dueAt = now + backoffMs(1, times.settleMs, times.settleMs);
        continue;
      }
      failures += 1;
      failingSince ??= startedAt;
      const leftMs = isPatient ? Infinity : times.giveUpMs - (now - failingSince);
      isLost = now - failingSince >= times.giveUpMs;
      if (isLost) reason = new Lost("The server could not be reached.", now - failingSince, reason);
      if (afterMs > leftMs || (isLost && !isPatient)) throw reason; // or it will have been given up by then
      const backoff = presence.isOffline ? times.backoffMaxMs : backoffMs(failures, retryMs, times.backoffMaxMs, afterMs);
      dueAt = now + Math.min(backoff, leftMs); // one last try before giving up
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

/** Tries soon after the network is back, which may all be too soon. */
const SETTLING_TRIES = 3;

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

export function errorOf(thrown: unknown): Error {
  return thrown instanceof Error ? thrown : new Error(String(thrown));
}
