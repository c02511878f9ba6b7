// `text/event-stream`: bytes, split anywhere, to whole events. What eventsource-parser does in its own way stays here.

import { createParser } from "eventsource-parser";

/** Of one event; on the tape none has more than 1,000,000 bytes. */
export const EVENT_CHARS_MAX = 2_000_000;

/** One event as it was sent. What has not ended with a blank line never becomes one. */
export interface Frame {
  id: string;
  type: string;
  data: string;
}

/** What the server sent is not what a server of ours sends. */
export class Malformed extends Error {
  override readonly name = "Malformed";
}

/** A parser for one response. */
export class Parser {
  /** What the server last asked for with `retry:`, ms. */
  retryMs: number | null = null;
  #frames: Frame[] = [];
  #isTooLarge = false;
  // It would take a BOM away, and the parser another one.
  readonly #decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  readonly #parser = createParser({
    maxBufferSize: EVENT_CHARS_MAX,
    onEvent: ({ id = "", event = "message", data }) => {
      // Only what waits for its end is bounded by the parser: an event that comes in one piece is not.
      if (data.length > EVENT_CHARS_MAX) this.#isTooLarge = true;
      if (!this.#isTooLarge) this.#frames.push({ id, type: event, data });
    },
    onRetry: (ms) => (this.retryMs = ms),
    // A field or a `retry:` it does not know is passed over, as the standard has it.
    onError: ({ type }) => (this.#isTooLarge ||= type === "max-buffer-size-exceeded"),
  });

  /** The events that are whole with these bytes, in order. Throws `Malformed` after those before what is too large. */
  *feed(bytes: Uint8Array): Generator<Frame, void> {
    if (!this.#isTooLarge) this.#parser.feed(this.#decoder.decode(bytes, { stream: true }));
    const frames = this.#frames;
    this.#frames = [];
    yield* frames;
    if (this.#isTooLarge) throw new Malformed(`an event of more than ${EVENT_CHARS_MAX} characters`);
  }
}
