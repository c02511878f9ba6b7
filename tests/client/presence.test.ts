// What a device knows and a connection does not, against a real server: no wait of these tests' is ever waited out, for
// each is an hour.

import assert from "node:assert/strict";
import type { RequestListener, ServerResponse } from "node:http";
import { type TestContext, test } from "node:test";
import { type Connection, follow } from "../../shared/client/src/follow.ts";
import { Tapeline, TIMES } from "../../shared/client/src/index.ts";
import { Presence, watch } from "../../shared/client/src/presence.ts";
import { Lost, Refused } from "../../shared/client/src/refused.ts";
import type { Times } from "../../shared/client/src/times.ts";
import { STREAM, refuse, serve } from "./server.ts";

const HOUR_MS = 3_600_000;
const SETTLING_TRIES = 3;
const SLOW: Times = { ...TIMES, silenceMs: HOUR_MS, retryMs: HOUR_MS, backoffMaxMs: HOUR_MS, settleMs: 20, giveUpMs: Infinity };

const hangUp: RequestListener = (request) => request.socket.destroy();
const greet: RequestListener = (_, response) => response.writeHead(200, STREAM).write(": tapeline\n");
const say: RequestListener = (_, response) => response.writeHead(200, STREAM).write('id: 1\ndata: {"type":"later"}\n\n');

/** Reads from a server whose answers are these, in order, the last of them for ever. */
async function following(context: TestContext, answers: RequestListener[], times = SLOW, presence = new Presence()) {
  const server = await serve(context, (request, response: ServerResponse & { req: typeof request }) => {
    response.setHeader("Connection", "close"); // one that is broken off must not be used again
    (answers.length > 1 ? answers.shift() : answers[0])?.(request, response);
  });
  const stop = new AbortController();
  context.after(() => stop.abort());
  const said: Connection[] = [];
  let look = () => {};
  const source = {
    open: async (cursor: number | null, signal: AbortSignal) => {
      const response = await fetch(server.url, { signal });
      if (!response.ok) throw await Refused.from(response);
      return { response, cursor: cursor ?? 0 };
    },
    isLast: () => false,
    isFinal: () => false,
  };
  const onConnection = (connection: Connection) => {
    said.push(connection);
    look();
  };
  let receive = () => {};
  const received = new Promise<void>((resolve) => (receive = resolve));
  const reading = (async () => {
    for await (const _ of follow(source, { times, presence, signal: stop.signal, onConnection })) receive();
  })();
  const failed = reading.then(
    () => null,
    (error: unknown) => error,
  );
  /** Waits until what was said last is this, having been said after `count` others. */
  const until = async (state: Connection["state"], count = 0): Promise<Connection> => {
    const signal = AbortSignal.timeout(30_000);
    for (;;) {
      const last = said.at(-1);
      if (last?.state === state && said.length > count) return last;
      await new Promise<void>((resolve, reject) => {
        look = resolve;
        signal.onabort = () => reject(new Error(`never ${state}: ${said.map(({ state }) => state)}`));
      });
    }
  };
  return { server, presence, said, until, received, failed };
}

test("when the network is back it is used at once, however long was to be waited", async (context) => {
  const { server, presence, said, until } = await following(context, [hangUp, hangUp, greet]);
  await until("waiting");
  presence.network(false);
  const offline = await until("offline");
  assert.ok(offline.retryAt! > Date.now() + HOUR_MS / 2);
  assert.equal(server.requests.length, 2);
  const count = said.length;
  presence.network(true);
  await until("live", count);
  assert.equal(server.requests.length, 3);
});

test("a network that is not ready when it says so is tried again soon, a few times", async (context) => {
  const { server, presence, said, until } = await following(context, [hangUp]);
  await until("waiting");
  const count = said.length;
  presence.network(true);
  while ((await until("waiting", said.length)).retryAt! < Date.now() + HOUR_MS / 2);
  assert.equal(server.requests.length, 1 + 1 + SETTLING_TRIES);
  assert.ok(said.slice(count).every(({ state }) => state === "connecting" || state === "waiting"));
});

test("a connection is replaced when the network comes or goes", async (context) => {
  const { server, presence, said, until } = await following(context, [greet]);
  for (const isThere of [false, true]) {
    await until("live", said.length - 1);
    const count = said.length;
    presence.network(isThere);
    await until("live", count);
  }
  assert.equal(server.requests.length, 3);
});

test("only who wants it now passes over what the server asked for", async (context) => {
  const later: RequestListener = (_, response) => refuse(response, 429, {}, { "Retry-After": "3000" });
  const { server, presence, said, until } = await following(context, [later, greet]);
  await until("waiting");
  for (const tell of [() => presence.look(), () => presence.network(true), () => (presence.pause(), presence.look())]) {
    const count = said.length;
    tell();
    const { retryAt } = await until("waiting", count);
    assert.ok(retryAt! > Date.now() + 2_000_000);
    assert.ok(!said.slice(count).some(({ state }) => state === "connecting"));
  }
  assert.equal(server.requests.length, 1);
  presence.refresh();
  await until("live");
  assert.equal(server.requests.length, 2);
});

test("what asks for more patience than is left is refused at once", async (context) => {
  const later: RequestListener = (_, response) => refuse(response, 429, { code: "x" }, { "Retry-After": "3000" });
  const { server, failed } = await following(context, [later], { ...SLOW, giveUpMs: 1_000_000 });
  const error = await failed;
  assert.ok(error instanceof Refused && error.retryAfterMs === 3_000_000);
  assert.equal(server.requests.length, 1);
});

test("looking again tries at once, and puts off no giving up", async (context) => {
  const presence = new Presence();
  const { server, said, until, failed } = await following(context, [hangUp], { ...SLOW, giveUpMs: 300 }, presence);
  const looking = (async () => {
    for (;;) {
      await until("waiting", said.length);
      presence.look();
    }
  })();
  const error = await Promise.race([failed, looking]);
  assert.ok(error instanceof Lost && error.afterMs >= 300);
  assert.ok(server.requests.length > 1);
});

test("a connection that has long been silent is replaced when somebody looks", async (context) => {
  for (const [staleMs, requests] of [[0, 2], [Infinity, 1]] as const) {
    const { server, presence, said, until } = await following(context, [greet], { ...SLOW, staleMs });
    await until("live");
    const count = said.length;
    presence.look();
    if (requests > 1) await until("live", count);
    else assert.equal(said.length, count, "an abort would have been said, or be under way");
    assert.equal(server.requests.length, requests);
  }
});

test("after a sleep of the device a silent connection is replaced, though nobody says a word", async (context) => {
  const times = { ...SLOW, staleMs: 2_000 };
  const { server, presence, said, until, received } = await following(context, [say], times);
  context.after(watch(presence, times));
  await received;
  await new Promise(setImmediate); // until it waits for more
  const count = said.length;
  const now = Date.now;
  context.mock.method(Date, "now", () => now() + HOUR_MS); // the clock of a device that wakes
  await until("live", count);
  assert.equal(server.requests.length, 2);
});

test("a hidden tab gives a connection without an end back, and keeps one with an end", async (context) => {
  const tab = Object.assign(new EventTarget(), { hidden: false });
  for (const [name, value] of Object.entries({ window: new EventTarget(), document: tab, navigator: { onLine: true } })) {
    const was = Object.getOwnPropertyDescriptor(globalThis, name);
    Object.defineProperty(globalThis, name, { value, configurable: true });
    context.after(() => (was ? Object.defineProperty(globalThis, name, was) : Reflect.deleteProperty(globalThis, name)));
  }
  const server = await serve(context, greet);
  const client = new Tapeline({ url: server.url, times: { hiddenMs: 50 } });
  const stop = new AbortController();
  context.after(() => stop.abort());
  const heard = (run?: string) => {
    const states: string[] = [];
    let look = () => {};
    const onConnection = ({ state }: Connection) => {
      states.push(state);
      look();
    };
    client.events("c", { run, signal: stop.signal, onConnection }).next().catch(() => {});
    return async (state: string) => {
      while (states.at(-1) !== state) await new Promise<void>((resolve) => (look = resolve));
    };
  };
  const [endless, ending] = [heard(), heard("r")];
  await Promise.all([endless("live"), ending("live")]);
  tab.hidden = true;
  tab.dispatchEvent(new Event("visibilitychange"));
  await endless("paused");
  tab.hidden = false;
  tab.dispatchEvent(new Event("visibilitychange"));
  await endless("live");
  await ending("live");
  assert.deepEqual(server.requests.map(({ url }) => url?.includes("run=r")).sort(), [false, false, true]);
});
