// How the connection is: nothing is said while it is well, and soon again after it was not.

import type { ConnectionState } from "@tapeline/client";

import { find, h, setText } from "./dom.ts";

const QUIET_MS = 1_000; // a shorter loss is nobody's business
const WORDS: Partial<Record<ConnectionState, string>> = { offline: "Offline", lost: "The server cannot be reached." };

/** Returns how to show a connection's state. `tryNow` is what the person can do about one that is lost. */
export function connectionLine(tryNow: () => void): (state: ConnectionState) => void {
  const node = find("connection", HTMLElement);
  const words = h("span");
  const again = h("button", { type: "button", onclick: tryNow }, "Try now");
  node.append(words);
  let quiet: ReturnType<typeof setTimeout> | undefined;
  let now: ConnectionState = "live";

  function show(): void {
    setText(words, WORDS[now] ?? "Reconnecting…");
    if (now === "lost") node.append(again);
    else again.remove();
    node.dataset.state = now;
    node.hidden = false;
  }

  return (state) => {
    now = state;
    document.documentElement.dataset.connection = state;
    if (state === "live" || state === "paused") {
      clearTimeout(quiet);
      quiet = undefined;
      node.hidden = true;
    } else if (!node.hidden) show();
    else quiet ??= setTimeout(show, QUIET_MS);
  };
}
