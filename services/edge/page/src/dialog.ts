// Asking the person something that has to be answered first.

import { h } from "./dom.ts";

export interface Question {
  title: string;
  text?: string;
  /** What the field is called; without one there is only yes or no. */
  label?: string;
  value?: string;
  secret?: boolean;
  action: string;
  danger?: boolean;
}

/** What the person wrote, "" where there was nothing to write; null: they would rather not. */
export function ask({ title, text, label, value = "", secret, action, danger }: Question): Promise<string | null> {
  const field = label
    ? h("input", { type: secret ? "password" : "text", autocomplete: "off", spellcheck: "false", required: "" })
    : null;
  const cancel = h("button", { type: "button", onclick: () => dialog.close("cancel") }, "Cancel");
  const go = h(danger ? "button.danger" : "button.primary", { type: "submit" }, action);
  const form = h("form", { method: "dialog" }, h("h2", { id: "dialog-title" }, title));
  if (text) form.append(h("p", {}, text));
  if (field) {
    field.value = value;
    form.append(h("label", {}, label!, field));
  }
  form.append(h("div.buttons", {}, cancel, go));
  form.addEventListener("submit", (submit) => {
    submit.preventDefault(); // the policy lets no form go anywhere
    dialog.close("ok");
  });
  const dialog = h("dialog", { "aria-labelledby": "dialog-title" }, form);
  document.body.append(dialog);
  dialog.showModal();
  (field ?? cancel).focus();
  field?.select();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue === "ok" ? (field?.value.trim() ?? "") : null);
    });
  });
}
