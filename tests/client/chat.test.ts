// Asking, and keeping up with a conversation, against a real server that breaks off at the worst moments.

import assert from "node:assert/strict";
import type { IncomingMessage, ServerResponse } from "node:http";
import { text } from "node:stream/consumers";
import { test } from "node:test";
import {
  type Chat,
  EMPTY,
  Lost,
  Refused,
  type StoredEvent,
  Tapeline,
  type Times,
  fold,
} from "../../shared/client/src/index.ts";
import { EVENTS, RECORDED, RUN } from "./recorded.ts";
import { STARTS, STREAM, cursorOf, cut, recordedFor, refuse, serve } from "./server.ts";

const QUICK: Partial<Times> = { retryMs: 1, backoffMaxMs: 4, connectMs: 2_000, silenceMs: 2_000, giveUpMs: 10_000 };
const LAST = EVENTS.at(-1)!.id;

const isPost = ({ method }: IncomingMessage) => method === "POST";
const isEvents = ({ url }: IncomingMessage) => url?.includes("/events") ?? false;

async function all(events: AsyncIterable<StoredEvent>): Promise<StoredEvent[]> {
  const read: StoredEvent[] = [];
  for await (const event of events) read.push(event);
  return read;
}

/** Waits until the chat is so; fails after a while. */
async function until(chat: Chat, isSo: () => boolean): Promise<void> {
  const signal = AbortSignal.timeout(5_000);
  while (!isSo()) {
    await new Promise<void>((resolve, reject) => {
      const forget = chat.subscribe(() => (forget(), resolve()));
      signal.onabort = () => reject(new Error(`not so: ${JSON.stringify(chat.connection)}`));
    });
  }
}

test("ask: broken off before the run is known it is posted again with its key, after that it is read on", async (context) => {
  for (const size of [0, 10, STARTS[1]! - 1, STARTS[1]!, STARTS[3]! + 20, RECORDED.length - 1]) {
    const posts: string[] = [];
    const server = await serve(context, async (request, response) => {
      if (!isPost(request)) return response.writeHead(200, STREAM).end(recordedFor(request));
      assert.deepEqual(JSON.parse(await text(request)), { content: "hi", on_busy: "queue" });
      assert.equal(request.headers.accept, "text/event-stream");
      posts.push(String(request.headers["idempotency-key"]));
      return posts.length === 1 ? cut(response, RECORDED.subarray(0, size)) : response.writeHead(200, STREAM).end(RECORDED);
    });
    const client = new Tapeline({ url: server.url, times: QUICK });
    assert.deepEqual(await all(client.ask("c", "hi", { onBusy: "queue" })), EVENTS);
    const isKnown = size >= STARTS[1]!;
    assert.equal(posts.length, isKnown ? 1 : 2);
    assert.equal(new Set(posts).size, 1);
    assert.match(posts[0]!, /^[0-9a-f]{32}$/);
    if (isKnown) assert.ok(server.requests[1]?.url?.includes(`run=${RUN}`));
  }
});

test("ask: a message that is refused is refused at once", async (context) => {
  for (const [status, code] of [[409, "busy"], [422, "invalid"], [429, "too_many_messages"]] as const) {
    const server = await serve(context, (_, response) => refuse(response, status, { code }, { "Retry-After": "7" }));
    const asked = all(new Tapeline({ url: server.url, times: QUICK }).ask("c", "hi"));
    await assert.rejects(asked, (error) => error instanceof Refused && error.code === code && error.retryAfterMs === 7_000);
    assert.equal(server.requests.length, 1);
  }
});

test("calls: what is sent and what comes back; an answer that is cut, late or a page is lost", async (context) => {
  const asked: [string | undefined, string | undefined, string][] = [];
  let answer: (response: ServerResponse) => void = (response) => response.writeHead(201).end("{}");
  const server = await serve(context, async (request, response) => {
    asked.push([request.method, request.url, await text(request)]);
    answer(response);
  });
  const client = new Tapeline({ url: `${server.url}/under/here`, times: { ...QUICK, connectMs: 100, silenceMs: 100 } });
  await client.create({ title: "é" });
  await client.conversations({ limit: 3, before: "9" });
  await client.rename("a/b", "x");
  await client.decide("a", "r", "c?", { approved: false, reason: "no" });
  await client.stop("a", "r");
  answer = (response) => response.writeHead(204).end();
  assert.equal(await client.delete("a"), undefined);
  const under = "/under/here/v1/conversations";
  assert.deepEqual(asked.splice(0), [
    ["POST", under, '{"title":"é"}'],
    ["GET", `${under}?limit=3&before=9`, ""],
    ["PATCH", `${under}/a%2Fb`, '{"title":"x"}'],
    ["POST", `${under}/a/runs/r/calls/c%3F/approval`, '{"approved":false,"reason":"no"}'],
    ["POST", `${under}/a/runs/r/stop`, "{}"],
    ["DELETE", `${under}/a`, ""],
  ]);
  const broken: ((response: ServerResponse) => void)[] = [
    () => {},
    (response) => response.destroy(),
    (response) => response.end("<p>Sign in"),
    (response) => response.writeHead(200, { "Content-Length": 99 }).end('{"id":', () => response.destroy()),
  ];
  for (answer of broken) await assert.rejects(client.create(), Lost);
  answer = (response) => response.writeHead(502).end("<h1>Bad Gateway");
  await assert.rejects(client.create(), (error) => error instanceof Refused && error.status === 502 && error.code === "");
});

test("stored: each line as it comes; an export that is cut gives what was whole, and is lost", async (context) => {
  const lines = EVENTS.map((event) => `${JSON.stringify(event)}\n`).join("");
  let size = lines.length;
  const server = await serve(context, (request, response) => {
    assert.equal(request.headers.accept, "application/x-ndjson");
    response.writeHead(200, { "Content-Type": "application/x-ndjson" });
    if (size === lines.length) response.end(lines);
    else response.write(lines.slice(0, size), () => response.destroy());
  });
  const client = new Tapeline({ url: server.url, times: QUICK });
  assert.deepEqual(await all(client.stored("c")), EVENTS);
  assert.equal(await (await client.export("c", { after: 3 })).text(), lines);
  assert.ok(server.requests[1]?.url?.endsWith("/c/events?after=3"));
  size = lines.indexOf("\n") + 5;
  const whole: StoredEvent[] = [];
  await assert.rejects(async () => {
    for await (const event of client.stored("c")) whole.push(event);
  }, Lost);
  assert.deepEqual(whole, EVENTS.slice(0, 1));
});

test("chat: a snapshot, then what follows it; told once for what comes together; nothing after it is closed", async (context) => {
  const date = new Date(Math.floor(Date.now() / 1_000) * 1_000 - 60_000);
  const server = await serve(context, (request, response) => {
    response.setHeader("Date", date.toUTCString()).setHeader("Connection", "close");
    if (isEvents(request)) response.writeHead(200, STREAM).write(recordedFor(request));
    else response.end(JSON.stringify({ ...EMPTY, id: "c", last_event_id: EVENTS[0]!.id - 1, runs: [] }));
  });
  const chat = new Tapeline({ url: server.url, times: QUICK }).chat("c");
  context.after(() => chat.close());
  let told = 0;
  chat.subscribe(() => (told += 1));
  await until(chat, () => chat.state.last_event_id === LAST);
  assert.deepEqual(chat.state, fold(EVENTS, { ...EMPTY, id: "c" }));
  assert.deepEqual(chat.connection, { state: "live", reason: null, retryAt: null });
  assert.ok(told < EVENTS.length, `told ${told} times of ${EVENTS.length} events that came together`);
  assert.ok(Math.abs(chat.serverNow() - date.getTime()) < 5_000);
  const before = told;
  chat.close();
  for (const giveUpAt = Date.now() + 5_000; await server.connections(); ) {
    assert.ok(Date.now() < giveUpAt, "a connection is left");
    await new Promise(setImmediate);
  }
  assert.equal(told, before);
});

test("chat: a cursor that the log does not know loads the snapshot anew, by itself", async (context) => {
  let loads = 0;
  const server = await serve(context, (request, response) => {
    if (!isEvents(request)) {
      const last_event_id = loads++ ? LAST : EVENTS[1]!.id;
      return response.end(JSON.stringify({ ...EMPTY, id: "c", title: `load ${loads}`, last_event_id, runs: [] }));
    }
    if (cursorOf(request) < LAST) return refuse(response, 410, { code: "cursor_expired" });
    return response.writeHead(200, STREAM).write(": tapeline\n");
  });
  const chat = new Tapeline({ url: server.url, times: QUICK }).chat("c");
  context.after(() => chat.close());
  await until(chat, () => chat.connection.state === "live");
  assert.deepEqual([loads, chat.state.title, chat.state.last_event_id], [2, "load 2", LAST]);
});

test("chat: says that it is lost, goes on trying, and is well again; a refusal waits to be asked", async (context) => {
  let isDown = true;
  let isGone = false;
  const server = await serve(context, (request, response) => {
    if (isDown) return response.destroy();
    if (isGone) return refuse(response, 404, { code: "not_found" });
    if (isEvents(request)) return response.writeHead(200, STREAM).end(recordedFor(request));
    return response.end(JSON.stringify({ ...EMPTY, id: "c", last_event_id: 0, runs: [] }));
  });
  const chat = new Tapeline({ url: server.url, times: { ...QUICK, giveUpMs: 50 } }).chat("c");
  context.after(() => chat.close());
  await until(chat, () => chat.connection.state === "lost");
  assert.ok(chat.connection.reason instanceof Lost && chat.connection.retryAt! > Date.now() - 1_000);
  isDown = false;
  await until(chat, () => chat.state.last_event_id === LAST);
  isGone = true;
  await until(chat, () => chat.connection.reason instanceof Refused);
  assert.deepEqual([chat.connection.state, chat.connection.retryAt], ["lost", null]);
  const asked = server.requests.length;
  for (let others = 0; others < 20; others++) await fetch(server.url); // takes far longer than any of its waits
  assert.equal(server.requests.length, asked + 20, "it leaves the server alone");
  isGone = false;
  chat.refresh();
  await until(chat, () => chat.connection.state === "live" && chat.state.last_event_id === LAST);
});

test("chat: a fault in what came is said, and waits to be asked", async (context) => {
  let isBroken = true;
  const server = await serve(context, (request, response) => {
    response.setHeader("Connection", "close");
    if (isEvents(request)) {
      response.writeHead(200, STREAM).write(`id: ${LAST}\nevent: title\ndata: {"type":"title","run":"-","ts":1,"title":""}\n\n`);
    } else {
      const runs = isBroken ? [{ run: "r", steps: [] }] : []; // which says nothing of its message
      response.end(JSON.stringify({ ...EMPTY, id: "c", last_event_id: 0, runs }));
    }
  });
  const chat = new Tapeline({ url: server.url, times: QUICK }).chat("c");
  context.after(() => chat.close());
  await until(chat, () => chat.connection.state === "lost");
  assert.ok(chat.connection.reason instanceof TypeError && chat.connection.retryAt === null);
  isBroken = false;
  chat.refresh();
  await until(chat, () => chat.connection.state === "live" && chat.state.last_event_id === LAST);
});

test("a token may take its time: a person looks for it", async (context) => {
  const server = await serve(context, (request, response) => {
    if (request.headers.authorization) response.end('{"conversations":[],"next":null}');
    else refuse(response, 401, { code: "unauthorized" });
  });
  const times = { ...QUICK, connectMs: 1_000, silenceMs: 1_000 };
  const token = async (refused?: string) => {
    if (refused === undefined) return undefined;
    await new Promise((resolve) => setTimeout(resolve, 1_500));
    return "key";
  };
  assert.deepEqual(await new Tapeline({ url: server.url, token, times }).conversations(), { conversations: [], next: null });
});

test("a tool's clock is not the server's", async (context) => {
  const far = Date.now() + 1e9;
  const progress = JSON.stringify({ type: "tool_progress", run: "r", call: "c", tool: "t", ts: far });
  const server = await serve(context, (request, response) => {
    response.setHeader("Connection", "close");
    if (isEvents(request)) response.writeHead(200, STREAM).write(`id: ${LAST}\nevent: tool_progress\ndata: ${progress}\n\n`);
    else response.end(JSON.stringify({ ...EMPTY, id: "c", last_event_id: 0, runs: [] }));
  });
  const chat = new Tapeline({ url: server.url, times: QUICK }).chat("c");
  context.after(() => chat.close());
  await until(chat, () => chat.state.last_event_id === LAST);
  assert.ok(chat.serverNow() < far - 1e8);
});
