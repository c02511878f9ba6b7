// The log over HTTP: the server's own lines, read to be looked at or saved as they are.

import type { Logged } from "./timeline.ts";

export const EVENTS_MAX = 200_000; // on the page; an export has all
export const CHARS_MAX = 200_000_000; // of their JSON

/** The lines of a body. What has no end of line at its end was cut off, and is not given. */
export async function* lines(body: ReadableStream<Uint8Array>): AsyncGenerator<string> {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      const whole = (rest + decoder.decode(part.value, { stream: true })).split("\n");
      rest = whole.pop()!;
      yield* whole;
    }
  } finally {
    await reader.cancel(); // nothing, where it was read to its end
  }
}

export function parsed(line: string): Logged {
  return JSON.parse(line) as Logged;
}

/** Whether lines that were read one after another are a whole log: each event names the one before it. */
export class Chain {
  events = 0;
  last = 0;
  breaks = 0;

  take(line: string): void {
    const [, id, prev] = /^\{"id":(\d+),"prev":(\d+|null)/.exec(line) ?? [];
    if (Number(prev ?? NaN) !== this.last) this.breaks += 1; // `null` is no number: not proven
    this.last = Number(id ?? NaN);
    this.events += 1;
  }
}

/** Where a file's bytes go. */
interface Sink {
  write(part: Uint8Array<ArrayBuffer>): Promise<void>;
  close(): Promise<void>;
  abort(): Promise<void>;
}

/**
 * Saves the log as a file, byte for byte. Null: the person wanted no file after all. Rejects, and leaves no file, where
 * the log is refused or breaks off. `onEvents` hears how many there are so far.
 */
export async function save(
  name: string,
  open: () => Promise<Response>,
  onEvents: (events: number) => void,
): Promise<Chain | null> {
  const sink = await sinkFor(name); // first, while the browser remembers the click
  if (!sink) return null;
  try {
    const response = await open();
    const chain = new Chain();
    const [bytes, copy] = response.body!.tee();
    const counted = (async () => {
      for await (const line of lines(copy)) {
        chain.take(line);
        if (chain.events % 1_000 === 0) onEvents(chain.events);
      }
    })();
    const reader = bytes.getReader();
    for (let part = await reader.read(); !part.done; part = await reader.read()) await sink.write(part.value);
    await counted;
    await sink.close();
    return chain;
  } catch (error) {
    await sink.abort();
    throw error;
  }
}

interface Picker {
  showSaveFilePicker?(options: { suggestedName: string }): Promise<{ createWritable(): Promise<Sink> }>;
}

async function sinkFor(name: string): Promise<Sink | null> {
  const picker = window as Picker;
  if (!picker.showSaveFilePicker) return download(name);
  try {
    return await (await picker.showSaveFilePicker({ suggestedName: name })).createWritable();
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") return null;
    throw error;
  }
}

/** Where a page may not write files: all of it in memory, then a download. */
function download(name: string): Sink {
  const parts: Uint8Array<ArrayBuffer>[] = [];
  return {
    async write(part) {
      parts.push(part);
    },
    async close() {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob(parts, { type: "application/x-ndjson" }));
      link.download = name;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // by then the browser has begun to save it
    },
    async abort() {
      parts.length = 0;
    },
  };
}

/** `json` on several lines. Its words stay as they are written: a number too large for us is not changed. */
export function indented(json: string): string {
  let depth = 0;
  const broken = () => `\n${"  ".repeat(depth)}`;
  return json.replace(/"(?:[^"\\]|\\.)*"|[{[]\s*[}\]]|[^\S ]|[ ]|[{}[\],:]/g, (token) => {
    if (token.length > 1) return token;
    if (token === "{" || token === "[") return (depth += 1), token + broken();
    if (token === "}" || token === "]") return (depth -= 1), broken() + token;
    if (token === ",") return token + broken();
    if (token === ":") return ": ";
    return "";
  });
}
