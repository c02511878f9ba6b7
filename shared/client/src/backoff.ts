/** The wait after `failures` tries in a row: exponential, with jitter so that readers do not return in step. */
export function backoffMs(failures: number, retryMs: number, maxMs: number, random = Math.random): number {
  return Math.min(maxMs, retryMs * 2 ** Math.max(0, failures - 1)) * (0.5 + random() / 2);
}
