// How runs, steps and tool calls look. Each view owns a node and draws the part of the state it is given; what has
// not changed is not touched. Text becomes text nodes only.

import { progressive } from "./markdown.js";
import { ended } from "./state.js";

const VALUE_CHARS_MAX = 20_000; // of one call's arguments or result on the page; the tape has all of it
const BRIEF_CHARS_MAX = 240;

/** An element: `h("p.note", {title}, "text", node)`; properties starting with `on` are listeners. */
export function h(name, properties = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const node = document.createElement(tag);
  node.classList.add(...classes);
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

/**
 * Draws a list of things with a key, keeping each one's view and their order. Returns `update(items, context)`,
 * which touches only the items that changed, or all where `context`, a primitive, did.
 */
export function keyed(parent, keyOf, create) {
  const views = new Map();
  let before;
  return function update(items, context) {
    const anew = context !== before;
    before = context;
    const wanted = new Set(items.map(keyOf));
    for (const [key, view] of views) {
      if (wanted.has(key)) continue;
      view.node.remove();
      views.delete(key);
    }
    let at = parent.firstChild;
    for (const item of items) {
      const key = keyOf(item);
      if (!views.has(key)) views.set(key, create(item));
      const view = views.get(key);
      if (view.node === at) at = at.nextSibling;
      else parent.insertBefore(view.node, at);
      if (anew || view.shown !== item) view.update(item, context);
      view.shown = item;
    }
  };
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** A message and its answer. `retry(content)` sends the message again. */
export function runView(run, { retry }) {
  const question = h("p.question", {}, run.message?.content ?? "");
  const name = h("span.model");
  const badge = h("span.badge", { title: "Not an AI: a script that shows what Tapeline carries" }, "scripted demo");
  const by = h("p.by", {}, name, badge);
  const steps = h("div.steps");
  const waiting = h("p.waiting", { "aria-label": "Waiting" }, h("i"), h("i"), h("i"));
  const note = h("p.note");
  const failure = h("div.failure");
  const timings = h("p.timings");
  const answer = h("div.answer", { "aria-live": "polite" }, by, steps, waiting, failure, note, timings);
  const node = h("article.run", { "data-run": run.run }, h("h2.unseen", {}, "You"), question, answer);
  const updateSteps = keyed(steps, (step) => step.step, stepView);

  function update(run) {
    const live = !ended(run);
    node.dataset.status = run.status;
    answer.setAttribute("aria-busy", String(live)); // read out once it is whole
    setText(name, run.model);
    by.hidden = !run.model;
    badge.hidden = !/^demo(:|$)/.test(run.model);
    updateSteps(run.steps, live);
    waiting.hidden = !live || !isIdle(run);
    setText(note, noteOf(run));
    note.hidden = !note.textContent;
    if (run.error && !failure.hasChildNodes()) {
      failure.append(h("p", {}, run.error.message || "The run failed."), h("p.code", {}, run.error.code));
      if (run.error.retryable) {
        const again = h("button", { type: "button", onclick: () => retry(run.message.content) }, "Try again");
        failure.append(again);
      }
    }
    failure.hidden = !run.error;
    setText(timings, timingsOf(run));
    timings.hidden = !timings.textContent;
  }
  return { node, update };
}

/** Nothing on the page moves, though the run is under way. */
function isIdle(run) {
  const step = run.steps.at(-1);
  if (!step) return true;
  if (step.finish === null) return step.superseded || !(step.text || step.thinking || step.calls.length);
  return step.calls.every((call) => call.status === "done");
}

function noteOf(run) {
  if (run.stopping) return "Stopping…";
  if (run.status === "queued") return "Waiting for the answer before this one.";
  if (run.status !== "done") return "";
  const notes = {
    stop: "",
    stopped: "Stopped.",
    length: "Cut off: the model reached its length limit.",
    max_steps: "Ended here: the run reached its limit of steps.",
    content_filter: "Withheld by the provider’s content filter.",
  };
  return Object.hasOwn(notes, run.reason) ? notes[run.reason] : `Ended: ${run.reason}.`;
}

function timingsOf(run) {
  if (!ended(run)) return "";
  const parts = [];
  if (run.first_token_ms !== null) parts.push(`first token ${duration(run.first_token_ms)}`);
  if (run.duration_ms !== null) parts.push(`took ${duration(run.duration_ms)}`);
  if (run.usage.output_tokens) parts.push(`${run.usage.output_tokens.toLocaleString("en")} tokens`);
  return parts.join(" · ");
}

function stepView() {
  const thinkingText = document.createTextNode("");
  const thinkingTitle = h("span");
  const thinking = h(
    "details.thinking",
    {},
    h("summary", {}, thinkingTitle),
    h("div.reasoning", {}, thinkingText),
  );
  const text = h("div.text");
  const calls = h("div.calls");
  const attempt = h("p.attempt");
  const node = h("section.step", {}, thinking, text, calls, attempt);
  const updateText = progressive(text);
  const updateCalls = keyed(calls, (call) => call.call, callView);

  function update(step, live) {
    const writing = live && step.finish === null;
    const isThinking = writing && !step.text && !step.calls.length;
    thinking.hidden = !step.thinking;
    thinking.classList.toggle("live", isThinking);
    setText(thinkingTitle, isThinking ? "Thinking…" : "Thought");
    if (step.thinking.startsWith(thinkingText.data)) thinkingText.appendData(step.thinking.slice(thinkingText.length));
    else thinkingText.data = step.thinking;
    text.hidden = !step.text;
    text.classList.toggle("live", writing && !step.superseded && !step.calls.length);
    node.classList.toggle("superseded", step.superseded);
    updateText(step.text, writing);
    updateCalls(step.calls, live);
    attempt.hidden = step.attempt < 2;
    setText(attempt, `Started again: attempt ${step.attempt}.`);
  }
  return { node, update };
}

function callView() {
  const tool = h("code.tool");
  const status = h("span.status");
  const elapsed = h("span.elapsed");
  const given = h("span.given");
  const bar = h("progress", { max: "1" });
  const said = h("span.said");
  const progress = h("span.progress", {}, bar, said);
  const outcome = h("span.outcome");
  const args = h("pre", { tabindex: "0" });
  const result = h("pre", { tabindex: "0" });
  const resultTitle = h("h4");
  const node = h(
    "details.call",
    {},
    h("summary", {}, h("span.line", {}, h("span.icon"), tool, given, status, elapsed), progress, outcome),
    h("div.details", {}, h("h4", {}, "Arguments"), args, resultTitle, result),
  );

  function update(call, live) {
    const [look, label] = lookOf(call, live);
    node.dataset.status = look;
    setText(tool, call.tool);
    const input = call.arguments ?? call.input;
    setText(given, brief(input));
    setText(args, pretty(input));
    setText(status, label);
    if (look === "running" && call.started_ts !== null) elapsed.dataset.since = call.started_ts;
    else {
      delete elapsed.dataset.since;
      setText(elapsed, call.status === "done" ? duration(call.duration_ms) : "");
    }
    const { fraction = null, message = "" } = (look === "running" && call.progress) || {};
    progress.hidden = fraction === null && !message;
    if (fraction === null) bar.removeAttribute("value");
    else bar.value = fraction;
    setText(said, message);
    const done = call.status === "done";
    const returned = call.is_error ? call.message || "The call failed." : call.content;
    setText(outcome, done ? brief(returned) : "");
    outcome.hidden = !outcome.textContent;
    resultTitle.hidden = result.hidden = !done;
    setText(resultTitle, call.is_error ? "Error" : "Result");
    setText(result, done ? pretty(returned) : "");
  }
  return { node, update };
}

/** How a call looks, and in words. */
function lookOf(call, live) {
  if (call.status === "done") {
    if (call.outcome === "ok" && !call.is_error) return ["ok", ""];
    const words = { timeout: "timed out", denied: "denied", stopped: "stopped", unknown: "outcome unknown" };
    return ["failed", words[call.outcome] ?? "failed"];
  }
  if (!live) return ["abandoned", "not finished"];
  if (call.status === "running") return ["running", "running"];
  if (call.status === "writing") return ["pending", "writing the call"];
  if (call.needs_approval && call.approved === null) return ["pending", "waits for approval"];
  return ["pending", "calling"];
}

/** Counts on in every running call below `root`; `now` is the server's clock, in ms. */
export function tick(root, now) {
  for (const node of root.querySelectorAll("[data-since]")) {
    setText(node, seconds(Math.max(0, now - Number(node.dataset.since))));
  }
}

/** 180 → "180 ms", 2345 → "2.3 s", 75000 → "1 min 15 s". */
export function duration(ms) {
  return ms < 1_000 ? `${Math.round(ms)} ms` : seconds(ms);
}

function seconds(ms) {
  if (ms < 59_950) return `${(ms / 1_000).toFixed(1)} s`;
  const whole = Math.round(ms / 1_000);
  return `${Math.floor(whole / 60)} min ${String(whole % 60).padStart(2, "0")} s`;
}

function brief(value) {
  if (value === null || value === undefined) return "";
  const plain = (part) => (typeof part === "string" ? part : JSON.stringify(part));
  const isRecord = typeof value === "object" && !Array.isArray(value);
  const text = isRecord
    ? Object.entries(value).map(([key, part]) => `${key}: ${plain(part)}`).join(", ")
    : plain(value);
  return text.slice(0, BRIEF_CHARS_MAX);
}

function pretty(value) {
  if (value === null || value === undefined) return "none";
  const text = typeof value === "string" ? value : JSON.stringify(value, null, 2);
  const more = text.length - VALUE_CHARS_MAX;
  return more > 0 ? `${text.slice(0, VALUE_CHARS_MAX)}\n… ${more.toLocaleString("en")} more characters` : text;
}
