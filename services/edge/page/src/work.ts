// A row for each attempt of the model and each execution of a tool: when in its run, for how long, and how it ended.

import { h } from "./dom.ts";
import { duration } from "./duration.ts";
import { count } from "./quantity.ts";
import type { Attempt, Execution, Timeline } from "./timeline.ts";

export function workRow(one: Attempt | Execution, { moments, runs }: Timeline): Node[] {
  const span = runs.find(({ run }) => run === one.run);
  const from = moments[span?.first ?? one.first]!.at;
  const whole = Math.max(1, moments[span?.last ?? one.last]!.at - from);
  const x = (index: number) => ((moments[index]!.at - from) / whole) * 100;
  const bar = (kind: string, first: number, last: number) => {
    const part = h(`span.${kind}`);
    part.style.left = `${x(first)}%`;
    part.style.width = `max(2px, ${x(last) - x(first)}%)`;
    return part;
  };
  const bars = h("span.bars", { "aria-hidden": "true" });
  const where = [span ? `run ${span.number}` : "", one.worker].filter(Boolean).join(" · ");
  const lines = (name: Node, facts: string, ...marks: Node[]) => [
    h("div.line", {}, name, bars),
    h("div.line.under", {}, h("span.facts", {}, facts), ...marks, h("span.where", {}, where)),
  ];
  if (one.kind === "attempt") {
    const name = `Step ${one.step}, attempt ${one.attempt}`;
    if (one.superseded_by === null) {
      bars.append(bar("attempt", one.first, one.last));
      return lines(h("span.name", {}, name), attemptFacts(one));
    }
    bars.append(bar("attempt.superseded", one.first, one.last));
    const mark = h("span.mark.superseded", {}, `superseded by attempt ${one.superseded_by}`);
    return lines(h("s.name", {}, name), attemptFacts(one), mark);
  }
  const bad = one.outcome !== "ok";
  if (one.started !== null) bars.append(bar("queue", one.first, one.started));
  bars.append(bar(bad ? "execution.failed" : "execution", one.started ?? one.first, one.last));
  const mark = h(bad ? "span.mark.bad" : "span.mark", {}, one.outcome || "no result");
  return lines(h("code.name", {}, one.tool), executionFacts(one), mark);
}

function attemptFacts({ claimed_ts, first_ts, ended_ts, deltas, finish, resume }: Attempt): string {
  const parts = [duration(ended_ts - claimed_ts)];
  if (first_ts !== null) parts.push(`first after ${duration(first_ts - claimed_ts)}`);
  if (deltas) parts.push(count(deltas, "delta"));
  if (resume === "continue") parts.push("continued");
  parts.push(finish || "no answer");
  return parts.join(" · ");
}

function executionFacts({ approval_ms, queue_ms, execution_ms, attempt }: Execution): string {
  const parts = approval_ms ? [`approval ${duration(approval_ms)}`] : [];
  if (queue_ms !== null) parts.push(`queue ${duration(queue_ms)}`);
  if (execution_ms !== null) parts.push(`execution ${duration(execution_ms)}`);
  if (attempt > 1) parts.push(`attempt ${attempt}`);
  return parts.join(" · ");
}
