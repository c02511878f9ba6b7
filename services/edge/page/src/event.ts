// A row for each event of a log: its place, what it says, when, and whose it is.

import { visible } from "./bidi.ts";
import { h } from "./dom.ts";
import { duration, offset, time } from "./duration.ts";
import { brief } from "./moment.ts";
import type { Moment, RunSpan, Timeline } from "./timeline.ts";

export function eventRow(moment: Moment, { moments, runs }: Timeline): Node[] {
  const { type, id, ts, hole, silence_ms, superseded_by, writer, worker } = moment;
  const where = whereabouts(moment, runs);
  return [
    h(
      "div.line",
      {},
      h("span.seq", {}, String(id)),
      h(`span.type.${writer}`, {}, type),
      h(superseded_by === null ? "span.brief" : "s.brief", {}, visible(brief(moment))),
    ),
    h(
      "div.line.under",
      {},
      h("span.offset", {}, `+${offset(ts - moments[0]!.ts)}`),
      h("span.time", {}, time(ts)),
      ...(superseded_by === null ? [] : [h("span.mark.superseded", {}, `superseded by attempt ${superseded_by}`)]),
      ...(silence_ms ? [h("span.mark", {}, `after ${duration(silence_ms)}`)] : []),
      ...(hole ? [h("span.mark.bad", {}, `hole: ${hole.after + 1} to ${hole.last}`)] : []),
      h("span.where", {}, [where, `${writer} ${worker}`.trim()].filter(Boolean).join(" · ")),
    ),
  ];
}

function whereabouts({ run, step, attempt }: Moment, spans: readonly RunSpan[]): string {
  const span = spans.find((one) => one.run === run);
  const parts = [span ? `run ${span.number}` : run === "-" ? "" : run];
  if (step !== null) parts.push(`step ${step}`);
  if (attempt !== null) parts.push(`attempt ${attempt}`);
  return parts.filter(Boolean).join(" · ");
}
