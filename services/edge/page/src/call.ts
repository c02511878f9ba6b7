// How a tool call looks: what it was given, how far it is, what it puts out, and what came of it.

import type { Call, CallPhase, Decision } from "@tapeline/client";

import { approvalForm } from "./approval.ts";
import { visible } from "./bidi.ts";
import { h, setText, type View } from "./dom.ts";
import { duration, seconds } from "./duration.ts";

const VALUE_CHARS_MAX = 20_000; // of one call's arguments or result on the page; the tape has all of it
const BRIEF_CHARS_MAX = 240;
const FOLLOW_PX = 8; // a box scrolled to its end, or nearly, stays there as it grows

export interface CallActs {
  /** Rejects with what to tell the person. */
  decide(call: string, decision: Decision): Promise<void>;
  /** Saves all that the call returned. */
  download(call: string): void;
}

/** The view of the call with this id; its context is whether its run is under way. */
export function callView(id: string, acts: CallActs): View<Call, boolean> {
  const tool = h("code.tool");
  const status = h("span.status");
  const elapsed = h("span.elapsed");
  const given = h("span.given");
  const bar = h("progress", { max: 1, "aria-label": "Progress" });
  const said = h("span.said");
  const progress = h("div.progress", {}, bar, said);
  const output = h("pre.output", { tabindex: 0, "aria-label": "Output" });
  const outcome = h("span.outcome");
  const args = h("pre", { tabindex: 0, "aria-label": "Arguments" });
  const result = h("pre", { tabindex: 0, "aria-label": "Result" });
  const argsTitle = h("h3", {}, "Arguments");
  const resultTitle = h("h3");
  const whole = h("button.whole", { type: "button", onclick: () => acts.download(id) });
  const verdict = h("p.verdict");
  const details = h("div.details", {}, argsTitle, args, verdict, resultTitle, result, whole);
  const summary = h("summary", {}, h("span.line", {}, h("span.sign"), tool, given, status, elapsed), outcome);
  const card = h("details.card", {}, summary, details);
  const node = h("div.call", {}, card, progress, output);
  let form: HTMLElement | null = null; // while a decision is waited for

  function update(call: Call, live: boolean): void {
    const [look, label] = lookOf(call, live);
    node.dataset.status = look;
    setText(tool, visible(call.tool));
    const waits = look === "waiting";
    if (waits !== Boolean(form)) {
      form?.remove();
      form = waits ? approvalForm(call, (decision) => acts.decide(id, decision)) : null;
      if (form) details.append(form);
      card.open = argsTitle.hidden = args.hidden = waits;
    }
    setText(verdict, verdictOf(call));
    verdict.hidden = !verdict.textContent;
    const input = call.arguments ?? call.input;
    setText(given, brief(input));
    setText(args, pretty(input));
    setText(status, label);
    if (look === "running" && call.started_ts !== null) elapsed.dataset.since = String(call.started_ts);
    else {
      delete elapsed.dataset.since;
      setText(elapsed, call.status === "done" && call.started_ts !== null ? duration(call.duration_ms) : "");
    }
    const { fraction = null, message = "" } = (look === "running" && call.progress) || {};
    progress.hidden = fraction === null && !message;
    if (fraction === null) bar.removeAttribute("value");
    else bar.value = fraction;
    setText(said, visible(message));
    const follows = output.scrollTop + output.clientHeight >= output.scrollHeight - FOLLOW_PX;
    setText(output, visible(call.output.slice(-VALUE_CHARS_MAX)));
    output.hidden = !call.output;
    if (follows) output.scrollTop = output.scrollHeight;
    const done = call.status === "done";
    const content = call.stored ? `${call.stored.preview}\n…` : call.content;
    const returned = call.is_error ? call.message || "The call failed." : content;
    setText(outcome, done ? brief(returned) : "");
    outcome.hidden = !outcome.textContent;
    resultTitle.hidden = result.hidden = !done;
    setText(resultTitle, call.is_error ? "Error" : "Result");
    setText(result, done ? pretty(returned) : "");
    whole.hidden = !call.stored;
    setText(whole, call.stored ? `Download all of it (${(call.stored.bytes / 1e6).toFixed(1)} MB)` : "");
  }
  return { node, update };
}

/** Counts on in every running call below `root`; `now` is the server's clock, ms since the epoch. */
export function tick(root: HTMLElement, now: number): void {
  for (const node of root.querySelectorAll<HTMLElement>("[data-since]")) {
    setText(node, seconds(Math.max(0, now - Number(node.dataset.since))));
  }
}

type Look = "ok" | "failed" | "abandoned" | "running" | "pending" | "waiting";

/** How a call looks, and in words. */
function lookOf(call: Call, live: boolean): [Look, string] {
  if (call.status === "done") {
    if (call.outcome === "ok" && !call.is_error) return ["ok", ""];
    const words: Record<string, string> = {
      timeout: "timed out",
      denied: "denied",
      stopped: "stopped",
      unknown: "outcome unknown",
    };
    return ["failed", words[call.outcome ?? ""] ?? "failed"];
  }
  if (!live) return ["abandoned", "not finished"];
  return call.status === "decided" && !call.approved ? ["pending", "denied"] : LOOKS[call.status];
}

const LOOKS: Readonly<Record<Exclude<CallPhase, "done">, [Look, string]>> = {
  writing: ["pending", "writing the call"],
  waiting: ["waiting", "waits for approval"],
  decided: ["pending", "approved"],
  pending: ["pending", "calling"],
  running: ["running", "running"],
};

function verdictOf(call: Call): string {
  if (call.approved === null) return "";
  const by = call.decided_by ? ` by ${call.decided_by}` : "";
  return `${call.approved ? "Approved" : "Denied"}${by}${call.reason ? `: ${visible(call.reason)}` : "."}`;
}

function brief(value: unknown): string {
  if (value === null || value === undefined) return "";
  const plain = (part: unknown) => (typeof part === "string" ? part : JSON.stringify(part));
  const text =
    typeof value === "object" && !Array.isArray(value)
      ? Object.entries(value).map(([key, part]) => `${key}: ${plain(part)}`).join(", ")
      : plain(value);
  return visible(text.slice(0, BRIEF_CHARS_MAX));
}

function pretty(value: unknown): string {
  if (value === null || value === undefined) return "none";
  const text = typeof value === "string" ? value : JSON.stringify(value, null, 2);
  const more = text.length - VALUE_CHARS_MAX;
  const shown = visible(text.slice(0, VALUE_CHARS_MAX));
  return more > 0 ? `${shown}\n… ${more.toLocaleString("en")} more characters` : shown;
}
