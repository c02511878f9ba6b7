// Asking the person about a call: they may edit its arguments before they approve it, or say why they deny it.

import type { Call, Decision } from "@tapeline/client";

import { escaped, visible } from "./bidi.ts";
import { h } from "./dom.ts";

const ROWS_MAX = 12;

/** The form; `decide` rejects with what to tell the person. */
export function approvalForm(call: Call, decide: (decision: Decision) => Promise<void>): HTMLElement {
  const asked = call.arguments; // what is approved has to be what is read
  const given = typeof asked === "string" ? visible(asked) : escaped(JSON.stringify(asked, null, 2));
  const rows = Math.min(ROWS_MAX, given.split("\n").length);
  const args = h("textarea", { rows, spellcheck: "false", "aria-label": "Arguments" });
  args.value = given;
  const reason = h("input", {
    type: "text",
    maxlength: 500,
    placeholder: "Why not? (optional)",
    "aria-label": "Reason for denying",
  });
  const problem = h("p.problem", { role: "alert" });
  const choose = (decision: () => Decision) => async () => {
    problem.textContent = "";
    fields.disabled = true; // until the tape says what was decided
    try {
      await decide(decision());
    } catch (error) {
      problem.textContent = error instanceof Error ? error.message : String(error);
      fields.disabled = false;
    }
  };
  const approve = choose(() =>
    args.value === given ? { approved: true } : { approved: true, arguments: parsed(args.value) },
  );
  const deny = choose(() => ({ approved: false, reason: reason.value }));
  const fields = h(
    "fieldset",
    {},
    h("legend", {}, "May it run with these arguments? You can edit them."),
    args,
    h("button.primary", { type: "button", onclick: approve }, "Approve"),
    h("button", { type: "button", onclick: deny }, "Deny"),
    reason,
  );
  return h("div.approval", {}, fields, problem);
}

function parsed(text: string): Record<string, unknown> {
  let value: unknown = null;
  try {
    value = JSON.parse(text);
  } catch {
    // Said below.
  }
  if (value === null || typeof value !== "object" || Array.isArray(value)) {
    throw new Error("The arguments have to be a JSON object.");
  }
  return value as Record<string, unknown>;
}
