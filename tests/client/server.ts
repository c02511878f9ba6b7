// A real HTTP server that answers as it is told, for what an edge never does, or not on purpose.

import { once } from "node:events";
import { type IncomingMessage, type RequestListener, type ServerResponse, createServer } from "node:http";
import type { AddressInfo } from "node:net";
import type { TestContext } from "node:test";
import { EVENTS, RECORDED } from "./recorded.ts";

export const STREAM = { "Content-Type": "text/event-stream; charset=utf-8" };

export interface Server {
  url: string;
  /** What was asked, in order. */
  requests: IncomingMessage[];
  /** How many connections are open now. */
  connections(): Promise<number>;
}

/** Serves until the end of the test. */
export async function serve(test: TestContext, answer: RequestListener): Promise<Server> {
  const requests: IncomingMessage[] = [];
  const server = createServer((request, response) => {
    requests.push(request);
    answer(request, response);
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  test.after(async () => {
    server.closeAllConnections();
    server.close();
    await once(server, "close");
  });
  return {
    url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`,
    requests,
    connections: () =>
      new Promise((resolve, reject) => server.getConnections((error, count) => (error ? reject(error) : resolve(count)))),
  };
}

/** Where each recorded event begins; the first after the hello. */
export const STARTS = EVENTS.map(({ id }) => RECORDED.indexOf(`id: ${id}\n`));
export const HELLO = RECORDED.subarray(0, STARTS[0]);

/** The recorded stream as an edge would send it to this request: after its cursor. */
export function recordedFor(request: IncomingMessage): Uint8Array {
  const cursor = cursorOf(request);
  const at = EVENTS.findIndex(({ id }) => id > cursor);
  return Buffer.concat([HELLO, at < 0 ? new Uint8Array() : RECORDED.subarray(STARTS[at])]);
}

/** Both ways of saying it have to say the same. */
export function cursorOf(request: IncomingMessage): number {
  const header = Number(request.headers["last-event-id"] ?? 0);
  const after = Number(new URL(request.url ?? "", "http://edge").searchParams.get("after") ?? 0);
  if (header !== after) throw new Error(`Last-Event-ID ${header}, but after=${after}`);
  return after;
}

/** Sends these bytes of a stream, and breaks the connection off. */
export function cut(response: ServerResponse, bytes: Uint8Array): void {
  response.writeHead(200, STREAM);
  if (!bytes.length) response.flushHeaders();
  response.write(bytes, () => response.destroy());
}

export function refuse(response: ServerResponse, status: number, problem: object, headers: object = {}): void {
  response.writeHead(status, { "Content-Type": "application/problem+json", ...headers });
  response.end(JSON.stringify({ status, ...problem }));
}
