// `application/x-ndjson`: what is stored, a line for each event.

import { EVENT_CHARS_MAX, Malformed } from "./sse.ts";
import type { StoredEvent } from "./conversation.ts";

/** The events of these bytes, each as soon as its line is whole. Throws `Malformed` where the last line is not. */
export async function* lines(bytes: AsyncIterable<Uint8Array>): AsyncGenerator<StoredEvent, void> {
  const decoder = new TextDecoder();
  let line = "";
  for await (const piece of bytes) {
    const [first = "", ...others] = decoder.decode(piece, { stream: true }).split("\n");
    line += first;
    for (const other of others) {
      yield JSON.parse(line) as StoredEvent;
      line = other;
    }
    if (line.length > EVENT_CHARS_MAX) throw new Malformed(`a line of more than ${EVENT_CHARS_MAX} characters`);
  }
  if (line) throw new Malformed("The last line is not whole.");
}
