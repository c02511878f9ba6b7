// Spans of time in words.

/** 180 → "180 ms", 2345 → "2.3 s", 75000 → "1 min 15 s". */
export function duration(ms: number): string {
  return ms < 1_000 ? `${Math.round(ms)} ms` : seconds(ms);
}

/** As `duration`, never finer than tenths of a second: for what counts on while it is looked at. */
export function seconds(ms: number): string {
  if (ms < 59_950) return `${(ms / 1_000).toFixed(1)} s`;
  const whole = Math.round(ms / 1_000);
  return `${Math.floor(whole / 60)} min ${String(whole % 60).padStart(2, "0")} s`;
}
