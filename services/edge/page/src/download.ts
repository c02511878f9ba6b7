// Saving what the page holds as a file, where it may not write files itself.

import { h } from "./dom.ts";

const SAVED_MS = 60_000; // by then a browser has begun to save what it was given

export function download(name: string, blob: Blob): void {
  const href = URL.createObjectURL(blob);
  h("a", { href, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(href), SAVED_MS);
}
