import assert from "node:assert/strict";
import { test } from "node:test";
import { backoffMs } from "../../shared/client/src/backoff.ts";
import { retryAfterMs } from "../../shared/client/src/refused.ts";
import { RETRY_AFTER_MAX_MS } from "../../shared/client/src/times.ts";

test("waits double up to the longest, are never less than what was asked for, and are spread beyond that", () => {
  const least = [1, 2, 3, 4, 5, 6, 2_000].map((failures) => backoffMs(failures, 1_000, 30_000, 0, () => 0));
  assert.deepEqual(least, [1_000, 2_000, 4_000, 8_000, 16_000, 30_000, 30_000]);
  assert.deepEqual([1, 2, 9].map((failures) => backoffMs(failures, 1_000, 30_000, 0, () => 1)), [1_500, 3_000, 45_000]);
  const some = Array.from({ length: 100 }, () => backoffMs(1, 1_000, 30_000));
  assert.ok(some.every((ms) => ms >= 1_000 && ms <= 1_500) && new Set(some).size > 50);
});

test("what the server asks for may be longer than the longest, and is bounded all the same", () => {
  assert.equal(backoffMs(1, 60_000, 30_000, 0, () => 0), 60_000);
  assert.equal(backoffMs(5, 60_000, 30_000, 0, () => 0), 60_000);
  assert.equal(backoffMs(1, 1e12, 30_000, 0, () => 0), RETRY_AFTER_MAX_MS);
  assert.equal(backoffMs(3, 1_000, 30_000, 60_000, () => 0), 60_000);
  assert.equal(backoffMs(3, 1_000, 30_000, 60_000, () => 1), 62_000);
  assert.equal(backoffMs(9, 1_000, 30_000, 5_000, () => 0), 30_000);
});

test("Retry-After is seconds or a date, and bounded", () => {
  const now = Date.parse("2026-01-01T00:00:00Z");
  const cases: [string | null, number | null][] = [
    [null, null],
    ["", null],
    ["soon", null],
    ["0", 0],
    [" 7 ", 7_000],
    ["Thu, 01 Jan 2026 00:00:09 GMT", 9_000],
    ["Wed, 31 Dec 2025 00:00:00 GMT", 0],
    ["99999999", RETRY_AFTER_MAX_MS],
  ];
  for (const [header, ms] of cases) assert.equal(retryAfterMs(header, now), ms, `${header}`);
});
