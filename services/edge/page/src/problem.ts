// What went wrong, in words that say what to do next. Pure.

import { Refused } from "@tapeline/client";

/** Why something could not be done; `unreached` is what to say where the server did not answer. */
export function reason(error: unknown, unreached: string): string {
  if (!(error instanceof Refused)) return unreached;
  if (error.code === "busy") return "Another answer is under way. Stop it, or wait for its end.";
  if (error.status === 401) return "This needs a key. Send it again to be asked for one.";
  const again = error.retryAfterMs ? ` Try again in ${Math.ceil(error.retryAfterMs / 1_000)} s.` : "";
  return error.message + again;
}
