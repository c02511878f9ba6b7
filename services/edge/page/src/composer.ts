// Where the person writes. What they wrote is kept, for each conversation, until it is on the tape.

import { find } from "./dom.ts";
import { keep, recall } from "./storage.ts";

export interface Composer {
  /** Another conversation's draft. */
  open(id: string): void;
  /** What was a new conversation has this id now. */
  name(id: string): void;
  /** Its draft is on the tape: nothing is left to keep. */
  sent(id: string): void;
  /** The words could not be sent: they are back, before what was written meanwhile. */
  back(text: string): void;
  say(problem: string): void;
  /** `active`: an answer is under way, to be stopped; `sending`: nothing more can be sent now. */
  show(active: boolean, sending: boolean): void;
  focus(): void;
  hide(isHidden: boolean): void;
}

/** `send` is called with what was written, which is then gone from the field. */
export function composer(acts: { send(text: string): void; stop(): void }): Composer {
  const form = find("composer", HTMLFormElement);
  const content = find("content", HTMLTextAreaElement);
  const send = find("send", HTMLButtonElement);
  const stop = find("stop", HTMLButtonElement);
  const problem = find("problem", HTMLParagraphElement);
  let conversation = "";
  let unsent = ""; // said, and not known to be on the tape

  function keepDraft(): void {
    keep("session", `draft.${conversation}`, joined(unsent, content.value));
  }

  function set(text: string): void {
    content.value = text;
    fit();
  }

  function fit(): void {
    content.style.height = "auto";
    content.style.height = `${content.scrollHeight}px`;
  }

  function say(words: string): void {
    problem.textContent = words;
    problem.hidden = !words;
  }

  function submit(): void {
    const text = content.value;
    if (send.disabled || !text.trim()) return;
    if (!stop.hidden) return say("An answer is under way. Stop it first, or wait for its end.");
    say("");
    unsent = text;
    set("");
    keepDraft();
    acts.send(text);
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  content.addEventListener("input", () => {
    fit();
    say("");
    keepDraft();
  });
  content.addEventListener("keydown", (key) => {
    if (key.key === "Enter" && !key.shiftKey && !key.isComposing) {
      key.preventDefault();
      submit();
    } else if (key.key === "Escape") {
      if (stop.hidden) content.blur();
      else stop.focus();
    }
  });
  stop.addEventListener("click", acts.stop);

  return {
    open(id) {
      conversation = id;
      unsent = "";
      say("");
      set(recall("session", `draft.${id}`) ?? "");
    },
    name(id) {
      keep("session", `draft.${id}`, recall("session", "draft.") ?? "");
      keep("session", "draft.", "");
      conversation = id;
    },
    sent(id) {
      if (id !== conversation) return keep("session", `draft.${id}`, "");
      unsent = "";
      keepDraft();
    },
    back(text) {
      unsent = "";
      set(joined(text, content.value));
      keepDraft();
    },
    say,
    show(active, sending) {
      const hadFocus = document.activeElement === stop;
      stop.hidden = !active;
      send.hidden = active;
      send.disabled = sending;
      if (hadFocus && !active) content.focus();
    },
    focus() {
      if (matchMedia("(pointer: fine)").matches) content.focus(); // else a keyboard would cover the page
    },
    hide(isHidden) {
      form.hidden = isHidden;
    },
  };
}

const joined = (...texts: string[]) => texts.filter((text) => text.trim()).join("\n\n");
