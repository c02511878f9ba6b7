import { RETRY_AFTER_MAX_MS } from "./times.ts";

/**
 * The wait after `failures` tries in a row: `retryMs`, doubled with each up to `maxMs`, and never less than what the
 * server asked for with `retry:` or `Retry-After`. Half as long again is left to chance, so that not all come at once.
 */
export function backoffMs(failures: number, retryMs: number, maxMs: number, afterMs = 0, random = Math.random): number {
  const askedMs = Math.min(retryMs, RETRY_AFTER_MAX_MS);
  const ms = Math.max(askedMs, Math.min(maxMs, askedMs * 2 ** Math.max(0, failures - 1)));
  return Math.max(ms, afterMs) + (random() * ms) / 2;
}
