import assert from "node:assert/strict";
import { test } from "node:test";
import { backoffMs } from "../../shared/client/src/backoff.ts";
import { retryAfterMs } from "../../shared/client/src/refused.ts";
import { RETRY_AFTER_MAX_MS } from "../../shared/client/src/times.ts";

test("waits double up to the longest, and are spread over their upper half", () => {
  const longest = [1, 2, 3, 4, 5, 6, 2_000].map((failures) => backoffMs(failures, 1_000, 30_000, () => 1));
  assert.deepEqual(longest, [1_000, 2_000, 4_000, 8_000, 16_000, 30_000, 30_000]);
  assert.deepEqual([1, 2, 9].map((failures) => backoffMs(failures, 1_000, 30_000, () => 0)), [500, 1_000, 15_000]);
  const some = Array.from({ length: 100 }, () => backoffMs(1, 1_000, 30_000));
  assert.ok(some.every((ms) => ms >= 500 && ms <= 1_000) && new Set(some).size > 50);
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
