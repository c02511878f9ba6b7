// One conversation, open: what its Chat knows is drawn, and what the person does becomes calls to the server.

import { activeRun, EMPTY, ended, newKey, Refused } from "@tapeline/client";
import type { Call, Chat, Connection, Decision, Run, State, Tapeline } from "@tapeline/client";

import { tick } from "./call.ts";
import type { Composer } from "./composer.ts";
import { find, keyed, setText } from "./dom.ts";
import { download } from "./download.ts";
import { reason } from "./problem.ts";
import { href } from "./route.ts";
import { markdownOf, runView, type RunActs } from "./run.ts";
import type { Follower } from "./scroll.ts";
import { keep, recall } from "./storage.ts";
import { sameTurn, turns, type Turn } from "./turn.ts";

const READ_OUT_CHARS_MAX = 4_000; // of a finished answer; the rest is on the page
const NEEDS_KEY = "It needs a key. Reload the page to be asked for one.";
const TICK_MS = 100;

/** What a conversation has around it. */
export interface Surroundings {
  tapeline: Tapeline;
  composer: Composer;
  follower: Follower;
  model(): string | undefined;
  announce(words: string): void;
  /** null: there is no connection, and none is wanted. */
  connected(connection: Connection | null): void;
  began(id: string, title: string): void;
  titled(id: string, title: string): void;
  gone(id: string): void;
}

export interface Conversation {
  state(): State;
  send(text: string): Promise<void>;
  stop(): Promise<void>;
  /** Tries to connect now. */
  refresh(): void;
  close(): void;
}

/** Said, and not on the tape as far as this page has read. It keeps its key when it is tried again. */
interface Saying {
  content: string;
  key: string;
  /** It is after this event. */
  after: number;
  replaces?: string;
  run?: string;
}

/** Opens `id`; "" begins a conversation with the first message. */
export function conversation(wanted: string, around: Surroundings): Conversation {
  const { tapeline, composer, follower, announce } = around;
  const runs = find("runs", HTMLElement);
  const pending = find("pending", HTMLElement);
  const welcome = find("welcome", HTMLElement);
  const missing = find("missing", HTMLElement);
  const id = wanted || newKey(); // made here, so that creating it can be repeated safely
  let created = Boolean(wanted);
  let chat: Chat | null = null;
  let state: State = EMPTY;
  let saying: Saying | null = kept();
  let sending = false;
  let closed = false;
  let frame = 0;
  const chosen = new Map<string, string>();
  const watched = new Set<string>(); // runs seen under way: their end is read out
  const asked = new Set<string>(); // calls whose waiting was read out
  let ticking: ReturnType<typeof setInterval> | undefined; // while a tool runs

  const acts: RunActs = { replace, choose, decide, download: fetchResult };
  const update = keyed<Turn, boolean>(runs, (turn) => turn.run.run, (turn) => runView(turn, acts), sameTurn);

  missing.hidden = true;
  composer.hide(false);
  composer.open(wanted);
  around.connected(null);
  follower.pin();
  if (created) read();
  render();

  function read(): void {
    chat = tapeline.chat(id);
    const heard = () => {
      if (chat!.state !== state) {
        state = chat!.state;
        if (state.title) around.titled(id, state.title);
        frame ||= requestAnimationFrame(render);
      }
      const { connection } = chat!;
      const { reason } = connection;
      if (state.deleted) refused(404, "");
      else if (connection.state === "lost" && reason instanceof Refused) refused(reason.status, reason.message);
      else around.connected(connection);
    };
    chat.subscribe(heard);
    heard();
  }

  function refused(status: number, words: string): void {
    const isGone = status === 404;
    if (isGone) around.gone(id);
    const title = `This conversation ${isGone ? "does not exist" : "cannot be read"}`;
    const why = isGone ? "It was deleted, or it is not yours to read." : status === 401 ? NEEDS_KEY : words;
    setText(find("missing-title", HTMLElement), title);
    setText(find("missing-text", HTMLElement), why);
    missing.hidden = false;
    composer.hide(true);
    around.connected(null);
    render();
  }

  // Saying something

  async function send(text: string): Promise<void> {
    try {
      await say(text);
    } catch (error) {
      if (closed) return; // the draft is kept
      composer.back(text);
      composer.say(error instanceof Error ? error.message : String(error));
    }
    if (!closed) composer.focus();
  }

  async function replace(run: Run, content: string): Promise<void> {
    await say(content, run.run);
    if (!closed) composer.focus(); // what had the focus is being replaced
  }

  /** Puts `content` on the tape. Rejects with what to tell the person; said again, it is the same message. */
  async function say(content: string, replaces?: string): Promise<void> {
    if (sending || saying?.run) throw new Error("Your last message is still on its way.");
    if (saying?.content !== content || saying.replaces !== replaces) {
      saying = { content, key: newKey(), after: state.last_event_id, ...(replaces ? { replaces } : {}) };
    }
    const said = saying;
    sending = true;
    chosen.clear(); // what is said follows the newest branch
    keep("session", `saying.${id}`, JSON.stringify(said));
    follower.pin();
    render();
    try {
      if (!created) await create(content);
      const model = around.model();
      const { run } = await tapeline.send(id, content, {
        key: said.key,
        ...(model ? { model } : {}),
        ...(replaces ? { replaces } : {}),
      });
      said.run = run;
      if (!replaces) composer.sent(id);
    } catch (error) {
      throw new Error(reason(error, "The server could not be reached. Your text is kept: try again."));
    } finally {
      sending = false;
      if (!closed) render();
    }
  }

  async function create(content: string): Promise<void> {
    try {
      await tapeline.create({ id });
    } catch (error) {
      if (!(error instanceof Refused && error.status === 409)) throw error; // 409: an earlier try, its answer lost
    }
    if (!closed) history.replaceState(null, "", href({ id, view: "chat" }));
    around.began(id, content.trim()); // until the tape says how it is called
    if (closed) return; // the person has gone elsewhere meanwhile
    created = true;
    composer.name(id);
    read();
  }

  async function stop(): Promise<void> {
    const run = activeRun(state);
    if (!run) return;
    composer.say("");
    try {
      await tapeline.stop(id, run.run); // may be said twice
    } catch (error) {
      composer.say(reason(error, "The server could not be reached, so it was not stopped. Try again."));
    }
  }

  async function decide(run: string, call: string, decision: Decision): Promise<void> {
    try {
      await tapeline.decide(id, run, call, decision);
    } catch (error) {
      throw new Error(reason(error, "The server could not be reached: nothing was decided. Try again."));
    }
  }

  /** A link could not say who is asking. */
  async function fetchResult(run: string, call: string): Promise<void> {
    composer.say("");
    try {
      download(`${call}.json`, await (await tapeline.result(id, run, call)).blob());
    } catch (error) {
      composer.say(reason(error, "The result could not be fetched whole. Try again."));
    }
  }

  function choose(turn: Turn, index: number): void {
    const { run } = turn.versions[index]!;
    chosen.set(turn.after, run);
    render();
    const node = runs.querySelector(`[data-run="${CSS.escape(run)}"] .versions button:enabled`);
    if (node instanceof HTMLElement) node.focus(); // the one that had it is gone
  }

  function kept(): Saying | null {
    const text = wanted && recall("session", `saying.${wanted}`);
    return text ? (JSON.parse(text) as Saying) : null;
  }

  // Drawing

  function render(): void {
    cancelAnimationFrame(frame);
    frame = 0;
    if (closed) return;
    const isMissing = !missing.hidden;
    const active = isMissing ? undefined : activeRun(state);
    if (saying && state.runs.some((run) => isSaid(run, saying!))) {
      if (!saying.replaces) composer.sent(id);
      keep("session", `saying.${id}`, "");
      saying = null;
    }
    const underway = saying && (sending || saying.run) ? saying : null;
    const shown = isMissing ? [] : turns(state.runs, chosen);
    const cut = shown.findIndex(({ run }) => run.run === underway?.replaces);
    update(shown, Boolean(active || underway));
    // Hidden, not gone: if it cannot be sent they are back, and what was being edited in them.
    for (const [at, node] of [...runs.children].entries()) (node as HTMLElement).hidden = cut >= 0 && at >= cut;
    const title = isMissing ? "Tapeline" : state.title || (created ? "Chat" : "New chat");
    setText(find("title", HTMLElement), title);
    document.title = created && state.title ? `${title} · Tapeline` : "Tapeline";
    document.documentElement.classList.toggle("writing", Boolean(active));
    keepTicking(Boolean(active && callsOf(active, "running").length));
    setText(pending, underway?.content ?? "");
    pending.hidden = !underway;
    welcome.hidden = created || isMissing || Boolean(underway);
    composer.show(Boolean(active), Boolean(underway));
    follower.grown();
    readOut();
  }

  function keepTicking(isOn: boolean): void {
    if (isOn) ticking ??= setInterval(() => tick(runs, chat?.serverNow() ?? 0), TICK_MS);
    else ticking = void clearInterval(ticking);
  }

  function readOut(): void {
    for (const run of state.runs) {
      if (!ended(run)) {
        if (!watched.has(run.run)) announce("Answering.");
        watched.add(run.run);
        const waiting = callsOf(run, "waiting").filter(({ call }) => !asked.has(call));
        if (waiting.length) announce(`Waiting for your approval: ${waiting.map(({ tool }) => tool).join(", ")}.`);
        for (const { call } of waiting) asked.add(call);
      } else if (watched.delete(run.run)) {
        const text = markdownOf(run).slice(0, READ_OUT_CHARS_MAX);
        announce(run.error ? `The answer failed. ${run.error.message}` : run.reason === "stopped" ? "Stopped." : text);
      }
    }
  }

  return {
    state: () => state,
    send,
    stop,
    refresh: () => chat?.refresh(),
    close() {
      closed = true;
      chat?.close();
      keepTicking(false);
      cancelAnimationFrame(frame);
      update([], false);
      document.documentElement.classList.remove("writing");
    },
  };
}

/** Whether `run` is what is being said: often the tape is here before the answer to the POST. */
function isSaid({ run, message }: Run, said: Saying): boolean {
  return run === said.run || (message.event_id > said.after && message.content === said.content);
}

function callsOf(run: Run, status: Call["status"]): Call[] {
  return run.steps.flatMap(({ calls }) => calls.filter((call) => call.status === status));
}
