// The parser: the same bytes, however they are split, are the same events.

import assert from "node:assert/strict";
import { test } from "node:test";
import { EVENT_CHARS_MAX, type Frame, Malformed, Parser } from "../../shared/client/src/sse.ts";
import { RECORDED, randomFrom } from "./recorded.ts";

const bytesOf = (text: string) => new TextEncoder().encode(text);

function parsed(...pieces: Uint8Array[]): Frame[] {
  const parser = new Parser();
  return pieces.flatMap((piece) => [...parser.feed(piece)]);
}

const ODD = bytesOf(
  "\uFEFF: hello\nid: 1\nevent: token\ndata: é漢🙂\u2028\n\n" +
    "id: 2\r\nevent:token\r\ndata:no space\r\ndata:  two\r\n\r\n" +
    "id: 3\rdata: {\rdata: }\r\r" +
    "id: 4\nid: 5\0\nretry: 1500\nretry: soon\nunknown: x\ndata\n\n" +
    ": hb\n\nid: 6\nevent: token\n\n\uFEFFdata: not a field\ndata: last\nid: 7\n\nid: 8\ndata: never ended\n",
);
const IN_ODD: Frame[] = [
  { id: "1", type: "token", data: "é漢🙂\u2028" },
  { id: "2", type: "token", data: "no space\n two" },
  { id: "3", type: "message", data: "{\n}" },
  { id: "4", type: "message", data: "" },
  { id: "7", type: "message", data: "last" },
];

test("odd bytes are what the standard says, split at every position", () => {
  assert.deepEqual(parsed(ODD), IN_ODD);
  for (let at = 0; at <= ODD.length; at++) {
    assert.deepEqual(parsed(ODD.subarray(0, at), ODD.subarray(at)), IN_ODD, `split at ${at}`);
  }
  assert.deepEqual(parsed(...Array.from(ODD, (byte) => Uint8Array.of(byte))), IN_ODD, "byte by byte");
});

test("a recorded stream is the same split at every position, and in three parts at random", () => {
  const whole = parsed(RECORDED);
  assert.ok(whole.length >= 8);
  assert.equal(whole.at(-1)?.type, "done");
  for (let at = 0; at <= RECORDED.length; at++) {
    assert.deepEqual(parsed(RECORDED.subarray(0, at), RECORDED.subarray(at)), whole, `split at ${at}`);
  }
  const random = randomFrom();
  for (let round = 0; round < 500; round++) {
    const [a = 0, b = 0] = [random() * RECORDED.length, random() * RECORDED.length].sort((x, y) => x - y).map(Math.floor);
    const parts = [RECORDED.subarray(0, a), RECORDED.subarray(a, b), RECORDED.subarray(b)];
    assert.deepEqual(parsed(...parts), whole, `split at ${a} and ${b}`);
  }
});

test("`retry:` is remembered", () => {
  const parser = new Parser();
  assert.equal(parser.retryMs, null);
  assert.deepEqual([...parser.feed(ODD)], IN_ODD);
  assert.equal(parser.retryMs, 1_500);
});

test("the largest event comes, in one piece and in many; a larger one is refused after those before it", () => {
  const piecesOf = (bytes: Uint8Array) =>
    Array.from({ length: Math.ceil(bytes.length / 65_536) }, (_, n) => bytes.subarray(n * 65_536, (n + 1) * 65_536));
  const before = "id: 1\ndata: before\n\n";
  for (const split of [(bytes: Uint8Array) => [bytes], piecesOf]) {
    const largest = "x".repeat(EVENT_CHARS_MAX);
    const frames = parsed(...split(bytesOf(`${before}id: 2\ndata: ${largest.slice(8)}\n\n`)));
    assert.equal(frames[1]?.data.length, EVENT_CHARS_MAX - 8);
    for (const end of ["\n\n", `\ndata: ${largest}\n\n`, ""]) {
      const parser = new Parser();
      const received: Frame[] = [];
      assert.throws(() => {
        for (const piece of split(bytesOf(`${before}id: 2\ndata: ${largest}x${end}id: 3\ndata: after\n\n`))) {
          for (const frame of parser.feed(piece)) received.push(frame);
        }
      }, Malformed);
      assert.deepEqual(received, [{ id: "1", type: "message", data: "before" }]);
      assert.throws(() => [...parser.feed(bytesOf("id: 4\ndata: x\n\n"))], Malformed, "and nothing after it");
    }
  }
});

test("what can be no field costs no memory, whatever its length", () => {
  const parser = new Parser();
  const line = bytesOf("<html>".repeat(20_000));
  for (let n = 0; n < 50; n++) assert.deepEqual([...parser.feed(line)], []);
  assert.deepEqual([...parser.feed(bytesOf("\nid: 1\ndata: x\n\n"))], [{ id: "1", type: "message", data: "x" }]);
});
