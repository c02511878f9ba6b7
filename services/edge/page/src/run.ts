// How a turn looks: what the person said, the steps of the answer, and what can be done with it.

import { ended, type Decision, type Failure, type Phase, type Run } from "@tapeline/client";

import { copied } from "./clipboard.ts";
import { h, keyed, setText, type View } from "./dom.ts";
import { duration } from "./duration.ts";
import { icon, type IconName } from "./icon.ts";
import { stepView } from "./step.ts";
import type { Turn } from "./turn.ts";

const COPIED_MS = 2_000; // "Copied" is there for so long
const STILL: readonly Phase[] = ["idle", "waiting", "resuming"]; // nothing of it moves, though it is under way

export interface RunActs {
  /** Says something in place of `run`. Rejects with what to tell the person. */
  replace(run: Run, content: string): Promise<void>;
  /** Shows another version of a turn. */
  choose(turn: Turn, index: number): void;
  decide(run: string, call: string, decision: Decision): Promise<void>;
  download(run: string, call: string): void;
}

/** The view of the turn of `run`; its context is whether an answer is under way anywhere in the conversation. */
export function runView({ run: { run: id } }: Turn, acts: RunActs): View<Turn, boolean> {
  let shown: Turn;
  const question = h("p.question");
  const counter = h("span.counter");
  const earlier = small("back", "Earlier version", () => acts.choose(shown, shown.index - 1));
  const later = small("forth", "Later version", () => acts.choose(shown, shown.index + 1));
  const versions = h("span.versions", { role: "group", "aria-label": "Versions" }, earlier, counter, later);
  const edit = small("edit", "Edit and send again", () => editing());
  const asked = h("div.asked", {}, question, edit, versions);
  const name = h("span.model");
  const badge = h("span.badge", { title: "Not an AI: a script that shows what Tapeline carries" }, "scripted demo");
  const by = h("p.by", {}, name, badge);
  const steps = h("div.steps");
  const waiting = h("p.waiting", { role: "img", "aria-label": "Waiting" }, h("i"), h("i"), h("i"));
  const note = h("p.note");
  const why = h("p.why");
  const advice = h("p.advice");
  const retry = h("button", { type: "button", onclick: () => void resend(retry) }, "Try again");
  const failure = h("div.failure", {}, why, advice, retry);
  const problem = h("p.problem", { role: "alert" });
  const again = small("again", "Answer again", () => void resend(again));
  const timings = h("span.timings");
  const copy = small("copy", "Copy the answer", () => void copying());
  const actions = h("div.actions", {}, copy, again, timings);
  const answer = h("div.answer", {}, h("h2.unseen", {}, "Answer"), by, steps, waiting, failure, note, actions, problem);
  const node = h("article.run", { "data-run": id }, h("h2.unseen", {}, "You"), asked, answer);
  const calls = {
    decide: (call: string, decision: Decision) => acts.decide(id, call, decision),
    download: (call: string) => acts.download(id, call),
  };
  const updateSteps = keyed(steps, (step) => step.step, () => stepView(calls));

  async function resend(button: HTMLButtonElement): Promise<void> {
    problem.textContent = "";
    try {
      await acts.replace(shown.run, shown.run.message.content);
    } catch (error) {
      problem.textContent = error instanceof Error ? error.message : String(error);
      button.focus(); // it was hidden meanwhile
    }
  }

  async function copying(): Promise<void> {
    const isDone = await copied(markdownOf(shown.run));
    const feedback = isDone ? "Copied" : "Not copied: the browser does not allow it here. Select the text instead.";
    const said = h("span.said", { role: "status" }, feedback);
    copy.after(said);
    setTimeout(() => said.remove(), COPIED_MS);
  }

  /** In place of the question, until it is sent or given up. */
  function editing(): void {
    const field = h("textarea", { "aria-label": "Edited message", rows: Math.min(12, lines(question.textContent)) });
    const wrong = h("p.problem", { role: "alert" });
    const send = h("button.primary", { type: "submit" }, "Send");
    const close = () => {
      form.remove();
      asked.hidden = false;
    };
    const cancel = () => {
      close();
      edit.focus();
    };
    const submit = async (event: Event) => {
      event.preventDefault();
      if (send.disabled || !field.value.trim()) return;
      send.disabled = true;
      try {
        await acts.replace(shown.run, field.value);
        close();
      } catch (error) {
        wrong.textContent = error instanceof Error ? error.message : String(error);
        send.disabled = false;
        field.focus(); // it was hidden meanwhile
      }
    };
    const onkeydown = (key: KeyboardEvent) => {
      if (key.key === "Escape") cancel();
      else if (key.key === "Enter" && !key.shiftKey && !key.isComposing) void submit(key);
    };
    const buttons = h("div.buttons", {}, h("button", { type: "button", onclick: cancel }, "Cancel"), send);
    const form = h("form.editing", { onsubmit: submit, onkeydown }, field, wrong, buttons);
    field.value = shown.run.message.content;
    asked.hidden = true;
    asked.after(form);
    field.focus();
  }

  function update(turn: Turn, busy: boolean): void {
    shown = turn;
    const { run, versions: all, index, counts } = turn;
    const over = ended(run);
    node.dataset.status = run.status;
    setText(question, run.message.content);
    setText(counter, `${index + 1}/${all.length}`);
    versions.hidden = all.length < 2;
    earlier.disabled = index === 0;
    later.disabled = index === all.length - 1;
    for (const button of [edit, again, retry]) {
      button.hidden = !counts;
      button.disabled = busy;
    }
    setText(name, run.model);
    by.hidden = !run.model;
    badge.hidden = !/^demo(:|$)/.test(run.model);
    updateSteps(run.steps, !over);
    waiting.hidden = !STILL.includes(run.phase);
    setText(note, noteOf(run));
    note.hidden = !note.textContent;
    failure.hidden = !run.error;
    setText(why, run.error?.message || "The run failed.");
    setText(advice, run.error ? adviceOn(run.error, Boolean(markdownOf(run))) : "");
    again.hidden ||= Boolean(run.error); // it has its own
    copy.hidden = !markdownOf(run);
    actions.hidden = !over;
    setText(timings, timingsOf(run));
  }
  return { node, update };
}

/** The answer as the model wrote it. */
export function markdownOf(run: Run): string {
  return run.steps.map((step) => step.text.trim()).filter(Boolean).join("\n\n");
}

function noteOf(run: Run): string {
  if (run.stopped && !ended(run)) return "Stopping…";
  if (run.status === "queued") return "Waiting for the answer before this one.";
  if (run.status !== "done") return "";
  const notes: Record<string, string> = {
    stop: "",
    stopped: "Stopped.",
    length: "Cut off: the model reached its length limit. Ask it to go on.",
    max_steps: "Ended here: the run reached its limit of steps. Ask it to go on.",
    content_filter: "Withheld by the provider’s content filter. Try other words.",
  };
  return notes[run.reason] ?? `Ended: ${run.reason}.`;
}

function adviceOn({ code, retryable }: Failure, hasText: boolean): string {
  const kept = hasText ? "What there is of it is kept. " : "";
  return `${kept}${retryable ? "It may work when you try again." : "The same may fail again."} (${code})`;
}

function timingsOf(run: Run): string {
  if (!ended(run)) return "";
  const parts: string[] = [];
  if (run.first_token_ms !== null) parts.push(`first token ${duration(run.first_token_ms)}`);
  if (run.duration_ms) parts.push(`took ${duration(run.duration_ms)}`);
  if (run.usage.output_tokens) parts.push(`${run.usage.output_tokens.toLocaleString("en")} tokens`);
  return parts.join(" · ");
}

function small(name: IconName, label: string, onclick: () => void): HTMLButtonElement {
  return h("button.plain", { type: "button", title: label, "aria-label": label, onclick }, icon(name));
}

const lines = (text: string | null) => (text ?? "").split("\n").length;
