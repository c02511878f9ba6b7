// Which model is to answer, where there is a choice. Remembered on this device.

import type { Tapeline } from "@tapeline/client";

import { h } from "./dom.ts";
import { keep, recall } from "./storage.ts";

/** Fills `select`, and shows it where there is a choice. Returns what is chosen; undefined: the default. */
export function modelChoice(select: HTMLSelectElement, tapeline: Tapeline): () => string | undefined {
  let wanted: string | undefined;
  select.addEventListener("change", () => {
    wanted = select.value;
    keep("local", "model", wanted);
  });
  void tapeline.models().then(
    (models) => {
      if (models.length < 2) return;
      const kept = recall("local", "model");
      const chosen = models.find(({ id }) => id === kept) ?? models.find((model) => model.default) ?? models[0]!;
      select.append(...models.map(({ id }) => h("option", { value: id }, id)));
      select.value = wanted = chosen.id;
      select.hidden = false;
    },
    () => {}, // nobody is held up by that: the deployment's default answers
  );
  return () => wanted;
}
