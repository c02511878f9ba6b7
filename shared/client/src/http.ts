// One request: where to, who is asking, how long it may take, and what went wrong.

import { Lost, Refused } from "./refused.ts";
import { TIMES, type Times } from "./times.ts";

/** A bearer token, or what gives one; it is asked anew, with the one that was refused ("": none), when there is a 401. */
export type Token = string | ((refused?: string) => string | undefined | Promise<string | undefined>);

/** Tokens that one request tries after its first: a person mistypes a key, and a function may never have a good one. */
const RENEWALS_MAX = 3;

export interface Settings {
  /** Where the edge is, relative to the page in a browser. */
  url: string | URL;
  token?: Token;
  fetch?: typeof globalThis.fetch;
  times?: Partial<Times>;
}

export interface Asked {
  method?: string;
  headers?: Record<string, string>;
  /** Sent as JSON. */
  body?: unknown;
  signal?: AbortSignal | undefined;
}

export class Http {
  readonly times: Times;
  readonly #base: URL;
  readonly #fetch: typeof globalThis.fetch;
  readonly #token: Token | undefined;
  #renewal: Promise<string | undefined> | null = null;

  constructor({ url, token, fetch, times }: Settings) {
    const base = new URL(url, globalThis.document?.baseURI);
    if (!base.pathname.endsWith("/")) base.pathname += "/";
    this.times = { ...TIMES, ...times };
    this.#base = base;
    this.#fetch = fetch ?? ((...given) => globalThis.fetch(...given)); // a browser's wants its own `this`
    this.#token = token;
  }

  /**
   * The response, its status a good one and its body still to be read, for which `signal` counts as well.
   * Throws `Refused`, `Lost`, or why `signal` was aborted.
   */
  async request(path: string, asked: Asked = {}): Promise<Response> {
    let token = typeof this.#token === "function" ? await this.#token() : this.#token;
    for (let renewals = 0; ; renewals += 1) {
      try {
        return await this.#send(path, asked, token);
      } catch (error) {
        if (!(error instanceof Refused && error.status === 401 && typeof this.#token === "function")) throw error;
        if (renewals === RENEWALS_MAX) throw error;
        const renewed = await this.#renew(this.#token, token ?? "");
        if (renewed === undefined || renewed === token) throw error;
        token = renewed;
      }
    }
  }

  /** What was answered, and when the server says that was: ms since the epoch, NaN where it does not say. */
  async dated<T>(path: string, asked: Asked = {}): Promise<{ answer: T; serverMs: number }> {
    const { silenceMs } = this.times;
    const [signal, limit, done] = limited(silenceMs, asked.signal);
    try {
      const response = await this.request(path, { ...asked, signal });
      limit(); // not before: whoever is asked for a token takes the time they need
      const answer = (response.status === 204 ? undefined : await response.json()) as T;
      return { answer, serverMs: Date.parse(response.headers.get("Date") ?? "") };
    } catch (error) {
      throw asked.signal?.aborted || error instanceof Refused || error instanceof Lost
        ? error
        : new Lost("The answer did not come whole.", silenceMs, error);
    } finally {
      done();
    }
  }

  async json<T>(path: string, asked: Asked = {}): Promise<T> {
    return (await this.dated<T>(path, asked)).answer;
  }

  /** However many requests were refused with the old one, a new one is asked for once. */
  async #renew(ask: Exclude<Token, string>, refused: string): Promise<string | undefined> {
    const known = this.#renewal ? refused : ((await ask()) ?? "");
    if (known !== refused) return known; // it came meanwhile
    this.#renewal ??= (async () => ask(refused))().finally(() => (this.#renewal = null));
    return this.#renewal;
  }

  async #send(path: string, asked: Asked, token: string | undefined): Promise<Response> {
    const { method = "GET", headers, body } = asked;
    const startedAt = Date.now();
    const [signal, limit, done] = limited(this.times.connectMs, asked.signal);
    limit();
    try {
      const response = await this.#fetch(new URL(path, this.#base), {
        method,
        headers: {
          Accept: "application/json",
          ...headers,
          ...(body === undefined ? {} : { "Content-Type": "application/json" }),
          ...(token ? { Authorization: `Bearer ${token}` } : {}),
        },
        body: body === undefined ? null : JSON.stringify(body),
        cache: "no-store",
        signal,
      });
      if (!response.ok) throw await Refused.from(response);
      return response;
    } catch (error) {
      if (asked.signal?.aborted) throw asked.signal.reason;
      if (error instanceof Refused) throw error;
      throw new Lost("The server could not be reached.", Date.now() - startedAt, error);
    } finally {
      done();
    }
  }
}

/** A signal that is aborted as `signal` is, and `ms` after `limit` is called, unless `done` is before. */
function limited(ms: number, signal?: AbortSignal): [AbortSignal, limit: () => void, done: () => void] {
  const own = new AbortController();
  let timer: ReturnType<typeof setTimeout> | undefined;
  return [
    signal ? AbortSignal.any([signal, own.signal]) : own.signal,
    () => (timer = setTimeout(() => own.abort(new Lost(`Nothing came for ${ms / 1_000} s.`, ms)), ms)),
    () => clearTimeout(timer),
  ];
}
