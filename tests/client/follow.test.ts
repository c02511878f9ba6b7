// Following, against a real server that does what no server should: each event comes once and in order all the same.

import assert from "node:assert/strict";
import type { RequestListener } from "node:http";
import { test } from "node:test";
import { type Connection, Lost, Refused, type StoredEvent, Tapeline, type Times, fold } from "../../shared/client/src/index.ts";
import { EVENTS, RECORDED, RUN } from "./recorded.ts";
import { HELLO, STARTS, STREAM, type Server, cursorOf, cut, recordedFor, refuse, serve } from "./server.ts";

/** As ever, but in milliseconds: what is a second there is one here. */
const QUICK: Partial<Times> = { retryMs: 1, backoffMaxMs: 4, connectMs: 1_000, silenceMs: 1_000, steadyMs: 1_000, giveUpMs: 10_000 };
const PATIENT: Partial<Times> = { ...QUICK, connectMs: 15_000, giveUpMs: 15_000 };
const IDS = EVENTS.map(({ id }) => id);

async function idsFrom(events: AsyncIterable<StoredEvent>): Promise<number[]> {
  const read: StoredEvent[] = [];
  for await (const event of events) read.push(event);
  assert.deepEqual(
    read,
    EVENTS.filter(({ id }) => id >= (read[0]?.id ?? Infinity)),
  );
  return read.map(({ id }) => id);
}

const read = ({ url }: Server, times: Partial<Times> = QUICK, onConnection?: (connection: Connection) => void) =>
  idsFrom(new Tapeline({ url, times }).events("c", { run: RUN, onConnection }));

/** The first request is answered by this, those after it as by an edge. */
const first =
  (answer: RequestListener): RequestListener =>
  (() => {
    let count = 0;
    return (request: Parameters<RequestListener>[0], response: Parameters<RequestListener>[1]) =>
      count++ ? void response.writeHead(200, STREAM).end(recordedFor(request)) : answer(request, response);
  })();

test("cut at every single byte of the stream, each event comes once and no half one", async (context) => {
  // For each event a reader that comes back after the one before, and is cut at each byte until it has that event.
  const cuts = new Map<string, number[]>();
  const server = await serve(context, (request, response) => {
    const size = cuts.get(request.url?.split("?")[0] ?? "")?.shift();
    const bytes = recordedFor(request);
    if (size === undefined) response.writeHead(200, STREAM).end(bytes);
    else cut(response, bytes.subarray(0, size));
  });
  const client = new Tapeline({ url: server.url, times: { ...PATIENT, backoffMaxMs: 1, giveUpMs: Infinity } });
  const reader = async (_: unknown, at: number) => {
    const from = at ? HELLO.length : 0;
    const end = (STARTS[at + 1] ?? RECORDED.length) - (STARTS[at] ?? 0) + HELLO.length;
    cuts.set(
      `/v1/conversations/c${at}/events`,
      Array.from({ length: end - from }, (_, n) => from + n),
    );
    assert.deepEqual(await idsFrom(client.events(`c${at}`, { run: RUN, after: IDS[at - 1] })), IDS.slice(at));
  };
  await Promise.all(EVENTS.map(reader));
  assert.ok([...cuts.values()].every((left) => !left.length));
  assert.equal(server.requests.length, RECORDED.length + EVENTS.length);
});

test("every connection cut after n bytes, for many n, each event comes once", async (context) => {
  const largest = Math.max(...[...RECORDED.toString().split("\n\n")].map((frame) => Buffer.byteLength(frame))) + 2;
  for (let size = largest + 40; size < RECORDED.length; size = Math.ceil(size * 1.13)) {
    const server = await serve(context, (request, response) => {
      const bytes = recordedFor(request);
      if (bytes.length <= size) response.writeHead(200, STREAM).end(bytes);
      else cut(response, bytes.subarray(0, size));
    });
    assert.deepEqual(await read(server, PATIENT), IDS, `${size} bytes at a time`);
    assert.ok(server.requests.length >= RECORDED.length / size);
  }
});

const ONCE: Record<string, RequestListener> = {
  "never answers": () => {},
  "hangs up": (request) => request.socket.destroy(),
  "falls silent": (_, response) => response.writeHead(200, STREAM).write(RECORDED.subarray(0, 600)),
  "a byte that is no UTF-8": (_, response) => response.writeHead(200, STREAM).end(Buffer.from([0xff, 0xc3, 0x28])),
  "a proxy's page": (_, response) => response.writeHead(200, { "Content-Type": "text/html" }).end("<p>Sign in"),
  "a page that says it is a stream": (_, response) => response.writeHead(200, STREAM).end("<p>Sign in\n\n"),
  "half a JSON": (_, response) => response.writeHead(200, STREAM).end(`id: ${IDS[0]}\nevent: token\ndata: {"type":\n\n`),
  "JSON that is no event": (_, response) => response.writeHead(200, STREAM).end(`id: ${IDS[0]}\ndata: null\n\n`),
  "an event without an id": (_, response) => response.writeHead(200, STREAM).end('data: {"type":"token"}\n\n'),
  "an event with an odd id": (_, response) => response.writeHead(200, STREAM).end('id: 1e3\ndata: {"type":"x"}\n\n'),
  "an endless event": (_, response) => response.writeHead(200, STREAM).end(`id: 1\ndata: ${"x".repeat(2_100_000)}`),
  "500": (_, response) => refuse(response, 500, { code: "internal" }),
  "502 with a page": (_, response) => response.writeHead(502, { "Content-Type": "text/html" }).end("<h1>Bad Gateway"),
  "503 in a second": (_, response) => refuse(response, 503, {}, { "Retry-After": "1" }),
  "429 in a second": (_, response) => refuse(response, 429, { code: "too_many_streams" }, { "Retry-After": "1" }),
};

test("whatever the server does once, each event comes once", async (context) => {
  const cases = Object.entries(ONCE).map(([name, answer]) =>
    context.test(name, async (context) => {
      const server = await serve(context, first(answer));
      const startedAt = Date.now();
      const states: Connection[] = [];
      assert.deepEqual(await read(server, QUICK, (connection) => states.push(connection)), IDS);
      assert.equal(server.requests.length, 2);
      const waiting = states.find(({ state }) => state === "waiting");
      assert.ok(waiting?.reason || name.includes("UTF-8") || name.includes("page that says"), "it says why");
      if (name.includes("second")) assert.ok(Date.now() - startedAt >= 950, "not before it was asked to");
      assert.equal(states[0]?.state, "connecting");
      assert.equal(states.at(-1)?.state, "live");
    }),
  );
  await Promise.all(cases);
});

test("what came before something malformed is kept, and comes once", async (context) => {
  const second = RECORDED.indexOf(`id: ${IDS[1]}\n`);
  const bad = Buffer.concat([RECORDED.subarray(0, second), Buffer.from("id: 9999999\ndata: {\n\n")]);
  const server = await serve(context, first((_, response) => response.writeHead(200, STREAM).end(bad)));
  assert.deepEqual(await read(server), IDS);
  assert.equal(cursorOf(server.requests[1]!), IDS[0]);
});

test("events that come again are passed over, and what is no event of anybody's comes as such", async (context) => {
  const twice = Buffer.concat([RECORDED, RECORDED]);
  const odd = 'id: 9999998\nevent: undecodable\ndata: {"type":\n\n';
  const server = await serve(context, (_, response) => response.writeHead(200, STREAM).end(Buffer.concat([twice, Buffer.from(odd)])));
  const ids: number[] = [];
  for await (const { id, type } of new Tapeline({ url: server.url, times: QUICK }).events("c")) {
    ids.push(id);
    if ((type as string) === "undecodable") break;
  }
  assert.deepEqual(ids, [...IDS, 9999998]);
});

test("what a frame is said to be is the edge's word: what is no event by it is none, whatever is in it", async (context) => {
  const forged = { type: "answer", run: RUN, step: 1, attempt: 1, finish: "stop", text: "forged" };
  const deep = `{"type":"done","run":"${RUN}","ts":1,"step":1,"attempt":1,"reason":"stop","x":${"[".repeat(20_000)}${"]".repeat(20_000)}}`;
  const frames = [
    ["undecodable", JSON.stringify({ ...forged, ts: 1.5 })],
    ["undecodable", deep],
    ["undecodable", JSON.stringify({ ...forged, type: "undecodable", run: 5, ts: "x" })],
    ["misplaced", JSON.stringify({ type: "misplaced", kind: "fact.tool", event: { ...forged, ts: 1 } })],
    ["unknown", JSON.stringify({ ...forged, ts: 1 })],
    ["tool_progress", JSON.stringify({ ...forged, ts: 1 })],
  ];
  const text = frames.map(([type, data], at) => `id: ${9_000_000 + at}\nevent: ${type}\ndata: ${data}\n\n`).join("");
  const begun = RECORDED.subarray(0, STARTS[EVENTS.findIndex(({ type }) => type === "answer")]);
  const server = await serve(context, (_, response) => {
    response.writeHead(200, STREAM).end(Buffer.concat([begun, Buffer.from(`${text}id: 9999999\nevent: later\ndata: {"type":"later"}\n\n`)]));
  });
  const received: StoredEvent[] = [];
  for await (const event of new Tapeline({ url: server.url, times: QUICK }).events("c")) {
    received.push(event);
    if (event.id === 9_999_999) break;
  }
  const odd = received.filter(({ id }) => id >= 9_000_000);
  assert.deepEqual(odd.map(({ type }) => type as string), [...frames.map(([type]) => type), "later"]);
  assert.ok(odd.slice(0, -1).every(({ run, ts }) => run === "" && ts === 0), "they are of no run");
  assert.deepEqual(fold(received).runs, fold(received.slice(0, -odd.length)).runs);
});

test("a slow stream, byte by byte, is a live one", async (context) => {
  const server = await serve(context, async (request, response) => {
    response.writeHead(200, STREAM);
    const bytes = recordedFor(request);
    for (let at = 0; at < bytes.length; at += 7) {
      response.write(bytes.subarray(at, at + 7));
      await new Promise(setImmediate);
    }
    response.end();
  });
  assert.deepEqual(await read(server), IDS);
  assert.equal(server.requests.length, 1);
});

test("heartbeats keep a connection that has nothing to say", async (context) => {
  const server = await serve(context, (request, response) => {
    response.writeHead(200, STREAM).write(": tapeline\n");
    const heart = setInterval(() => response.write(": hb\n"), 50);
    setTimeout(() => response.end(recordedFor(request)), 3_000);
    response.on("close", () => clearInterval(heart));
  });
  assert.deepEqual(await read(server, { ...QUICK, silenceMs: 1_500 }), IDS);
  assert.equal(server.requests.length, 1);
});

test("a reader that takes its time loses nothing, and is not taken for silence", async (context) => {
  const server = await serve(context, (request, response) => void response.writeHead(200, STREAM).end(recordedFor(request)));
  const ids: number[] = [];
  for await (const { id } of new Tapeline({ url: server.url, times: { ...QUICK, silenceMs: 1_000 } }).events("c", { run: RUN })) {
    ids.push(id);
    if (ids.length === 1) await new Promise((resolve) => setTimeout(resolve, 1_500));
  }
  assert.deepEqual(ids, IDS);
  assert.equal(server.requests.length, 1);
});

test("`retry:` is the least time between connections, however long", async (context) => {
  const asking = (ms: number) => first((_, response) => response.writeHead(200, STREAM).end(`retry: ${ms}\n\n`));
  const server = await serve(context, asking(400));
  const startedAt = Date.now();
  assert.deepEqual(await read(server, QUICK), IDS);
  assert.ok(Date.now() - startedAt >= 395, "but for what a timer may be early");

  const slow = await serve(context, asking(60_000));
  const stop = new AbortController();
  let askedMs = 0;
  const onConnection = ({ state, retryAt }: Connection) => {
    if (state !== "waiting") return;
    askedMs = retryAt! - Date.now();
    stop.abort();
  };
  const reading = idsFrom(new Tapeline({ url: slow.url, times: { ...QUICK, giveUpMs: Infinity } }).events("c", { signal: stop.signal, onConnection }));
  await assert.rejects(reading, { name: "AbortError" });
  assert.ok(askedMs > 55_000 && askedMs <= 90_000, `${askedMs}`);
});

test("204 is the end", async (context) => {
  const server = await serve(context, (_, response) => void response.writeHead(204).end());
  assert.deepEqual(await read(server), []);
  assert.equal(server.requests.length, 1);
});

test("a refusal that would be the same again ends it", async (context) => {
  for (const [status, code] of [[400, "bad_cursor"], [403, "cross_site"], [404, "not_found"], [410, "cursor_expired"]] as const) {
    const server = await serve(context, (_, response) => refuse(response, status, { code, detail: "No.", earliest: 7 }));
    await assert.rejects(read(server), (error: unknown) => {
      assert.ok(error instanceof Refused);
      assert.deepEqual([error.status, error.code, error.message, error.problem["earliest"]], [status, code, "No.", 7]);
      return true;
    });
    assert.equal(server.requests.length, 1);
  }
});

test("a token that was refused is asked for anew, once, however many were refused", async (context) => {
  const authorize = (good: string): RequestListener => (request, response) => {
    if (request.headers.authorization === `Bearer ${good}`) response.writeHead(200, STREAM).end(recordedFor(request));
    else refuse(response, 401, { code: "unauthorized" });
  };
  const server = await serve(context, authorize("new"));
  let known = "old";
  const asked: (string | undefined)[] = [];
  const token = async (refused?: string) => {
    if (refused) {
      asked.push(refused);
      known = "new";
    }
    return known;
  };
  const client = new Tapeline({ url: server.url, token, times: QUICK });
  const readers = Array.from({ length: 3 }, () => idsFrom(client.events("c", { run: RUN })));
  for (const ids of await Promise.all(readers)) assert.deepEqual(ids, IDS);
  assert.deepEqual(asked, ["old"]);
  assert.equal(server.requests.length, 6);

  const no = (error: unknown) => error instanceof Refused && error.status === 401;
  for (const useless of ["old", () => "old", () => undefined, async (refused?: string) => (refused ? "other" : "old")]) {
    const times = server.requests.length;
    await assert.rejects(idsFrom(new Tapeline({ url: server.url, token: useless, times: QUICK }).events("c")), no);
    assert.ok(server.requests.length - times <= 4);
  }
});

test("it gives up after a time of failures, and says why and after how long", async (context) => {
  const times = { ...QUICK, giveUpMs: 1_000 };
  const server = await serve(context, (request) => request.socket.destroy());
  const states: Connection[] = [];
  await assert.rejects(read(server, times, (connection) => states.push(connection)), (error: unknown) => {
    assert.ok(error instanceof Lost && error.afterMs >= 1_000 && error.afterMs < 10_000, `${error}`);
    assert.ok(error.cause instanceof Lost);
    return true;
  });
  assert.ok(server.requests.length > 1 && states.some(({ state }) => state === "waiting"));
});

test("a network that swallows every request is given up: trying for long is no good connection", async (context) => {
  const server = await serve(context, () => {});
  const times = { ...QUICK, connectMs: 100, steadyMs: 50, giveUpMs: 1_000 };
  await assert.rejects(read(server, times), (error: unknown) => error instanceof Lost && error.afterMs >= 1_000);
});

test("a server that only ever greets is given up as well", async (context) => {
  const server = await serve(context, (_, response) => void response.writeHead(200, STREAM).end("retry: 2\n: tapeline\n"));
  await assert.rejects(read(server, { ...QUICK, giveUpMs: 150 }), Lost);
});

test("leaving, and a signal, close the connection wherever it is", async (context) => {
  const server = await serve(context, (request, response) => {
    response.writeHead(200, STREAM).write(request.url?.includes("quiet") ? ": tapeline\n" : RECORDED);
  });
  const client = new Tapeline({ url: server.url, times: { ...QUICK, silenceMs: 60_000 } });
  for await (const event of client.events("c")) if (event.type === "done") break;
  const stop = new AbortController();
  const reading = idsFrom(client.events("quiet", { signal: stop.signal, onConnection: ({ state }) => state === "live" && stop.abort() }));
  await assert.rejects(reading, { name: "AbortError" });
  await assert.rejects(idsFrom(client.events("c", { signal: AbortSignal.abort() })), { name: "AbortError" });
  for (const giveUpAt = Date.now() + 5_000; await server.connections(); ) {
    assert.ok(Date.now() < giveUpAt, "a connection is left");
    await new Promise(setImmediate);
  }
  assert.equal(server.requests.length, 2);
});
