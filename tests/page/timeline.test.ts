// The timeline of a log that the real stack wrote: a tool that fails, one that a person approves, and an answer whose
// worker was killed. What is expected is read from the log's own lines, not from the timeline.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { indented, lines, parts } from "../../services/edge/page/src/lines.ts";
import { brief, next, placeAt, written } from "../../services/edge/page/src/moment.ts";
import { Chain } from "../../services/edge/page/src/save.ts";
import { type Attempt, type Execution, type Logged, timeline } from "../../services/edge/page/src/timeline.ts";

const recorded = readFileSync(new URL("recorded.ndjson", import.meta.url));
const json = recorded.toString().trimEnd().split("\n");
const events = json.map((line) => JSON.parse(line) as Logged & { ts: number; run: string });
const one = (...types: string[]) => events.filter(({ type }) => types.includes(type));
const isDelta = ({ type }: Logged) => ["token", "thinking", "tool_input", "tool_progress"].includes(type);
const isAttempt = (work: Attempt | Execution): work is Attempt => work.kind === "attempt";
const isExecution = (work: Attempt | Execution): work is Execution => work.kind === "execution";
const shown = timeline(events);

test("every event stands where its time is, and a long silence is cut short", () => {
  let at = 0;
  for (const [place, event] of events.entries()) {
    const passed = place ? Math.max(0, event.ts - Math.max(...events.slice(0, place).map(({ ts }) => ts))) : 0;
    at += Math.min(10_000, passed);
    const moment = shown.moments[place]!;
    assert.deepEqual([moment.id, moment.ts, moment.at, moment.fact], [event.id, event.ts, at, !isDelta(event)]);
    assert.equal(moment.silence_ms, passed > 10_000 ? passed : 0);
    assert.equal(placeAt(shown.moments, at), shown.moments.findLastIndex((other) => other.at === at));
  }
  assert.equal(shown.length_ms, at);
  assert.equal(shown.moments.filter(({ silence_ms }) => silence_ms).length, 1, "while nobody knew the worker was dead");
  assert.equal(placeAt(shown.moments, -1), -1);
  const facts = shown.moments.flatMap(({ fact }, place) => (fact ? [place] : []));
  for (const [index, place] of facts.entries()) {
    assert.equal(next(shown.moments, place, 1, ({ fact }) => fact), facts[index + 1] ?? place);
    assert.equal(next(shown.moments, place, -1, ({ fact }) => fact), facts[index - 1] ?? place);
  }
});

test("a worker whose clock is ahead makes nothing longer", () => {
  const ahead = (ms: number) => timeline(events.map((event) => (event.type.startsWith("tool_") ? { ...event, ts: event.ts + ms } : event)));
  assert.ok(one("tool_started").length >= 2);
  assert.equal(ahead(3_000).length_ms, shown.length_ms);
  const wrong = ahead(3_600_000); // beyond belief: what comes after it is not pressed into one moment
  const [first, last] = [wrong.moments.findLastIndex(({ writer }) => writer === "tool"), wrong.moments.length - 1];
  const [from, to] = [shown.moments[first + 1]!, shown.moments[last]!];
  assert.equal(wrong.moments[last]!.at - wrong.moments[first + 1]!.at, to.at - from.at);
});

test("every event has its writer, and a delta the worker that claimed its attempt", () => {
  for (const { event, writer, worker, run, step, attempt } of shown.moments) {
    const claims = one("step").filter((claim) => claim.run === run && claim["step"] === step);
    const claim = claims.find((claim) => claim["attempt"] === attempt);
    if (["token", "thinking", "tool_input"].includes(event.type)) assert.equal(worker, claim!["worker"]);
    const expected = { conversation: "input", message: "input", approval: "input" }[event.type];
    assert.equal(writer, expected ?? (["tool_started", "tool_result", "tool_progress"].includes(event.type) ? "tool" : "model"));
  }
});

test("what a takeover superseded is what its claim says, and the lost text can be read", () => {
  const claim = one("step").find((event) => event["supersedes"])!;
  const { first, last } = claim["supersedes"] as { first: number; last: number };
  const covered = events.filter(({ id, run }) => id >= first && id <= last && run === claim.run);
  const lost = shown.moments.filter(({ superseded_by }) => superseded_by !== null);
  assert.deepEqual(lost.filter(({ fact }) => !fact).map(({ id }) => id), covered.filter(isDelta).map(({ id }) => id));
  assert.deepEqual(lost.filter(({ fact }) => fact).map(({ type, attempt }) => [type, attempt]), [["step", 1]]);
  assert.deepEqual(new Set(lost.map(({ superseded_by }) => superseded_by)), new Set([2]));
  assert.equal(shown.takeovers, 1);
  const [before, after] = shown.work.filter(isAttempt).filter(({ run }) => run === claim.run);
  const said = covered.filter(({ type }) => type === "token").map((event) => event["text"]);
  assert.equal(written(shown.moments, before!).text, said.join(""));
  assert.deepEqual([before!.superseded_by, before!.finish, before!.deltas], [2, "", covered.filter(isDelta).length]);
  assert.deepEqual([after!.superseded_by, after!.finish], [null, "stop"]);
});

test("a tool's bars are the log's times: asked, approved, issued, started, ended", () => {
  const executions = shown.work.filter(isExecution);
  assert.equal(executions.length, one("tool_result").length);
  for (const result of one("tool_result")) {
    const asked = one("tool_call").filter(({ call }) => call === result["call"]);
    const issued = asked.at(-1)!;
    const started = one("tool_started").find(({ call }) => call === result["call"])!;
    const bar = executions.find(({ call }) => call === result["call"])!;
    assert.equal(bar.queue_ms, started.ts - issued.ts);
    assert.equal(bar.execution_ms, result.ts - started.ts);
    assert.equal(bar.approval_ms, issued.ts - asked[0]!.ts);
    assert.deepEqual([bar.outcome, bar.worker, bar.attempt], [result["outcome"], started["worker"], 1]);
    const places = [bar.first, bar.started!, bar.last].map((place) => events[place]!.id);
    assert.deepEqual(places, [issued.id, started.id, result.id]);
  }
  assert.ok(executions.some(({ approval_ms }) => approval_ms > 0), "one waited for a person");
  assert.deepEqual(new Set(executions.map(({ outcome }) => outcome)), new Set(["ok", "error"]));
});

test("who is denied has waited for a person, and in no queue", () => {
  const [asked] = one("tool_call").filter((event) => event["needs_approval"]);
  const denied: Logged = { ...one("tool_result")[0]!, call: asked!["call"], ts: asked!.ts + 5_000, outcome: "denied" };
  const [bar] = timeline([asked!, denied]).work.filter(isExecution);
  assert.deepEqual([bar!.approval_ms, bar!.queue_ms, bar!.execution_ms], [5_000, null, null]);
});

test("a call whose worker was lost has a bar for each attempt, and only its first result counts", () => {
  const started = one("tool_started")[0]!;
  const place = events.indexOf(started);
  const again = { ...started, worker: "another", attempt: 2, ts: started.ts + 3_000 };
  const result = { ...one("tool_result")[0]!, ts: started.ts + 3_500 };
  const [first, second, ...more] = timeline([...events.slice(0, place + 1), again, result, { ...result, outcome: "late" }])
    .work.filter(isExecution);
  assert.deepEqual([first!.outcome, first!.execution_ms, second!.attempt], ["lost", 3_000, 2]);
  assert.deepEqual([second!.outcome, second!.queue_ms, second!.execution_ms], ["error", 0, 500]);
  assert.deepEqual(more, []);
});

test("any event that is missing is a hole, in the timeline and in an export", () => {
  assert.deepEqual([shown.holes, shown.unproven], [0, 0]);
  for (const place of events.slice(0, -1).keys()) {
    const cut = timeline(events.toSpliced(place, 1));
    const hole = { after: events[place - 1]?.id ?? 0, last: events[place]!.id };
    assert.equal(cut.holes, 1);
    assert.deepEqual(cut.moments[place]!.hole, hole);
    const chain = new Chain();
    for (const line of json.toSpliced(place, 1)) chain.take(line);
    assert.equal(chain.breaks, 1);
  }
  const facts = events.filter((event) => !isDelta(event));
  assert.equal(timeline(facts, "compact").holes, 0, "deltas left out are none");
  assert.ok(timeline(facts).holes > 0);
});

test("runs begin with a message and end as their last fact says", () => {
  assert.deepEqual(
    shown.runs.map(({ run, number, outcome, failed }) => [run, number, outcome, failed]),
    one("message").map(({ run }, index) => [run, index + 1, "stop", false]),
  );
  const failing = timeline([one("message")[0]!, { ...one("done")[0]!, type: "error", code: "late" }]).runs[0]!;
  assert.deepEqual([failing.outcome, failing.failed], ["late", true]);
});

test("what nobody knows is shown and breaks nothing", () => {
  const odd: Logged[] = [
    { id: 1, prev: 0, type: "undecodable" },
    { id: 2, prev: 1, type: "misplaced", kind: "delta.tool", event: { type: "token" } },
    { id: 3, prev: 2, type: "toString", run: 7, ts: "soon", step: null },
    { id: 4, prev: null, type: "tool_result", run: "r", call: "never asked", ts: 5 },
    { id: 5, prev: 4, type: "token", run: "r", step: 1, attempt: 1, ts: 4, text: "nobody’s" },
  ];
  const { moments, work, unproven, holes } = timeline(odd);
  assert.deepEqual(moments.map(({ writer }) => writer), ["unknown", "unknown", "unknown", "tool", "model"]);
  assert.deepEqual([work, unproven, holes], [[], 1, 0]);
  assert.ok(moments.every(({ at }, place) => at >= (moments[place - 1]?.at ?? 0)), "clocks that disagree do not go back");
  assert.match(brief(moments[1]!), /not its writer’s/);
  assert.deepEqual(timeline([]).moments, []);
});

test("lines are whole wherever the bytes are split, and JSON on several lines says the same", async () => {
  const some = recorded.subarray(0, 10_000);
  for (const size of [1, 7, 4_096]) {
    const split = new ReadableStream<Uint8Array<ArrayBuffer>>({
      start(controller) {
        for (let at = 0; at < some.length; at += size) controller.enqueue(Uint8Array.from(some.subarray(at, at + size)));
        controller.close();
      },
    });
    const seen: string[] = [];
    const reading = (async () => {
      for await (const line of lines(parts(split))) seen.push(line);
    })();
    await assert.rejects(reading, /not whole/); // the last one is cut off
    assert.deepEqual(seen, some.toString().split("\n").slice(0, -1));
  }
  for (const line of json) assert.deepEqual(JSON.parse(indented(line)), JSON.parse(line));
  const exact = '{"n":12345678901234567890,"f":1.0,"s":"a, \\"b\\": {c}","e":{},"l":[ 1,2]}';
  assert.equal(
    indented(exact),
    '{\n  "n": 12345678901234567890,\n  "f": 1.0,\n  "s": "a, \\"b\\": {c}",\n  "e": {},\n  "l": [\n    1,\n    2\n  ]\n}',
  );
});
