// One conversation as it is now: its snapshot, then its events for as long as anybody wants them.

import type { Snapshot, State } from "./conversation.ts";
import type { Connection, Opened } from "./follow.ts";
import { errorOf, follow } from "./follow.ts";
import { Presence, watch } from "./presence.ts";
import { Lost, type Refused } from "./refused.ts";
import { WRITERS } from "./schema.ts";
import { fromSnapshot } from "./snapshot.ts";
import { EMPTY, reduce } from "./state.ts";
import type { Times } from "./times.ts";

/** What a chat asks of the server. */
export interface Asking {
  id: string;
  times: Times;
  load(signal: AbortSignal): Promise<{ answer: Snapshot; serverMs: number }>;
  open(cursor: number, signal: AbortSignal): Promise<Opened>;
}

/** Whose clocks are the server's. */
const OWN: ReadonlySet<unknown> = new Set(["input", "model"]);

/** Follows until `close()`. The states are never changed in place: the same object is the same state. */
export class Chat {
  readonly id: string;
  #state: State = EMPTY;
  #connection: Connection = { state: "connecting", reason: null, retryAt: null };
  #aheadMs = 0; // of this device's clock, beside the server's
  #isTold = true; // the listeners know all there is
  #again: (() => void) | null = null; // after a final refusal
  readonly #presence = new Presence();
  readonly #stop = new AbortController();
  readonly #listeners = new Set<() => void>();
  readonly #unwatch: () => void;

  constructor(asking: Asking) {
    this.id = asking.id;
    this.#unwatch = watch(this.#presence, asking.times);
    void this.#run(asking);
  }

  get state(): State {
    return this.#state;
  }

  /** `lost` with a `retryAt` is still tried, now and then; without one it is for good, until `refresh`. */
  get connection(): Connection {
    return this.#connection;
  }

  /** `listener` is called after changes of state or connection, once for all that came together. */
  subscribe(listener: () => void): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  /** Connects now, whatever the connection says. */
  refresh(): void {
    this.#again?.();
    this.#presence.refresh();
  }

  /** The server's clock, ms since the epoch: what the times of events are to be compared with. */
  serverNow(): number {
    return Date.now() - this.#aheadMs;
  }

  /** Gives the connection back. Nothing is told any more; the state stays as it is. */
  close(): void {
    this.#stop.abort();
    this.#listeners.clear();
    this.#unwatch();
    this.#again?.();
  }

  async #run({ load, open, times }: Asking): Promise<void> {
    const { signal } = this.#stop;
    const source = {
      open: async (cursor: number | null, signal: AbortSignal): Promise<Opened> => {
        if (cursor !== null) return open(cursor, signal);
        const { answer, serverMs } = await load(signal);
        if (!Number.isNaN(serverMs)) this.#aheadMs = Date.now() - serverMs;
        this.#become(fromSnapshot(answer));
        return open(this.#state.last_event_id, signal);
      },
      isLast: () => false,
      isFinal: (refused: Refused) => !refused.passes && refused.status !== 410,
    };
    const onConnection = (connection: Connection) => {
      this.#connection = connection;
      this.#tell();
    };
    while (!signal.aborted) {
      let reason: Error = new Lost("The server says that nothing can follow.", 0); // a 204, which is not for chats
      try {
        const following = { times, presence: this.#presence, signal, onConnection, isPatient: true };
        for await (const batch of follow(source, following)) {
          for (const { type, ts } of batch) {
            // The quickest event has the best idea of it; a tool's worker may have any.
            if (OWN.has(WRITERS[type])) this.#aheadMs = Math.min(this.#aheadMs, Date.now() - ts);
          }
          this.#become(batch.reduce(reduce, this.#state));
        }
        if (signal.aborted) return;
      } catch (error) {
        reason = errorOf(error); // what is not a refusal is a fault here or there: it is said, not thrown at nobody
      }
      onConnection({ state: "lost", reason, retryAt: null });
      await new Promise<void>((resolve) => (this.#again = resolve));
      this.#again = null;
    }
  }

  #become(state: State): void {
    if (state === this.#state) return;
    this.#state = state;
    this.#tell();
  }

  #tell(): void {
    if (!this.#isTold) return;
    this.#isTold = false;
    queueMicrotask(() => {
      this.#isTold = true;
      for (const listener of this.#listeners) listener();
    });
  }
}
