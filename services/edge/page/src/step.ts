// How one step of an answer looks: what the model thought, what it wrote, and the tools it called.

import type { Call, Step } from "@tapeline/client";

import { callView, type CallActs } from "./call.ts";
import { h, keyed, setText, type View } from "./dom.ts";
import { duration } from "./duration.ts";
import { prose } from "./prose.ts";
import { words } from "./words.ts";

/** The view of a step; its context is whether its run is under way. */
export function stepView(acts: CallActs): View<Step, boolean> {
  const thought = document.createTextNode("");
  const title = h("span");
  const reasoning = h("div.reasoning", { tabindex: 0, role: "region", "aria-label": "Thinking" }, thought);
  const thinking = h("details.thinking", {}, h("summary", {}, title), reasoning);
  const text = h("div.text");
  const calls = h("div.calls");
  const attempt = h("p.attempt");
  const node = h("section.step", {}, thinking, text, calls, attempt);
  const updateText = prose(text);
  const updateCalls = keyed<Call, boolean>(calls, (call) => call.call, (call) => callView(call.call, acts));

  function update(step: Step, live: boolean): void {
    const writing = live && step.finish === null;
    const isThinking = writing && !step.text && !step.calls.length;
    thinking.hidden = !step.thinking;
    thinking.classList.toggle("live", isThinking);
    setText(title, titleOf(step, isThinking));
    const thoughts = isThinking ? words(step.thinking) : step.thinking;
    if (thoughts.startsWith(thought.data)) thought.appendData(thoughts.slice(thought.length));
    else thought.data = thoughts;
    text.hidden = !step.text;
    text.classList.toggle("live", writing && !step.superseded && !step.calls.length);
    node.classList.toggle("superseded", step.superseded);
    updateText(step.text, writing && !step.calls.length); // a call it writes shows that the text is whole
    updateCalls(step.calls, live);
    attempt.hidden = step.attempt < 2;
    setText(attempt, `Started again: attempt ${step.attempt}.`);
  }
  return { node, update };
}

/** With its duration where the tape knows it: the first step's first word is timed from the beginning of the run. */
function titleOf({ step, first_token_ms }: Step, isThinking: boolean): string {
  if (isThinking) return "Thinking…";
  return step === 1 && first_token_ms !== null ? `Thought for ${duration(first_token_ms)}` : "Thought";
}
