// The HTTP API as calls: docs/api.md says what each means. All throw `Refused` or `Lost`.

import { pieces } from "./body.ts";
import { Chat } from "./chat.ts";
import type { Snapshot, StoredEvent } from "./conversation.ts";
import type { Done, Error as RunError } from "./events.ts";
import { type Connection, type Source, follow } from "./follow.ts";
import { Http, type Settings } from "./http.ts";
import { lines } from "./ndjson.ts";
import { Presence, watch } from "./presence.ts";
import { Lost, Refused } from "./refused.ts";

/** What a new conversation may be made of; all of it may be left out. */
export interface NewConversation {
  /** Chosen by the caller, creating it can be repeated: the second time is a 409 `exists`. */
  id?: string;
  title?: string;
  system?: string;
  model?: string;
  /** Allowed; all that are offered where it is left out. */
  tools?: string[];
  metadata?: Record<string, unknown>;
}

export interface Created {
  id: string;
  event_id: number;
  url: string;
  events_url: string;
}

/** A conversation in the list. */
export interface Entry {
  id: string;
  title: string;
  created_ts: number;
  url: string;
}

export interface Entries {
  conversations: Entry[];
  /** `before` of the next page; null at the end. */
  next: string | null;
}

export interface Model {
  id: string;
  default?: boolean;
}

export interface Sending {
  model?: string | undefined;
  /** While a run is active: `reject` is a 409 `busy`. */
  onBusy?: "reject" | "queue" | "interrupt" | undefined;
  /** The same key is the same run, however often it is sent. Made up where it is left out. */
  key?: string | undefined;
  /** A run that this message takes the place of. */
  replaces?: string | undefined;
}

export interface Sent {
  run: string;
  /** Of its message. */
  event_id: number;
  events_url: string;
}

export interface Decision {
  approved: boolean;
  /** In place of the model's. */
  arguments?: Record<string, unknown>;
  reason?: string;
}

export interface Reading {
  signal?: AbortSignal | undefined;
  onConnection?: ((connection: Connection) => void) | undefined;
}

export interface EventsOptions extends Reading {
  /** The sequence of the last event that was read. */
  after?: number | undefined;
  /** Only this run's, to its end. */
  run?: string | undefined;
  /** `compact` is without deltas. */
  view?: "full" | "compact" | undefined;
  /** What is stored, so many times as fast as it came, to its end. */
  pace?: number | undefined;
}

export interface ExportOptions {
  after?: number | undefined;
  /** `compact` is without deltas. */
  view?: "full" | "compact" | undefined;
  signal?: AbortSignal | undefined;
}

export class Tapeline {
  readonly #http: Http;

  constructor(settings: Settings) {
    this.#http = new Http(settings);
  }

  conversations({ limit, before }: { limit?: number; before?: string } = {}): Promise<Entries> {
    return this.#http.json(`v1/conversations${query({ limit, before })}`);
  }

  create(about: NewConversation = {}): Promise<Created> {
    return this.#http.json("v1/conversations", { method: "POST", body: about });
  }

  /** As the server folds it; `fromSnapshot` makes a `State` of it. */
  snapshot(id: string): Promise<Snapshot> {
    return this.#http.json(conversation(id));
  }

  rename(id: string, title: string): Promise<Entry> {
    return this.#http.json(conversation(id), { method: "PATCH", body: { title } });
  }

  delete(id: string): Promise<void> {
    return this.#http.json(conversation(id), { method: "DELETE" });
  }

  async models(): Promise<Model[]> {
    return (await this.#http.json<{ models: Model[] }>("v1/models")).models;
  }

  /** Begins a run and does not wait for it. After a `Lost`, send it again with the same `key`. */
  send(id: string, content: string, { key = newKey(), ...sending }: Sending = {}): Promise<Sent> {
    return this.#http.json(messages(id), {
      method: "POST",
      headers: { "Idempotency-Key": key },
      body: message(content, sending),
    });
  }

  /** Stops a run, from any device; it may be said twice. */
  async stop(id: string, run: string, reason?: string): Promise<void> {
    await this.#http.json(`${runOf(id, run)}/stop`, { method: "POST", body: { reason } });
  }

  async decide(id: string, run: string, call: string, decision: Decision): Promise<void> {
    await this.#http.json(`${callOf(id, run, call)}/approval`, { method: "POST", body: decision });
  }

  /** All that a call returned, as JSON; a body that breaks off is not what was stored. */
  result(id: string, run: string, call: string): Promise<Response> {
    return this.#http.request(`${callOf(id, run, call)}/result`);
  }

  /**
   * Begins a run and reads it to its end. Nothing is sent before the first event is asked for. Broken off before the
   * run is known, it is sent again with the same key; after that, its events are read on from where they were.
   */
  async *ask(id: string, content: string, options: Sending & Reading = {}): AsyncGenerator<StoredEvent, void> {
    const { key = newKey(), signal, onConnection, ...sending } = options;
    const http = this.#http;
    let run = "";
    const post = {
      method: "POST",
      headers: { Accept: SSE, "Idempotency-Key": key },
      body: message(content, sending),
    };
    const source: Source = {
      async open(cursor, signal) {
        if (cursor !== null && run) return opened(http, id, { run }, cursor, signal);
        return { response: await http.request(messages(id), { ...post, signal }), cursor: 0 };
      },
      isLast(event) {
        run ||= event.run ?? "";
        return ends(event, run);
      },
      // A limit that is used up says no to the message: nobody waits for an answer to what nobody has taken.
      isFinal: (refused) => !refused.passes || (!run && refused.status === 429),
    };
    yield* this.#read(source, { signal, onConnection }, Infinity);
  }

  /** Each event once and in order, as long as the conversation is there; with `run` or `pace` to the end of that. */
  async *events(id: string, options: EventsOptions = {}): AsyncGenerator<StoredEvent, void> {
    const { after = 0, run, view, pace, signal, onConnection } = options;
    const http = this.#http;
    const source: Source = {
      open: (cursor, signal) => opened(http, id, { run, view, pace }, cursor ?? after, signal),
      isLast: (event) => ends(event, run),
      isFinal: (refused) => !refused.passes,
    };
    const isEndless = run === undefined && pace === undefined;
    yield* this.#read(source, { signal, onConnection }, isEndless ? http.times.hiddenMs : Infinity);
  }

  /** What is stored, and then the end. Throws `Lost` where it breaks off: go on after the last that came. */
  async *stored(id: string, { after, view, signal }: ExportOptions = {}): AsyncGenerator<StoredEvent, void> {
    const attempt = new AbortController();
    const onAbort = () => attempt.abort(signal?.reason);
    signal?.addEventListener("abort", onAbort);
    const startedAt = Date.now();
    try {
      signal?.throwIfAborted();
      const response = await this.export(id, { after, view, signal: attempt.signal });
      yield* lines(pieces(response, attempt, this.#http.times.silenceMs));
    } catch (error) {
      if (signal?.aborted || error instanceof Refused || error instanceof Lost) throw error;
      throw new Lost("The export broke off.", Date.now() - startedAt, error);
    } finally {
      signal?.removeEventListener("abort", onAbort);
      attempt.abort();
    }
  }

  /** The same as NDJSON, to save or to pipe; a body that breaks off is not the whole. */
  export(id: string, { after, view, signal }: ExportOptions = {}): Promise<Response> {
    const path = `${conversation(id)}/events${query({ after: after || undefined, view })}`;
    return this.#http.request(path, { headers: { Accept: "application/x-ndjson" }, signal });
  }

  /** The conversation as a state that keeps up with it, until it is closed. */
  chat(id: string): Chat {
    const http = this.#http;
    const path = conversation(id);
    return new Chat({
      id,
      times: http.times,
      load: (signal) => http.dated(path, { signal }),
      open: (cursor, signal) => opened(http, id, {}, cursor, signal),
    });
  }

  /** `hiddenMs`: what has an end may be read to it where nobody looks, and a hidden tab keeps its connection. */
  async *#read(
    source: Source,
    { signal, onConnection = () => {} }: Reading,
    hiddenMs: number,
  ): AsyncGenerator<StoredEvent, void> {
    const { times } = this.#http;
    const presence = new Presence();
    const stop = new AbortController();
    const unwatch = watch(presence, { ...times, hiddenMs });
    const following = {
      times,
      presence,
      onConnection,
      signal: signal ? AbortSignal.any([signal, stop.signal]) : stop.signal,
    };
    try {
      for await (const batch of follow(source, following)) yield* batch;
      signal?.throwIfAborted();
    } finally {
      stop.abort();
      unwatch();
    }
  }
}

const SSE = "text/event-stream";

async function opened(http: Http, id: string, query_: Query, cursor: number, signal: AbortSignal) {
  const after = cursor || undefined; // 0 is from the beginning, which is no place in the log
  const headers: Record<string, string> = { Accept: SSE };
  if (after) headers["Last-Event-ID"] = String(after);
  const path = `${conversation(id)}/events${query({ ...query_, after })}`;
  return { response: await http.request(path, { headers, signal }), cursor };
}

/** Whether nothing follows in a reading of `run`, or of all. */
function ends(event: StoredEvent, run: string | undefined): boolean {
  if (event.type === "deleted") return true;
  return run !== undefined && event.run === run && isEnd(event);
}

const isEnd = (event: StoredEvent): event is (Done | RunError) & { id: number } =>
  event.type === "done" || event.type === "error";

const conversation = (id: string) => `v1/conversations/${encodeURIComponent(id)}`;
const messages = (id: string) => `${conversation(id)}/messages`;
const runOf = (id: string, run: string) => `${conversation(id)}/runs/${encodeURIComponent(run)}`;
const callOf = (id: string, run: string, call: string) => `${runOf(id, run)}/calls/${encodeURIComponent(call)}`;

function message(content: string, { model, onBusy, replaces }: Sending) {
  return { content, model, on_busy: onBusy, replaces };
}

type Query = Record<string, string | number | undefined>;

function query(given: Query): string {
  const known = Object.entries(given).flatMap(([name, value]) => (value === undefined ? [] : [[name, String(value)]]));
  return known.length ? `?${new URLSearchParams(known)}` : "";
}

/** A key or an id that nobody else has, 128 random bits: `crypto.randomUUID` is for pages from a secure origin only. */
export function newKey(): string {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
