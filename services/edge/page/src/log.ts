// A conversation's log as the server has it, line by line.

import { Refused, type Tapeline } from "@tapeline/client";

import { Film } from "./film.ts";
import { lines, parts } from "./lines.ts";
import type { Logged } from "./timeline.ts";

export const EVENTS_MAX = 200_000; // on the page; an export has all
export const CHARS_MAX = 200_000_000; // of their JSON

const TRIES_MAX = 4; // in a row, none of which brought an event
const RETRY_MS = 500; // to the second, and as much longer to each after it

const LOAD_EVENTS = 2_000; // between two words on how far it is

/** The log as far as it is on the page. */
export class Log {
  readonly film = new Film();
  readonly events: Logged[] = [];
  readonly json: string[] = [];
  view: "compact" | undefined;
  /** The page does not hold all of it. */
  cut = false;
  readonly tapeline: Tapeline;
  readonly id: string;
  #chars = 0;

  constructor(tapeline: Tapeline, id: string) {
    this.tapeline = tapeline;
    this.id = id;
  }

  get last(): number {
    return this.events.at(-1)?.id ?? 0;
  }

  /** Reads on to the end, after what is here; a connection that breaks off is made again, a few times. */
  async load(signal: AbortSignal, onEvents: (events: number) => void): Promise<void> {
    for (let tries = 1; ; tries += 1) {
      const { last } = this;
      try {
        return await this.#read(signal, onEvents);
      } catch (error) {
        if (this.last > last) tries = 1;
        const isFinal = error instanceof Refused && !error.passes;
        if (signal.aborted || isFinal || tries === TRIES_MAX) throw error;
        await new Promise((resolve) => setTimeout(resolve, RETRY_MS * tries));
      }
    }
  }

  async #read(signal: AbortSignal, onEvents: (events: number) => void): Promise<void> {
    for await (const line of lines(parts((await this.open(signal)).body!))) {
      this.cut = this.events.length >= EVENTS_MAX || this.#chars + line.length > CHARS_MAX;
      if (this.cut) return;
      const event = JSON.parse(line) as Logged;
      this.#chars += line.length;
      this.events.push(event);
      this.json.push(line);
      this.film.append(event);
      if (this.events.length % LOAD_EVENTS === 0) onEvents(this.events.length);
    }
    signal.throwIfAborted();
  }

  /** What is after `after`; facts only where deltas have expired. */
  async open(signal: AbortSignal, after = this.last): Promise<Response> {
    try {
      return await this.tapeline.export(this.id, { after, view: this.view, signal });
    } catch (error) {
      if (!(error instanceof Refused && error.code === "cursor_expired") || this.view) throw error;
      this.view = "compact";
      return this.tapeline.export(this.id, { after, view: this.view, signal });
    }
  }
}
