// The timeline as a picture, one lane for runs, one for the model's attempts, some for tools, one for how many events
// there were. It shows what the lists beside it say in words.

import { h } from "./dom.ts";
import type { Timeline } from "./timeline.ts";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 1_000; // units; the picture is stretched
const TOOL_LANES = 3;
const LANES = { run: [0, 16], model: [22, 14], tool: [42, 8], density: [74, 22] } as const;
const HEIGHT = 96;
const BINS = 200;

export function strip({ moments, runs, work, length_ms }: Timeline): SVGSVGElement {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const x = (place: number) => ((moments[place]?.at ?? 0) / (length_ms || 1)) * WIDTH;
  const drawn = new Map<number, number>(); // how far each lane is drawn: what could not be seen is left out

  function bar(kind: string, lane: number, height: number, from: number, to: number): void {
    if (to <= (drawn.get(lane) ?? -1)) return;
    drawn.set(lane, Math.max(from + 1, to));
    const rect = document.createElementNS(SVG, "rect");
    rect.setAttribute("class", kind);
    for (const [name, value] of Object.entries({ x: from, y: lane, width: Math.max(1, to - from), height })) {
      rect.setAttribute(name, value.toFixed(1));
    }
    svg.append(rect);
  }

  const bins = new Array<number>(BINS).fill(0);
  for (const moment of moments) {
    const bin = Math.min(BINS - 1, Math.floor((moment.at / (length_ms || 1)) * BINS));
    bins[bin]! += 1;
  }
  const most = Math.max(1, ...bins);
  const [floor, tall] = [LANES.density[0] + LANES.density[1], LANES.density[1]];
  const step = WIDTH / BINS;
  const columns = bins.map((count, bin) =>
    count ? `M${bin * step} ${floor}v${(-tall * Math.sqrt(count / most)).toFixed(1)}h${step * 0.8}V${floor}z` : "",
  );
  const density = document.createElementNS(SVG, "path");
  density.setAttribute("class", "density");
  density.setAttribute("d", columns.join(""));
  svg.append(density);

  for (const { first, last, failed, number } of runs) {
    bar(`run ${failed ? "failed" : number % 2 ? "odd" : "even"}`, ...LANES.run, x(first), x(last));
  }
  const free: number[] = new Array<number>(TOOL_LANES).fill(-1); // where each lane of tools is empty from
  for (const one of work) {
    if (one.kind === "attempt") {
      const kind = one.superseded_by === null ? "attempt" : "attempt superseded";
      bar(kind, ...LANES.model, x(one.first), x(one.last));
      continue;
    }
    const [from, to] = [x(one.first), x(one.last)];
    const found = free.findIndex((end) => end < from);
    const lane = found < 0 ? TOOL_LANES - 1 : found;
    free[lane] = to;
    const y = LANES.tool[0] + lane * (LANES.tool[1] + 2);
    if (one.started !== null) bar("queue", y, LANES.tool[1], from, x(one.started));
    const kind = one.outcome === "ok" ? "execution" : "execution failed";
    bar(kind, y, LANES.tool[1], one.started === null ? from : x(one.started), to);
  }
  let marked = -1;
  for (const [place, { hole, silence_ms }] of moments.entries()) {
    if (!(hole || silence_ms) || x(place) < marked + 1) continue;
    marked = x(place);
    const mark = document.createElementNS(SVG, "path");
    mark.setAttribute("class", hole ? "hole" : "silence");
    mark.setAttribute("d", `M${marked.toFixed(1)} 0V${HEIGHT}`);
    svg.append(mark);
  }
  return svg;
}

/** Its lanes' names, beside it. */
export function lanes(): HTMLElement {
  return h("div.lanes", { "aria-hidden": "true" }, h("span", {}, "Runs"), h("span", {}, "Model"), h("span", {}, "Tools"), h("span", {}, "Events"));
}
