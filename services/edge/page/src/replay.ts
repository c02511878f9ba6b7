// The replay of a conversation for who has to know how it came about: its log on a timeline, what it looked like at
// any moment, every event as it is stored, and the log as a file.

import { Refused, type Tapeline } from "@tapeline/client";

import { h, setText } from "./dom.ts";
import { duration } from "./duration.ts";
import { eventRow } from "./event.ts";
import { CHARS_MAX, EVENTS_MAX, Log } from "./log.ts";
import { lastUpTo } from "./moment.ts";
import { player as makePlayer } from "./player.ts";
import { reason } from "./problem.ts";
import { count, number } from "./quantity.ts";
import { record as makeRecord } from "./record.ts";
import { type Rows, rows } from "./rows.ts";
import { type Chain, save } from "./save.ts";
import { scene as makeScene } from "./scene.ts";
import { lanes, strip } from "./strip.ts";
import { tabs as makeTabs } from "./tabs.ts";
import { type Attempt, type Execution, type Moment, timeline } from "./timeline.ts";
import { workRow } from "./work.ts";

const RUN_OPTIONS_MAX = 500; // of the newest runs to filter by
const BROKEN = "The server could not be reached, or broke off.";
const WIDE = "(min-width: 801px)"; // where the conversation is beside the lists, as in replay.css

/** Shows the replay of conversation `id` in `root`. Returns what takes it away again. */
export function replay(root: HTMLElement, tapeline: Tapeline, id: string): () => void {
  const leaving = new AbortController();
  const { signal } = leaving;
  const status = h("p.report", { role: "status" }, "Loading the log…");
  const body = h("div.body");
  const node = h("div.replay", {}, body, status);
  root.append(node);

  async function open(): Promise<void> {
    const log = new Log(tapeline, id);
    try {
      await log.load(signal, (events) => setText(status, `Loading the log… ${count(events, "event")} so far`));
    } catch (error) {
      if (signal.aborted) return;
      const again = h("button", { type: "button", onclick: () => void open() }, "Try again");
      const missing = error instanceof Refused && error.status === 404;
      setText(status, missing ? "There is no such conversation, or it is not yours to read." : reason(error, BROKEN));
      if (!missing) status.append(" ", again);
      return;
    }
    setText(status, "");
    show(body, log, signal, (text) => setText(status, text));
  }
  void open();
  return () => {
    leaving.abort();
    node.remove();
  };
}

function show(root: HTMLElement, log: Log, signal: AbortSignal, say: (text: string) => void): void {
  let shown = timeline(log.events, log.view);
  let work: Attempt | Execution | null = null; // chosen, and told of in the record
  let choosing: Attempt | Execution | null = null;
  let watching = new AbortController(); // for what comes meanwhile: one at a time
  let places: number[] = []; // of the moments that the filters leave
  let filtered: Moment[] = [];
  let listed: (Attempt | Execution)[] = [];

  const summary = h("p.summary");
  const newer = h("button.newer", { type: "button", hidden: "", onclick: () => void more() });
  const saving = h("button", { type: "button", onclick: () => void exported() }, "Export NDJSON");
  const notes = h("div.notes");
  const picture = h("div.picture");
  const player = makePlayer(() => {
    work = choosing; // whoever goes elsewhere has chosen none
    draw();
  });
  const scene = makeScene();
  const record = makeRecord();
  const eventRows: Rows<Moment> = rows("Events", (moment) => eventRow(moment, shown), (index) => player.go(places[index]!));
  const workRows: Rows<Attempt | Execution> = rows("Work", (one) => workRow(one, shown), (index) => choose(listed[index]!));
  const factsOnly = h("input", { type: "checkbox", onchange: filter });
  const ofEvents = h("label", {}, factsOnly, " Facts only");
  const runOnly = h("select", { "aria-label": "Run", onchange: filter });
  const found = h("span.found");
  const filters = h("div.filters", {}, ofEvents, h("label", {}, "Run ", runOnly), found);
  const events = h("div.panel", { role: "tabpanel", "aria-label": "Events" }, eventRows.node);
  const tools = h("div.panel", { role: "tabpanel", "aria-label": "Steps and tools" }, workRows.node);
  const panels = { Conversation: scene.node, Events: events, "Steps and tools": tools };
  const tabs = makeTabs("What to look at", panels, (panel) => {
    ofEvents.hidden = found.hidden = panel === tools;
    both.dataset["panel"] = panel === scene.node ? "conversation" : "log";
    draw();
  });
  const bench = h("div.bench", {}, filters, events, tools, record.node);
  const both = h("div.both", {}, scene.node, tabs.node, bench);
  root.append(
    h("div.top", {}, summary, newer, saving),
    notes,
    h("div.strip", {}, lanes(), h("div.tape", {}, picture, player.range)),
    player.node,
    both,
  );

  function draw(): void {
    const { place, at } = player;
    const moment = shown.moments[place];
    if (!moment) return;
    scene.show(log.film.after(place + 1), moment.ts + Math.max(0, at - moment.at));
    eventRows.show(filtered, places.length ? Math.max(0, lastUpTo(places, place, Number)) : -1);
    workRows.show(listed, work ? listed.indexOf(work) : lastUpTo(listed, place, ({ first }) => first));
    record.show(shown, place, log.json[place]!, work, !log.view);
  }

  function filter(): void {
    const run = runOnly.value;
    places = [];
    filtered = shown.moments.filter((moment, index) => {
      const isWanted = (moment.fact || !factsOnly.checked) && (!run || moment.run === run);
      if (isWanted) places.push(index);
      return isWanted;
    });
    listed = shown.work.filter((one) => !run || one.run === run);
    setText(found, filtered.length === shown.moments.length ? "" : `${number(filtered.length)} shown`);
    draw();
  }

  function choose(one: Attempt | Execution): void {
    choosing = one;
    player.go(one.kind === "attempt" ? one.last : one.first);
    choosing = null;
  }

  /** Tells what the whole log is, and goes on from where it was. */
  function survey(): void {
    const { moments, runs, takeovers, holes, unproven } = shown;
    const ms = Math.max(0, (moments.at(-1)?.ts ?? 0) - (moments[0]?.ts ?? 0));
    const proof =
      holes || log.view || log.cut ? "" : unproven ? " · not all proven" : " · complete: each event names the one before";
    const parts = [count(moments.length, "event"), count(runs.length, "run"), count(takeovers, "takeover"), duration(ms)];
    setText(summary, parts.join(" · ") + proof);
    const said: string[] = [];
    if (holes) said.push(`${count(holes, "hole")} in the log: events that were there are not.`);
    if (log.view) {
      said.push("Tokens have expired here, so these are the facts only; each step’s answer has its whole text.");
    }
    if (log.cut) {
      said.push(`This is the beginning: more than ${number(EVENTS_MAX)} events or ${number(CHARS_MAX / 1e6)} MB do not fit. The export has all.`);
    }
    notes.replaceChildren(...said.map((text) => h("p", {}, text)));
    picture.replaceChildren(strip(shown));
    const chosen = runOnly.value;
    const options = runs.map(({ run, number: nth, title }) => h("option", { value: run }, `${nth}. ${title.slice(0, 40)}`));
    runOnly.replaceChildren(h("option", { value: "" }, "All"), ...options.slice(-RUN_OPTIONS_MAX));
    runOnly.value = chosen;
    player.load(shown);
    filter();
  }

  /** Adds what has come since. */
  async function more(): Promise<void> {
    watching.abort();
    newer.disabled = true;
    try {
      await log.load(signal, () => {});
      say("");
    } catch (error) {
      if (signal.aborted) return;
      say(reason(error, BROKEN));
    }
    newer.disabled = false;
    newer.hidden = true;
    shown = timeline(log.events, log.view);
    survey();
    void watch();
  }

  /** Says how many events there are that are not here; not while nobody looks, for it takes a connection. */
  async function watch(): Promise<void> {
    watching.abort();
    if (log.cut || document.hidden || signal.aborted) return;
    watching = new AbortController();
    const { signal: enough } = watching;
    let come = 0;
    try {
      for await (const _ of log.tapeline.events(log.id, { after: log.last, signal: enough })) {
        come += 1;
        setText(newer, `Show ${count(come, "newer event")}`);
        newer.hidden = false;
      }
    } catch (error) {
      if (!enough.aborted) say(`What comes after this is not known: ${reason(error, BROKEN)}`);
    }
  }

  async function exported(): Promise<void> {
    saving.disabled = true;
    const name = `${log.id}${log.view ? "-facts" : ""}.ndjson`;
    try {
      const chain = await save(name, () => log.open(signal, 0), (events) => say(`Exporting… ${count(events, "event")}`));
      if (chain) say(`Exported ${count(chain.events, "event")} as ${name}. ${proven(chain, log.view)}`);
    } catch (error) {
      if (!signal.aborted) say(`Not exported: ${reason(error, BROKEN)}`);
    } finally {
      saving.disabled = false;
    }
  }

  survey();
  tabs.choose(events);
  void watch();
  document.addEventListener("visibilitychange", () => void watch(), { signal });
  const widened = ({ matches }: MediaQueryListEvent) => {
    if (matches && both.dataset["panel"] === "conversation") tabs.choose(events); // it is beside them now
  };
  matchMedia(WIDE).addEventListener("change", widened, { signal });
  signal.addEventListener("abort", () => {
    player.pause();
    watching.abort();
  });
}

function proven(chain: Chain, view: "compact" | undefined): string {
  if (view) return "Facts only: the tokens have expired, so the chain has gaps where they were.";
  if (!chain.breaks) return `Complete: each names the one before it, up to ${chain.last}.`;
  return `NOT complete: ${count(chain.breaks, "event")} does not follow the one before it.`;
}
