// The replay of a conversation for who has to know how it came about: its log on a timeline, what it looked like at
// any moment, every event as it is stored, and the log as a file.

import { Refused, type Tapeline } from "@tapeline/client";

import { escaped, visible } from "./bidi.ts";
import { h, keyed, setText } from "./dom.ts";
import { duration } from "./duration.ts";
import { Film } from "./film.ts";
import { CHARS_MAX, EVENTS_MAX, indented, lines, parsed, save } from "./log.ts";
import { type Rows, rows } from "./rows.ts";
import { lanes, strip } from "./strip.ts";
import { type Attempt, type Execution, type Logged, type Moment, type RunSpan, type Timeline } from "./timeline.ts";
import { brief, next, placeAt, timeline, written } from "./timeline.ts";
import { tick } from "./call.ts";
import { runView, type RunActs } from "./run.ts";
import { sameTurn, turns, type Turn } from "./turn.ts";

const RUNS_MAX = 20; // of the conversation on the page at once: the newest at that moment
const JSON_CHARS_MAX = 50_000; // of one event
const FRAMES_AT_MAX = 150; // in which the whole log passes at the greatest speed
const LEAP_MS_MAX = 250; // of the clock between two frames: a tab that was hidden goes on where it was
const LOAD_EVENTS = 2_000; // between two words on how far it is
const SPEEDS = [1, 2, 5, 20, Infinity];
const READ_ONLY = "This is a replay: nothing can be done in it.";

/** Shows the replay of conversation `id` in `root`. Returns what takes it away again. */
export function replay(root: HTMLElement, tapeline: Tapeline, id: string): () => void {
  const leaving = new AbortController();
  const { signal } = leaving;
  const status = h("p.report", { role: "status" }, "Loading the log…");
  const body = h("div.body");
  const node = h("div.replay", {}, body, status);
  root.append(node);
  let close = () => {};

  async function open(): Promise<void> {
    const log = new Log(tapeline, id);
    try {
      await log.load(signal, (events) => setText(status, `Loading the log… ${count(events, "event")} so far`));
    } catch (error) {
      if (signal.aborted) return;
      const again = h("button", { type: "button", onclick: () => void open() }, "Try again");
      const missing = error instanceof Refused && error.status === 404;
      setText(status, missing ? "There is no such conversation, or it is not yours to read." : reason(error));
      if (!missing) status.append(" ", again);
      return;
    }
    setText(status, "");
    close = player(body, log, signal, (text) => setText(status, text));
  }
  void open();
  return () => {
    leaving.abort();
    close();
    node.remove();
  };
}

/** The log as far as it is on the page. */
class Log {
  readonly film = new Film();
  readonly events: Logged[] = [];
  readonly json: string[] = [];
  view: "compact" | undefined;
  /** The page does not hold all of it. */
  cut = false;
  readonly tapeline: Tapeline;
  readonly id: string;
  #chars = 0;

  constructor(tapeline: Tapeline, id: string) {
    this.tapeline = tapeline;
    this.id = id;
  }

  get last(): number {
    return this.events.at(-1)?.id ?? 0;
  }

  /** Reads on to the end, after what is here. */
  async load(signal: AbortSignal, onEvents: (events: number) => void): Promise<void> {
    for await (const line of lines((await this.open(signal)).body!)) {
      this.cut = this.events.length >= EVENTS_MAX || this.#chars + line.length > CHARS_MAX;
      if (this.cut) return;
      const event = parsed(line);
      this.#chars += line.length;
      this.events.push(event);
      this.json.push(line);
      this.film.append(event);
      if (this.events.length % LOAD_EVENTS === 0) onEvents(this.events.length);
    }
    signal.throwIfAborted();
  }

  /** What is after `after`; facts only where deltas have expired. */
  async open(signal: AbortSignal, after = this.last): Promise<Response> {
    try {
      return await this.tapeline.export(this.id, { after, view: this.view, signal });
    } catch (error) {
      if (!(error instanceof Refused && error.code === "cursor_expired") || this.view) throw error;
      this.view = "compact";
      return this.tapeline.export(this.id, { after, view: this.view, signal });
    }
  }
}

function player(root: HTMLElement, log: Log, signal: AbortSignal, say: (text: string) => void): () => void {
  let shown: Timeline = timeline(log.events, log.view);
  let place = shown.moments.length - 1; // of the moment that is shown
  let at = shown.length_ms; // on the strip; between two moments while it plays
  let frame = 0; // of the animation while it plays
  let work: Attempt | Execution | null = null; // chosen, and told of in the record
  let pinned = true; // to the conversation's end
  let watching = new AbortController(); // for what comes meanwhile: one at a time

  // What is in it

  const summary = h("p.summary");
  const newer = h("button.newer", { type: "button", hidden: "", onclick: () => void more() });
  const saving = h("button", { type: "button", onclick: () => void exported() }, "Export NDJSON");
  const notes = h("div.notes");

  const picture = h("div.picture");
  const range = h("input", { type: "range", min: 0, step: "any", "aria-label": "Moment" });
  const playing = h("button.primary.play", { type: "button", onclick: () => (frame ? pause() : play()) });
  const speed = h(
    "select",
    { "aria-label": "Speed" },
    ...SPEEDS.map((times) => h("option", { value: times }, Number.isFinite(times) ? `${times}×` : "max")),
  );
  const clock = h("p.clock");
  const when = h("p.when");
  const fact = (direction: 1 | -1) => () => go(next(shown.moments, place, direction, (moment) => moment.fact));
  const transport = h(
    "div.transport",
    { role: "group", "aria-label": "Playing" },
    h("button", { type: "button", "aria-label": "Previous fact", onclick: fact(-1) }, "‹ Fact"),
    playing,
    h("button", { type: "button", "aria-label": "Next fact", onclick: fact(1) }, "Fact ›"),
    speed,
    clock,
    when,
  );

  const earlier = h("p.earlier");
  const runs = h("div.runs");
  const conversation = h(
    "div.panel.conversation",
    { role: "tabpanel", tabindex: "0", "aria-label": "The conversation at this moment" },
    earlier,
    runs,
  );
  const acts: RunActs = {
    replace: () => Promise.reject(new Error(READ_ONLY)),
    choose: () => {},
    decide: () => Promise.reject(new Error(READ_ONLY)),
    download: () => {},
  };
  const drawTurns = keyed<Turn, boolean>(runs, (turn) => turn.run.run, (turn) => runView(turn, acts), sameTurn);

  const factsOnly = h("input", { type: "checkbox" });
  const runOnly = h("select", { "aria-label": "Run" });
  const found = h("span.found");
  const eventRows: Rows<Moment> = rows("Events", eventRow, (index) => go(places[index]!));
  const record = h("div.record");
  const workRows: Rows<Attempt | Execution> = rows("Work", workRow, (index) => choose(listed[index]!));
  let places: number[] = []; // of the moments that the filters leave
  let filtered: Moment[] = [];
  let listed: (Attempt | Execution)[] = [];
  let begun: number[] = []; // where each of them did
  const filters = h(
    "div.filters",
    {},
    h("label", {}, factsOnly, " Facts only"),
    h("label", {}, "Run ", runOnly),
    found,
  );
  const events = h("div.panel", { role: "tabpanel", "aria-label": "Events" }, eventRows.node);
  const tools = h("div.panel", { role: "tabpanel", "aria-label": "Steps and tools" }, workRows.node);
  const panels = { Conversation: conversation, Events: events, "Steps and tools": tools };
  const tabs = Object.entries(panels).map(([name, panel]) =>
    h("button", { type: "button", role: "tab", "aria-selected": "false", onclick: () => turnTo(panel) }, name),
  );
  const tablist = h("div.tabs", { role: "tablist", "aria-label": "What to look at", onkeydown: turn }, ...tabs);
  const bench = h("div.bench", {}, filters, events, tools, record);
  const both = h("div.both", {}, conversation, tablist, bench);
  root.append(
    h("div.top", {}, summary, newer, saving),
    notes,
    h("div.strip", {}, lanes(), h("div.tape", {}, picture, range)),
    transport,
    both,
  );

  // The moment

  /** Shows the moment at `index`; `position` on the strip where that is between two. */
  function go(index: number, position = shown.moments[index]?.at ?? 0): void {
    place = index;
    at = position;
    draw();
  }

  function draw(): void {
    const moment = shown.moments[place];
    if (!moment) return;
    const all = turns(log.film.after(place + 1).runs, new Map());
    const current = all.slice(-RUNS_MAX).map((turn) => ({ ...turn, counts: false })); // nothing can be said in its place
    drawTurns(current, false);
    for (const fieldset of runs.querySelectorAll("fieldset")) fieldset.disabled = true;
    tick(runs, moment.ts + Math.max(0, at - moment.at));
    const hidden = all.length - current.length;
    setText(earlier, hidden ? `${count(hidden, "earlier run")} not shown: go back to see ${hidden > 1 ? "them" : "it"}.` : "");
    earlier.hidden = !hidden;
    if (pinned) conversation.scrollTop = conversation.scrollHeight;
    range.value = String(at);
    const where = `event ${number(place + 1)} of ${number(shown.moments.length)}`;
    range.setAttribute("aria-valuetext", `${offset(at)} of ${offset(shown.length_ms)}, ${where}, ${moment.type}`);
    setText(clock, `${offset(at)} / ${offset(shown.length_ms)}`);
    setText(when, `${where} · ${day(moment.ts)} ${time(moment.ts)}`);
    eventRows.show(filtered, places.length ? Math.max(0, lastUpTo(places, place)) : -1);
    workRows.show(listed, work ? listed.indexOf(work) : lastUpTo(begun, place));
    drawRecord(moment);
  }

  function play(): void {
    if (place >= shown.moments.length - 1) [place, at] = [0, 0];
    setText(playing, "Pause");
    let before = performance.now();
    const step = (now: number): void => {
      const times = Number(speed.value);
      const passed = Math.min(now - before, LEAP_MS_MAX);
      before = now;
      if (Number.isFinite(times)) at = Math.min(shown.length_ms, at + passed * times);
      else place = Math.min(shown.moments.length - 1, place + Math.ceil(shown.moments.length / FRAMES_AT_MAX));
      work = null;
      if (Number.isFinite(times)) go(placeAt(shown.moments, at), at);
      else go(place);
      if (place >= shown.moments.length - 1) pause();
      else frame = requestAnimationFrame(step);
    };
    frame = requestAnimationFrame(step);
  }

  function pause(): void {
    cancelAnimationFrame(frame);
    frame = 0;
    setText(playing, "Play");
  }

  conversation.addEventListener("scroll", () => {
    pinned = conversation.scrollHeight - conversation.scrollTop - conversation.clientHeight < 40;
  });
  range.addEventListener("input", () => {
    work = null;
    const position = Number(range.value);
    go(Math.max(0, placeAt(shown.moments, position)), position);
  });
  range.addEventListener("keydown", (key) => {
    const end = shown.moments.length - 1;
    const page = Math.max(1, Math.round(end / 20));
    const wanted: Record<string, number> = {
      ArrowRight: place + 1,
      ArrowUp: place + 1,
      ArrowLeft: place - 1,
      ArrowDown: place - 1,
      PageUp: place + page,
      PageDown: place - page,
      Home: 0,
      End: end,
    };
    const index = wanted[key.key];
    if (index !== undefined) {
      work = null;
      go(Math.max(0, Math.min(end, index)));
    } else if (key.key === " ") playing.click();
    else return;
    key.preventDefault();
  });

  // The lists

  function filter(): void {
    const run = runOnly.value;
    places = [];
    filtered = shown.moments.filter((moment, index) => {
      const isWanted = (moment.fact || !factsOnly.checked) && (!run || moment.run === run);
      if (isWanted) places.push(index);
      return isWanted;
    });
    listed = shown.work.filter((one) => !run || one.run === run);
    begun = listed.map(({ first }) => first);
    setText(found, filtered.length === shown.moments.length ? "" : `${number(filtered.length)} shown`);
    draw();
  }
  factsOnly.addEventListener("change", filter);
  runOnly.addEventListener("change", filter);

  function choose(one: Attempt | Execution): void {
    work = one;
    go(one.kind === "attempt" ? one.last : one.first);
  }

  function turnTo(panel: HTMLElement): void {
    for (const [index, one] of Object.values(panels).entries()) {
      const isChosen = one === panel;
      tabs[index]!.setAttribute("aria-selected", String(isChosen));
      tabs[index]!.tabIndex = isChosen ? 0 : -1;
      one.classList.toggle("chosen", isChosen);
    }
    both.dataset["panel"] = panel === conversation ? "conversation" : "log";
    if (pinned) conversation.scrollTop = conversation.scrollHeight;
    draw();
  }

  function turn(key: KeyboardEvent): void {
    const visible = tabs.filter((tab) => tab.offsetParent !== null);
    const index = visible.indexOf(document.activeElement as HTMLButtonElement);
    const step = { ArrowRight: 1, ArrowLeft: -1 }[key.key];
    if (step === undefined || index < 0) return;
    const tab = visible.at((index + step) % visible.length)!;
    tab.focus();
    tab.click();
  }

  function eventRow(moment: Moment): Node[] {
    const { type, id, hole, silence_ms, superseded_by, writer, worker } = moment;
    const where = whereabouts(moment, shown.runs);
    const text = visible(brief(moment));
    return [
      h(
        "div.line",
        {},
        h("span.seq", {}, String(id)),
        h(`span.type.${writer}`, {}, type),
        h(superseded_by === null ? "span.brief" : "s.brief", {}, text),
      ),
      h(
        "div.line.under",
        {},
        h("span.offset", {}, `+${offset(moment.ts - shown.moments[0]!.ts)}`),
        h("span.time", {}, time(moment.ts)),
        ...(superseded_by === null ? [] : [h("span.mark.superseded", {}, `superseded by attempt ${superseded_by}`)]),
        ...(silence_ms ? [h("span.mark", {}, `after ${duration(silence_ms)}`)] : []),
        ...(hole ? [h("span.mark.bad", {}, `hole: ${hole.after + 1} to ${hole.last}`)] : []),
        h("span.where", {}, [where, `${writer} ${worker}`.trim()].filter(Boolean).join(" · ")),
      ),
    ];
  }

  function workRow(one: Attempt | Execution): Node[] {
    const span = shown.runs.find(({ run }) => run === one.run);
    const from = shown.moments[span?.first ?? one.first]!.at;
    const whole = Math.max(1, shown.moments[span?.last ?? one.last]!.at - from);
    const x = (index: number) => ((shown.moments[index]!.at - from) / whole) * 100;
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

  // The record

  function drawRecord(moment: Moment): void {
    const own = work ?? (moment.superseded_by === null ? null : attemptOf(moment));
    const key = `${moment.id} ${work ? listed.indexOf(work) : ""}`;
    if (record.dataset["shown"] === key) return;
    record.dataset["shown"] = key;
    const json = escaped(indented(log.json[place]!));
    const parts: Node[] = [h("h2", {}, `Event ${moment.id}`), h("p.hint", {}, told(moment))];
    if (own?.kind === "attempt") {
      const { thinking, text } = written(shown.moments, own);
      const by = own.superseded_by === null ? "" : `, superseded by ${own.superseded_by}`;
      const body = h("div.written", {});
      if (thinking) body.append(h("p.thought", {}, thinking));
      body.append(h("p", {}, text || (log.view ? "Its text has expired." : "It wrote no text.")));
      const isOpen = work ? { open: "" } : {};
      const title = `What attempt ${own.attempt}${by} wrote`;
      parts.push(h("details.attempt-text", isOpen, h("summary", {}, title), body));
    }
    const more = json.length - JSON_CHARS_MAX;
    const cut = more > 0 ? `${json.slice(0, JSON_CHARS_MAX)}\n… ${number(more)} more characters: the export has them` : json;
    parts.push(h("pre", { tabindex: "0", "aria-label": `Event ${moment.id} as it is stored` }, cut));
    record.replaceChildren(...parts);
  }

  function attemptOf(moment: Moment): Attempt | null {
    const isIts = (one: Attempt | Execution): one is Attempt =>
      one.kind === "attempt" && one.run === moment.run && one.step === moment.step && one.attempt === moment.attempt;
    return shown.work.find(isIts) ?? null;
  }

  function told({ prev, hole, superseded_by, attempt, silence_ms }: Moment): string {
    const parts = [prev === null ? "Its writer did not say what it follows." : `Follows ${prev || "nothing: it is the first"}.`];
    if (hole) parts.push(`The log does not have what is between ${hole.after} and ${hole.last}.`);
    if (superseded_by !== null) parts.push(`Attempt ${attempt}, superseded by ${superseded_by}: it does not count.`);
    if (silence_ms) parts.push(`${duration(silence_ms)} after the event before.`);
    return parts.join(" ");
  }

  // The whole log

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
    range.max = String(shown.length_ms);
    const chosen = runOnly.value;
    const options = runs.map(({ run, number: nth, title }) => h("option", { value: run }, `${nth}. ${title.slice(0, 40)}`));
    runOnly.replaceChildren(h("option", { value: "" }, "All"), ...options.slice(-RUN_OPTIONS_MAX));
    runOnly.value = chosen;
  }

  /** Adds what has come since. */
  async function more(): Promise<void> {
    watching.abort();
    newer.disabled = true;
    const wasAtEnd = place === shown.moments.length - 1;
    try {
      await log.load(signal, () => {});
      say("");
    } catch (error) {
      if (signal.aborted) return;
      say(reason(error));
    }
    newer.disabled = false;
    newer.hidden = true;
    shown = timeline(log.events, log.view);
    work = null;
    survey();
    if (wasAtEnd) [place, at] = [shown.moments.length - 1, shown.length_ms];
    filter();
    void watch();
  }

  /** Says how many events there are that are not here; not while nobody looks, for it takes a connection. */
  async function watch(): Promise<void> {
    watching.abort();
    if (log.cut || document.hidden) return;
    watching = new AbortController();
    const { signal } = watching;
    let come = 0;
    try {
      for await (const _ of log.tapeline.events(log.id, { after: log.last, signal })) {
        come += 1;
        setText(newer, `Show ${count(come, "newer event")}`);
        newer.hidden = false;
      }
    } catch (error) {
      if (!signal.aborted) say(`What comes after this is not known: ${reason(error)}`);
    }
  }

  async function exported(): Promise<void> {
    saving.disabled = true;
    const name = `${log.id}${log.view ? "-facts" : ""}.ndjson`;
    try {
      const chain = await save(name, () => log.open(signal, 0), (events) => say(`Exporting… ${count(events, "event")}`));
      if (chain) say(`Exported ${count(chain.events, "event")} as ${name}. ${proven(chain, log.view)}`);
    } catch (error) {
      if (!signal.aborted) say(`Not exported: ${reason(error)}`);
    } finally {
      saving.disabled = false;
    }
  }

  setText(playing, "Play");
  survey();
  filter();
  turnTo(events);
  void watch();
  document.addEventListener("visibilitychange", () => void watch(), { signal });
  return () => {
    pause();
    watching.abort();
  };
}

const RUN_OPTIONS_MAX = 500; // of the newest runs to filter by

function proven(chain: { breaks: number; last: number }, view: "compact" | undefined): string {
  if (view) return "Facts only: the tokens have expired, so the chain has gaps where they were.";
  if (!chain.breaks) return `Complete: each names the one before it, up to ${chain.last}.`;
  return `NOT complete: ${count(chain.breaks, "event")} does not follow the one before it.`;
}

function whereabouts({ run, step, attempt }: Moment, spans: readonly RunSpan[]): string {
  const span = spans.find((one) => one.run === run);
  const parts = [span ? `run ${span.number}` : run === "-" ? "" : run];
  if (step !== null) parts.push(`step ${step}`);
  if (attempt !== null) parts.push(`attempt ${attempt}`);
  return parts.filter(Boolean).join(" · ");
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

/** The index of the last of these, which grow, that is no more than `value`; -1: there is none. */
function lastUpTo(values: readonly number[], value: number): number {
  let [low, high] = [0, values.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle]! <= value) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

/** 75300 → "1:15.3". */
function offset(ms: number): string {
  const tenths = Math.floor(Math.max(0, ms) / 100); // a clock may be behind the first one
  const [minutes, rest] = [Math.floor(tenths / 600), tenths % 600];
  const seconds = `${String(Math.floor(rest / 10)).padStart(2, "0")}.${rest % 10}`;
  if (minutes < 60) return `${minutes}:${seconds}`;
  return `${Math.floor(minutes / 60)}:${String(minutes % 60).padStart(2, "0")}:${seconds}`;
}

const DAY = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium" });
const TIME = new Intl.DateTimeFormat("en-GB", {
  hour: "2-digit",
  minute: "2-digit",
  second: "2-digit",
  fractionalSecondDigits: 3,
});
const day = (ts: number) => DAY.format(ts);
const time = (ts: number) => TIME.format(ts);
const number = (value: number) => value.toLocaleString("en");

function count(value: number, what: string): string {
  return `${number(value)} ${what}${value === 1 ? "" : "s"}`;
}

function reason(error: unknown): string {
  return error instanceof Refused ? error.message : "The server could not be reached, or broke off.";
}
