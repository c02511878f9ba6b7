// One conversation over HTTP: its snapshot, then its events for as long as the page wants them.
// Owns the SSE parser, the cursor, and when to reconnect. Knows nothing of the DOM or of what an event means.

export const EVENT_CHARS_MAX = 2_000_000; // an event on the tape has at most 1,000,000 bytes
export const SILENCE_MS = 40_000; // without a byte: the server's heartbeats come every 15 s, so it is dead
export const CONNECT_MS = 15_000; // without a response: the server answers at once
export const BACKOFF_MAX_MS = 30_000;
export const STALE_MS = 20_000; // silence that is suspicious once somebody looks at the page again
const RETRY_MS = 1_000; // until the server says `retry:`

/** The server said no. `problem` is its application/problem+json; `retryAfterMs` is what it asked for, or null. */
export class Refused extends Error {
  constructor(status, problem, retryAfterMs) {
    super(problem.detail || problem.title || `The server answered ${status}.`);
    this.name = "Refused";
    this.status = status;
    this.code = problem.code ?? "";
    this.problem = problem;
    this.retryAfterMs = retryAfterMs;
  }

  static async from(response) {
    let problem = null;
    try {
      problem = await response.json();
    } catch {
      // A proxy's own error page: the status has to do.
    }
    const seconds = Number(response.headers.get("Retry-After") || NaN);
    return new Refused(response.status, problem ?? {}, Number.isFinite(seconds) ? seconds * 1_000 : null);
  }
}

/**
 * A parser of `text/event-stream`: returns `feed(bytes)`, which may be split anywhere.
 * Calls `onEvent({id, type, data})` and `onRetry(ms)`. Throws RangeError when an event is larger than
 * EVENT_CHARS_MAX. What has not ended with a blank line is never delivered.
 */
export function sseParser({ onEvent, onRetry = () => {} }) {
  const decoder = new TextDecoder();
  const lineEnd = /[\r\n]/g;
  let line = ""; // of the line under way
  let afterCr = false; // a LF that comes now belongs to the CR before it
  let id = "";
  let type = "";
  let data = null;

  function take(line) {
    if (line === "") {
      if (data !== null) onEvent({ id, type: type || "message", data });
      type = "";
      data = null;
      return;
    }
    const colon = line.indexOf(":");
    if (colon === 0) return; // a comment: the heartbeat
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + (line[colon + 1] === " " ? 2 : 1));
    if (field === "data") {
      data = data === null ? value : `${data}\n${value}`;
      bound(data);
    } else if (field === "event") {
      type = value;
    } else if (field === "id") {
      if (!value.includes("\0")) id = value;
    } else if (field === "retry") {
      if (/^\d{1,9}$/.test(value)) onRetry(Number(value));
    }
  }

  return function feed(bytes) {
    const text = decoder.decode(bytes, { stream: true });
    if (text === "") return;
    let start = afterCr && text[0] === "\n" ? 1 : 0;
    afterCr = false;
    for (;;) {
      lineEnd.lastIndex = start;
      const end = lineEnd.exec(text)?.index ?? -1;
      if (end < 0) break;
      const whole = line + text.slice(start, end);
      line = "";
      start = end + 1;
      if (text[end] === "\r") {
        if (start === text.length) afterCr = true;
        else if (text[start] === "\n") start += 1;
      }
      take(whole);
    }
    line += text.slice(start);
    bound(line);
  };
}

function bound(text) {
  if (text.length > EVENT_CHARS_MAX) throw new RangeError("an event larger than any on the tape");
}

/** The wait after `failures` tries in a row: exponential, with jitter so that readers do not return in step. */
export function backoffMs(failures, retryMs = RETRY_MS, random = Math.random) {
  return Math.min(BACKOFF_MAX_MS, retryMs * 2 ** (failures - 1)) * (0.5 + random() / 2);
}

/**
 * Follows the conversation at `url` until `stop()`: loads its snapshot, reads its events after it, and
 * reconnects after whatever happens, so that each event is delivered once and in order.
 *
 *   headers()        what every request carries beside its own (authorization)
 *   authorize(sent)  asked on 401 with the headers that were refused; true: try again
 *   onSnapshot(s, serverMs)  before the first event, and again where the cursor was too old (410)
 *   onEvent(event)   the event's JSON with its sequence as `id`
 *   onState(state)   "connecting", "live", "waiting" or "paused"
 *   onEnd(refused)   it is over: the server will not let us read this conversation
 */
export function follow({ url, headers, authorize, onSnapshot, onEvent, onState, onEnd }) {
  let cursor = null; // sequence of the last event delivered; null: load the snapshot first
  let failures = 0;
  let retryMs = RETRY_MS;
  let stopped = false;
  let paused = false;
  let hurry = false; // do not wait before the next try
  let attempt = null; // AbortController of the connection under way
  let wake = null; // ends the wait between two connections
  let heardAt = 0; // when the last byte came

  async function get(path, own) {
    const sent = headers();
    const response = await fetch(url + path, {
      headers: { ...own, ...sent },
      signal: attempt.signal,
      cache: "no-store",
    });
    if (response.status === 401 && (await authorize(sent))) throw new Retry();
    if (response.status !== 200) throw await Refused.from(response);
    heardAt = Date.now();
    return response;
  }

  async function load() {
    const response = await get("", { Accept: "application/json" });
    const snapshot = await response.json();
    if (stopped) return;
    cursor = Number(snapshot.last_event_id);
    onSnapshot(snapshot, Date.parse(response.headers.get("Date") ?? ""));
  }

  async function read() {
    const response = await get(`/events?after=${cursor}`, {
      Accept: "text/event-stream",
      "Last-Event-ID": String(cursor),
    });
    if (!(response.headers.get("Content-Type") ?? "").startsWith("text/event-stream")) {
      throw new TypeError("not an event stream: some proxy's page, perhaps");
    }
    failures = 0;
    onState("live");
    const feed = sseParser({
      onRetry: (ms) => (retryMs = Math.min(Math.max(ms, 100), BACKOFF_MAX_MS)),
      onEvent: ({ id, data }) => {
        const sequence = Number(id);
        if (stopped || !(sequence > cursor)) return;
        const event = { ...JSON.parse(data), id: sequence };
        cursor = sequence;
        onEvent(event);
      },
    });
    const reader = response.body.getReader();
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      heardAt = Date.now();
      feed(value);
    }
  }

  async function connect() {
    const startedAt = Date.now();
    heardAt = 0;
    attempt = new AbortController();
    const { signal } = attempt;
    const watch = setInterval(() => {
      const dead = heardAt ? Date.now() - heardAt > SILENCE_MS : Date.now() - startedAt > CONNECT_MS;
      if (dead) attempt.abort();
    }, 1_000);
    try {
      if (cursor === null) await load();
      if (!signal.aborted) await read();
    } finally {
      clearInterval(watch);
      attempt.abort(); // whatever ended it, leave no half-read response behind
      attempt = null;
    }
  }

  async function run() {
    while (!stopped) {
      let wait = null;
      onState("connecting");
      try {
        await connect();
      } catch (error) {
        if (stopped) return;
        if (error instanceof Retry) hurry = true;
        else if (error instanceof Refused) {
          wait = error.retryAfterMs;
          if (error.status === 410) cursor = null;
          else if (error.status < 500 && error.status >= 400 && ![408, 425, 429].includes(error.status)) {
            stopped = true;
            onEnd(error);
            return;
          }
        }
      }
      if (stopped) return;
      failures += 1;
      if (!hurry) {
        onState(paused ? "paused" : "waiting");
        await sleep(wait ?? backoffMs(failures, retryMs));
      }
      hurry = false;
      while (paused && !stopped) await sleep(BACKOFF_MAX_MS);
    }
  }

  function sleep(ms) {
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, ms);
      wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }

  /** Connect now: at once if waiting, anew if the connection has been silent for `silenceMs`. */
  function refresh(silenceMs) {
    paused = false;
    failures = 0;
    if (!attempt) wake?.();
    else if (Date.now() - heardAt >= silenceMs) {
      hurry = true;
      attempt.abort();
    }
  }

  /** Leave the server alone until `refresh`. */
  function pause() {
    paused = true;
    attempt?.abort();
  }

  function stop() {
    stopped = true;
    attempt?.abort();
    wake?.();
  }

  run();
  return { refresh, pause, stop };
}

class Retry extends Error {}
