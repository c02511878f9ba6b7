// The page: its parts, and who tells whom.

import { fromSnapshot, Tapeline } from "@tapeline/client";

import { composer as makeComposer } from "./composer.ts";
import { connectionLine } from "./connection.ts";
import { conversation, type Conversation } from "./conversation.ts";
import { find, h, setText } from "./dom.ts";
import { drawer } from "./drawer.ts";
import { icon } from "./icon.ts";
import { bearer } from "./key.ts";
import { modelChoice } from "./model.ts";
import { href, parse } from "./route.ts";
import { follower as makeFollower } from "./scroll.ts";
import { sidebar as makeSidebar } from "./sidebar.ts";
import { themeSwitch } from "./theme.ts";

const IDEAS = [
  "Run three tools in parallel",
  "Work in steps: the time, then 12 * 34",
  "Write a long 300 word story",
  "What if a tool should fail?",
  "Draw lots, with my approval",
];

const tapeline = new Tapeline({ url: ".", token: bearer });
const announcement = find("announcement", HTMLElement);
const scroll = find("scroll", HTMLElement);
const replay = find("replay", HTMLElement);
const toReplay = find("to-replay", HTMLAnchorElement);
const toChat = find("to-chat", HTMLAnchorElement);

let current: Conversation | null = null;
let closeReplay: () => void = () => {};

const composer = makeComposer({
  send: (text) => void current?.send(text),
  stop: () => void current?.stop(),
});
const follower = makeFollower(scroll, find("latest", HTMLButtonElement));
const sidebar = makeSidebar(tapeline, (id) => {
  if (id === here().id) fresh();
});
const side = drawer();
const connected = connectionLine(() => current?.refresh());
const model = modelChoice(find("model", HTMLSelectElement), tapeline);

const here = () => parse(location.hash);

function open(): void {
  const { id, view } = here();
  const isReplay = view === "replay";
  current?.close();
  current = null;
  closeReplay();
  closeReplay = () => {};
  side.close();
  sidebar.mark(id);
  replay.hidden = toChat.hidden = !isReplay;
  scroll.hidden = isReplay;
  showReplayLink(isReplay ? "" : id);
  toChat.href = href({ id, view: "chat" });
  if (isReplay) {
    composer.hide(true);
    connected(null);
    setText(find("title", HTMLElement), "Replay");
    void openReplay(id);
  } else {
    current = conversation(id, {
      tapeline,
      composer,
      follower,
      model,
      announce: (words) => announcement.replaceChildren(h("span", {}, words)), // the same words once more, too
      connected,
      began(id, title) {
        sidebar.began(id, title);
        if (here().id !== id) return;
        sidebar.mark(id);
        showReplayLink(id);
      },
      titled: sidebar.titled,
      gone: sidebar.gone,
    });
    if (!id) composer.focus();
  }
}

/** What audits is not loaded before somebody wants it. */
async function openReplay(id: string): Promise<void> {
  let show: (root: HTMLElement) => () => void;
  try {
    const { replay } = await import("./replay.ts");
    show = (root) => replay(root, tapeline, id);
  } catch {
    show = notLoaded;
  }
  const { id: wanted, view } = here();
  if (wanted === id && view === "replay") closeReplay = show(replay);
}

/** The file is not there: no network, or a deployment that has a newer one. Loading all of it anew helps in both. */
function notLoaded(root: HTMLElement): () => void {
  const again = h("button", { type: "button", onclick: () => location.reload() }, "Try again");
  const node = h("div.replay", {}, h("p.report", { role: "alert" }, "The replay could not be loaded. ", again));
  root.append(node);
  return () => node.remove();
}

function showReplayLink(id: string): void {
  toReplay.hidden = !id;
  toReplay.href = href({ id, view: "replay" });
}

/** At once, and not when the browser gets round to `hashchange`: the next key may be the first of a message. */
function fresh(): void {
  if (location.hash) history.pushState(null, "", location.pathname + location.search);
  open();
  composer.focus();
}

const isMac = /Mac|iPhone|iPad/.test(navigator.userAgent);
const fresher = find("new", HTMLButtonElement);
fresher.prepend(icon("new"));
fresher.append(h("kbd", {}, isMac ? "⌘ K" : "Ctrl K"));
fresher.addEventListener("click", fresh);
find("missing-new", HTMLButtonElement).addEventListener("click", fresh);
find("send", HTMLButtonElement).append(icon("send"));
toReplay.prepend(icon("replay"));
toChat.prepend(icon("back"));
themeSwitch(find("theme", HTMLElement));
find("ideas", HTMLElement).append(
  ...IDEAS.map((idea) => h("li", {}, h("button", { type: "button", onclick: () => void current?.send(idea) }, idea))),
);
find("home", HTMLAnchorElement).addEventListener("click", (click) => {
  click.preventDefault();
  fresh();
});
find("skip", HTMLAnchorElement).addEventListener("click", (click) => {
  click.preventDefault(); // the hash is the route's
  find("content", HTMLTextAreaElement).focus();
});
document.addEventListener("keydown", (key) => {
  if (key.key.toLowerCase() === "k" && (key.ctrlKey || key.metaKey) && !key.shiftKey && !key.altKey) {
    key.preventDefault();
    fresh();
  }
});
window.addEventListener("hashchange", open);
for (const back of ["focus", "online"]) window.addEventListener(back, () => void sidebar.refresh());

declare global {
  interface Window {
    /** What the open conversation is, for tests and the curious. */
    tapeline: { current(): unknown; fromSnapshot: typeof fromSnapshot };
  }
}
window.tapeline = { current: () => current?.state(), fromSnapshot };

open();
void sidebar.refresh();
