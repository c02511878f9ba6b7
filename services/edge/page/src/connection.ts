// How the connection is: nothing is said while it is well, and soon again after it was not.

import { type Connection, Refused } from "@tapeline/client";

import { find, h, setText } from "./dom.ts";

const QUIET_MS = 2_500; // a shorter loss is nobody's business: the server asks for a wait of a second

/** Returns how to show a connection; null: there is none. `tryNow` is what the person can do about one that is lost. */
export function connectionLine(tryNow: () => void): (connection: Connection | null) => void {
  const node = find("connection", HTMLElement);
  const words = h("span");
  const again = h("button", { type: "button", onclick: tryNow }, "Try now");
  node.append(words);
  let quiet: ReturnType<typeof setTimeout> | undefined;
  let now: Connection | null = null;
  let wasLive = false;

  function show(): void {
    if (!now) return;
    setText(words, wordsOn(now, wasLive));
    if (now.state === "lost") node.append(again);
    else again.remove();
    node.dataset.state = now.state;
    node.hidden = false;
  }

  return (connection) => {
    now = connection;
    document.documentElement.dataset.connection = connection?.state ?? "none";
    if (!connection || connection.state === "live" || connection.state === "paused") {
      wasLive = connection !== null;
      clearTimeout(quiet);
      quiet = undefined;
      node.hidden = true;
    } else if (!node.hidden) show();
    else quiet ??= setTimeout(show, QUIET_MS);
  };
}

function wordsOn({ state, reason }: Connection, wasLive: boolean): string {
  if (state === "offline") return "Offline";
  if (state === "lost") return "The server cannot be reached.";
  if (reason instanceof Refused && reason.status < 500) return reason.message; // too many streams, say
  return wasLive ? "Reconnecting…" : "Connecting…";
}
