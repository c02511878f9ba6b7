// Times and spans of time in words.

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

/** A place on a tape: 75300 → "1:15.3"; what is before its beginning, by a clock that is behind, is at it. */
export function offset(ms: number): string {
  const tenths = Math.floor(Math.max(0, ms) / 100);
  const [minutes, rest] = [Math.floor(tenths / 600), tenths % 600];
  const seconds = `${String(Math.floor(rest / 10)).padStart(2, "0")}.${rest % 10}`;
  if (minutes < 60) return `${minutes}:${seconds}`;
  return `${Math.floor(minutes / 60)}:${String(minutes % 60).padStart(2, "0")}:${seconds}`;
}

const DAY = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium" });
const TIME = new Intl.DateTimeFormat("en-GB", {
  hour: "2-digit",
  minute: "2-digit",
  second: "2-digit",
  fractionalSecondDigits: 3,
});

/** `ts` in ms since the epoch, as this device's people write it. */
export const day = (ts: number) => DAY.format(ts);
export const time = (ts: number) => TIME.format(ts);
