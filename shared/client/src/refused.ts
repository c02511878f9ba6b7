// The two ways in which asking fails.

import { RETRY_AFTER_MAX_MS } from "./times.ts";

/** `application/problem+json` as the server sends it. What a proxy answers instead may have none of it. */
export interface Problem {
  type?: string;
  title?: string;
  status?: number;
  code?: string;
  detail?: string;
  [more: string]: unknown;
}

const PASSING = [408, 425, 429];

/** The server said no. */
export class Refused extends Error {
  override readonly name = "Refused";
  readonly status: number;
  /** Stable, for programs: `busy`, `not_found`… Empty where it was not the server that answered. */
  readonly code: string;
  readonly problem: Problem;
  /** When to come again, if the server said so. */
  readonly retryAfterMs: number | null;

  constructor(status: number, problem: Problem = {}, retryAfterMs: number | null = null) {
    super(problem.detail || problem.title || `The server answered ${status}.`);
    this.status = status;
    this.code = problem.code ?? "";
    this.problem = problem;
    this.retryAfterMs = retryAfterMs;
  }

  /** The same may be answered otherwise later. */
  get passes(): boolean {
    return this.status >= 500 || PASSING.includes(this.status);
  }

  static async from(response: Response): Promise<Refused> {
    const asked = retryAfterMs(response.headers.get("Retry-After"), Date.now());
    return new Refused(response.status, problemIn(await response.text()), asked);
  }
}

/** There was no answer of the server's: no connection, or none that held. Its `cause` says what there was instead. */
export class Lost extends Error {
  override readonly name = "Lost";
  /** How long it had been tried. */
  readonly afterMs: number;

  constructor(message: string, afterMs: number, cause?: unknown) {
    super(message, { cause });
    this.afterMs = afterMs;
  }
}

/** A problem as it stands in a body; a proxy's own page has none, and its status has to do. */
function problemIn(body: string): Problem {
  try {
    const problem: unknown = JSON.parse(body);
    return typeof problem === "object" && problem !== null ? (problem as Problem) : {};
  } catch {
    return {};
  }
}

/** `Retry-After` in either of its forms: seconds, or a date. */
export function retryAfterMs(header: string | null, nowMs: number): number | null {
  const value = header?.trim() ?? "";
  const ms = /^\d+$/.test(value) ? Number(value) * 1_000 : Date.parse(value) - nowMs;
  return Number.isNaN(ms) ? null : Math.min(Math.max(0, ms), RETRY_AFTER_MAX_MS);
}
