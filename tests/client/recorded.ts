// A run as an edge sent it, byte for byte but for `retry:`, and the events in it; and chance that can be had again.

import { readFileSync } from "node:fs";
import type { StoredEvent } from "../../shared/client/src/index.ts";

/** It asks for no patience: what is cut a thousand times cannot wait a second each. */
export const RECORDED: Buffer = Buffer.from(
  readFileSync(new URL("recorded.sse", import.meta.url), "utf8").replace("retry: 1000\n", "retry: 0001\n"),
);

/** Read without our parser: the edge's frames are plain. */
export const EVENTS: StoredEvent[] = [...RECORDED.toString().matchAll(/^id: (\d+)\nevent: \w+\ndata: (.*)$/gm)].map(
  ([, id, data]) => ({ ...JSON.parse(data ?? ""), id: Number(id) }),
);
export const RUN = EVENTS[0]?.run ?? "";

/** Numbers from 0 to 1 by the seed in SEED, or a new one, which is printed. */
export function randomFrom(seed = Number(process.env["SEED"] ?? Date.now() % 1e9)): () => number {
  console.log(`SEED=${seed}`);
  let state = seed;
  return () => {
    // mulberry32
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}
