// The page: wires what is said to the API, what comes from it to the state, and the state to the views.

import { EMPTY, activeRun, fromSnapshot, reduce } from "./state.js";
import { Refused, STALE_MS, follow } from "./stream.js";
import { keyed, h, runView, tick } from "./views.js";

const QUIET_MS = 1_000; // a shorter loss of connection is nobody's business
const HIDDEN_MS = 60_000; // a tab hidden for longer gives its connection back: browsers allow six to a host
const BOTTOM_PX = 48; // this close to the end counts as reading along
const RECENT_MAX = 30;
const TITLE_CHARS_MAX = 60;
const IDEAS = [
  "Run three tools in parallel",
  "Work in steps: the time, then 12 * 34",
  "Write a long 300 word story",
  "What if a tool should fail?",
];

const $ = (id) => document.getElementById(id);
const composer = $("composer");
const content = $("content");
const scroll = $("scroll");

let state = EMPTY;
let id = ""; // the conversation's; made here, so that creating it can be repeated safely
let created = false; // the server has it
let reader = null; // follows it
let pending = null; // said, and not on the tape as far as this page has read; keeps its key when it is tried again
let sending = false;
let clock = 0; // how far this device's clock is ahead of the server's, ms

/** The conversation as this page knows it; for tests and the curious. */
export const current = () => state;

// The key, where the deployment wants one

const KEY = "tapeline.key";
let asking = null;

function headers() {
  const key = recall(sessionStorage, KEY);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** Asked when `sent` was refused: gets another key from the person; false: there is none. */
function authorize(sent) {
  const known = headers().Authorization;
  if (known && known !== sent.Authorization) return Promise.resolve(true); // a newer one has come meanwhile
  asking ??= new Promise((resolve) => {
    const dialog = $("key");
    $("key-note").textContent = sent.Authorization
      ? "That key was not accepted. Please check it."
      : "It is sent as a bearer token and kept until you close this tab.";
    $("key-form").onsubmit = (submit) => {
      submit.preventDefault();
      keep(sessionStorage, KEY, $("key-value").value.trim());
      dialog.close("ok");
    };
    $("key-cancel").onclick = () => dialog.close("");
    dialog.onclose = () => {
      asking = null;
      $("key-value").value = "";
      resolve(dialog.returnValue === "ok");
    };
    dialog.returnValue = "";
    dialog.showModal();
  });
  return asking;
}

/** POSTs JSON and returns the answer's. Throws `Refused`, or what fetch throws where there is no server. */
async function post(path, body, extra = {}) {
  for (;;) {
    const sent = headers();
    const response = await fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/json", Accept: "application/json", ...extra, ...sent },
      body: JSON.stringify(body),
    });
    if (response.ok) return response.json().catch(() => ({}));
    if (response.status !== 401 || !(await authorize(sent))) throw await Refused.from(response);
  }
}

// Conversations

function open(wanted) {
  reader?.stop();
  reader = null;
  state = EMPTY;
  pending = null;
  id = wanted || newId();
  created = Boolean(wanted);
  clock = 0;
  $("missing").hidden = true;
  composer.hidden = false;
  say("");
  showConnection("live");
  drawer(false);
  pinned = true;
  if (created) read();
  render();
  if (!created) content.focus();
}

function read() {
  reader = follow({
    url: `v1/conversations/${encodeURIComponent(id)}`,
    headers,
    authorize,
    onState: showConnection,
    onSnapshot(snapshot, serverMs) {
      state = fromSnapshot(snapshot);
      if (state.title) remember(id, state.title);
      if (serverMs) clock = Date.now() - serverMs;
      schedule();
    },
    onEvent(event) {
      state = reduce(state, event);
      clock = Math.min(clock, Date.now() - event.ts); // the quickest event has the best idea of it
      schedule();
    },
    onEnd(refused) {
      if (refused.status === 404) forget(id);
      const [title, text] =
        refused.status === 404
          ? ["This conversation does not exist", "It was deleted, or it is not yours to read."]
          : ["This conversation cannot be read", refused.message];
      $("missing-title").textContent = title;
      $("missing-text").textContent = text;
      $("missing").hidden = false;
      composer.hidden = true;
      showConnection("live");
      render();
    },
  });
}

function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

// Saying something

async function send(text) {
  if (sending || pending?.run || !text.trim()) return;
  if (activeRun(state)) {
    say("An answer is under way. Stop it first, or wait for its end.");
    return;
  }
  if (pending?.content !== text) pending = { content: text, key: newId(), after: state.last_event_id, run: null };
  const said = pending;
  const where = id;
  sending = true;
  pinned = true;
  say("");
  if (content.value === text) setContent("");
  render();
  try {
    if (!created) await create(where, text);
    const answer = await post(
      `v1/conversations/${where}/messages`,
      { content: text },
      { "Idempotency-Key": said.key },
    );
    said.run = answer.run ?? "";
  } catch (error) {
    if (id !== where) return;
    if (!content.value) setContent(text);
    say(reason(error));
  } finally {
    sending = false;
    render();
    if (matchMedia("(pointer: fine)").matches) content.focus();
  }
}

async function create(where, text) {
  const title = text.trim().replace(/\s+/g, " ").slice(0, TITLE_CHARS_MAX);
  try {
    await post("v1/conversations", { id: where, title });
  } catch (error) {
    if (error.status !== 409) throw error; // an earlier try, whose answer was lost
  }
  remember(where, title);
  if (id !== where) return; // the person has gone elsewhere meanwhile
  created = true;
  history.replaceState(null, "", `#${where}`);
  showRecent();
  read();
}

async function stop() {
  const run = activeRun(state);
  if (!run) return;
  say("");
  try {
    await post(`v1/conversations/${id}/runs/${encodeURIComponent(run.run)}/stop`, {}); // may be said twice
  } catch (error) {
    say(error instanceof Refused ? error.message : "The server could not be reached: not stopped.");
  }
}

function reason(error) {
  if (!(error instanceof Refused)) return "The server could not be reached. Your text is kept: try again.";
  if (error.code === "busy") return "Another answer is under way. Your text is kept: send it when that has ended.";
  const again = error.retryAfterMs ? ` Try again in ${Math.ceil(error.retryAfterMs / 1_000)} s.` : "";
  return error.message + again;
}

function say(problem) {
  $("problem").textContent = problem;
  $("problem").hidden = !problem;
}

// Drawing

const updateRuns = keyed($("runs"), (run) => run.run, (run) => runView(run, { retry: send }));
let scheduled = false;
let pinned = true; // the reader is at the end and wants to stay there

function schedule() {
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => {
    scheduled = false;
    render();
  });
}

function render() {
  const isMissing = !$("missing").hidden;
  const active = isMissing ? undefined : activeRun(state);
  if (pending && state.runs.some(isPending)) pending = null;
  updateRuns(isMissing ? [] : state.runs, "");
  const title = isMissing ? "Tapeline" : state.title || (created ? "Chat" : "New chat");
  $("title").textContent = title;
  document.title = created && state.title ? `${title} · Tapeline` : "Tapeline";
  $("pending").textContent = pending?.content ?? "";
  $("pending").hidden = !pending || !(sending || pending.run);
  $("welcome").hidden = created || isMissing || !$("pending").hidden;
  showButtons(active);
  if (pinned) scroll.scrollTop = scroll.scrollHeight;
  $("latest").hidden = pinned;
}

/** Whether `run` is what is pending: often the tape is here before the answer to the POST. */
function isPending({ run, message }) {
  return run === pending.run || (message.event_id > pending.after && message.content === pending.content);
}

function showButtons(active) {
  const hadFocus = document.activeElement === $("stop");
  $("stop").hidden = !active;
  $("send").hidden = Boolean(active);
  $("send").disabled = sending || Boolean(pending?.run);
  if (hadFocus && !active) content.focus();
}

let quiet = null;

/** Says so when there is no connection, but not before QUIET_MS. */
function showConnection(connection) {
  const node = $("connection");
  document.documentElement.dataset.connection = connection;
  if (connection === "live" || connection === "paused") {
    clearTimeout(quiet);
    quiet = null;
    node.hidden = true;
  } else {
    quiet ??= setTimeout(() => {
      node.textContent = navigator.onLine ? "Reconnecting…" : "Offline. Reconnecting…";
      node.hidden = false;
    }, QUIET_MS);
  }
}

setInterval(() => tick($("runs"), Date.now() - clock), 100);

scroll.addEventListener("scroll", () => {
  pinned = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < BOTTOM_PX;
  $("latest").hidden = pinned;
});
new ResizeObserver(() => {
  if (pinned) scroll.scrollTop = scroll.scrollHeight;
}).observe(scroll);
$("latest").addEventListener("click", () => {
  pinned = true;
  render();
});

// The composer

function setContent(text) {
  content.value = text;
  fit();
}

function fit() {
  content.style.height = "auto";
  content.style.height = `${content.scrollHeight}px`;
}

composer.addEventListener("submit", (submit) => {
  submit.preventDefault();
  send(content.value);
});
content.addEventListener("input", () => {
  fit();
  if (!sending) say("");
});
content.addEventListener("keydown", (key) => {
  if (key.key === "Enter" && !key.shiftKey && !key.isComposing) {
    key.preventDefault();
    send(content.value);
  } else if (key.key === "Escape") {
    if ($("stop").hidden) content.blur();
    else $("stop").focus();
  }
});
$("stop").addEventListener("click", stop);
for (const idea of IDEAS) {
  $("ideas").append(h("li", {}, h("button", { type: "button", onclick: () => send(idea) }, idea)));
}

// Recent conversations, on this device only: the server keeps them, the list is a convenience

const RECENT = "tapeline.recent";

function recent() {
  try {
    const list = JSON.parse(recall(localStorage, RECENT) ?? "[]");
    return list.filter((entry) => typeof entry?.id === "string" && typeof entry.title === "string");
  } catch {
    return [];
  }
}

function remember(id, title) {
  const list = recent();
  const known = list.find((entry) => entry.id === id);
  if (known?.title !== title) {
    const entry = { id, title };
    const next = known ? list.map((other) => (other.id === id ? entry : other)) : [entry, ...list];
    keep(localStorage, RECENT, JSON.stringify(next.slice(0, RECENT_MAX)));
  }
  showRecent();
}

function forget(id) {
  keep(localStorage, RECENT, JSON.stringify(recent().filter((entry) => entry.id !== id)));
  showRecent();
}

const updateRecent = keyed($("recent"), (entry) => entry.id, () => {
  const link = h("a");
  const update = (entry) => {
    link.href = `#${entry.id}`;
    link.title = link.textContent = entry.title;
    if (entry.id === id) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  };
  return { node: h("li", {}, link), update };
});

function showRecent() {
  const list = recent();
  updateRecent(list, id);
  $("recent-title").hidden = !list.length;
}

/** Storage can be forbidden or full: then nothing is kept, and that is all. */
function recall(storage, key) {
  try {
    return storage.getItem(key);
  } catch {
    return null;
  }
}

function keep(storage, key, value) {
  try {
    storage.setItem(key, value);
  } catch {
    // Not kept.
  }
}

// The page around it

function drawer(isOpen) {
  $("drawer").classList.toggle("open", isOpen);
  $("shade").hidden = !isOpen;
  $("menu").setAttribute("aria-expanded", String(isOpen));
  $("main").inert = isOpen;
  if (isOpen) $("new").focus();
}

function fresh() {
  if (location.hash) location.hash = "";
  else open("");
}

function route() {
  open(location.hash.slice(1));
  showRecent();
}

$("new").addEventListener("click", fresh);
$("missing-new").addEventListener("click", fresh);
$("menu").addEventListener("click", () => drawer(true));
$("shade").addEventListener("click", () => drawer(false));
document.addEventListener("keydown", (key) => {
  if (key.key === "Escape" && $("drawer").classList.contains("open")) {
    drawer(false);
    $("menu").focus();
  }
});
matchMedia("(max-width: 800px)").addEventListener("change", () => drawer(false));
$("recent").addEventListener("click", () => drawer(false));

window.addEventListener("hashchange", route);
window.addEventListener("online", () => reader?.refresh(0));
window.addEventListener("storage", (change) => {
  if (change.key === RECENT) showRecent();
});
let hidden = null;
document.addEventListener("visibilitychange", () => {
  clearTimeout(hidden);
  if (document.hidden) hidden = setTimeout(() => reader?.pause(), HIDDEN_MS);
  else reader?.refresh(STALE_MS);
});

route();
