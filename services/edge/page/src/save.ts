// A log saved as a file, byte for byte as the server gives it.

import { download } from "./download.ts";
import { type Bytes, lines, parts } from "./lines.ts";

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
  write(part: Bytes): Promise<void>;
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
    const chain = new Chain();
    for await (const line of lines(saved(await open(), sink))) {
      chain.take(line);
      if (chain.events % 1_000 === 0) onEvents(chain.events);
    }
    await sink.close();
    return chain;
  } catch (error) {
    await sink.abort();
    throw error;
  }
}

/** The body's parts, each once it is in the file. */
async function* saved(response: Response, sink: Sink): AsyncGenerator<Bytes, void> {
  for await (const part of parts(response.body!)) {
    await sink.write(part);
    yield part;
  }
}

interface Picker {
  showSaveFilePicker?(options: { suggestedName: string }): Promise<{ createWritable(): Promise<Sink> }>;
}

async function sinkFor(name: string): Promise<Sink | null> {
  const picker = window as Picker;
  if (!picker.showSaveFilePicker) return inMemory(name);
  try {
    return await (await picker.showSaveFilePicker({ suggestedName: name })).createWritable();
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") return null;
    throw error;
  }
}

/** Where a page may not write files: all of it in memory, then a download. */
function inMemory(name: string): Sink {
  const parts: Bytes[] = [];
  return {
    async write(part) {
      parts.push(part);
    },
    async close() {
      download(name, new Blob(parts, { type: "application/x-ndjson" }));
    },
    async abort() {
      parts.length = 0;
    },
  };
}
