// What a conversation looked like at a moment of its log. It can be looked at, and nothing can be done in it.

import type { State } from "@tapeline/client";

import { tick } from "./call.ts";
import { h, keyed, setText } from "./dom.ts";
import { count } from "./quantity.ts";
import { type RunActs, runView } from "./run.ts";
import { sameTurn, type Turn, turns } from "./turn.ts";

const RUNS_MAX = 20; // on the page at once: the newest at that moment
const END_PX = 40; // this close to the end, it follows
const READ_ONLY = "This is a replay: nothing can be done in it.";

const ACTS: RunActs = {
  replace: () => Promise.reject(new Error(READ_ONLY)),
  choose: () => {},
  decide: () => Promise.reject(new Error(READ_ONLY)),
  download: () => {},
};

export interface Scene {
  readonly node: HTMLElement;
  /** Shows `state` as it was at `ts`, ms since the epoch. */
  show(state: State, ts: number): void;
}

export function scene(): Scene {
  const earlier = h("p.earlier");
  const runs = h("div.runs");
  const about = { role: "tabpanel", tabindex: "0", "aria-label": "The conversation at this moment" };
  const node = h("div.panel.conversation", about, earlier, runs);
  const draw = keyed<Turn, boolean>(runs, (turn) => turn.run.run, (turn) => runView(turn, ACTS), sameTurn);
  let pinned = true; // to its end
  const follow = () => {
    if (pinned) node.scrollTop = node.scrollHeight;
  };
  node.addEventListener("scroll", () => {
    if (node.clientHeight) pinned = node.scrollHeight - node.scrollTop - node.clientHeight < END_PX;
  });
  new ResizeObserver(follow).observe(node); // another tab was shown before
  return {
    node,
    show(state, ts) {
      const all = turns(state.runs, new Map());
      const current = all.slice(-RUNS_MAX).map((turn) => ({ ...turn, counts: false })); // nothing can be said in its place
      draw(current, false);
      for (const fieldset of runs.querySelectorAll("fieldset")) fieldset.disabled = true;
      tick(runs, ts);
      const hidden = all.length - current.length;
      const words = `${count(hidden, "earlier run")} not shown: go back to see ${hidden > 1 ? "them" : "it"}.`;
      setText(earlier, hidden ? words : "");
      earlier.hidden = !hidden;
      follow();
    },
  };
}
