// Light, dark, or as the system has it. The style sheet does the rest: every colour is a pair.

import { h } from "./dom.ts";
import { icon } from "./icon.ts";
import { keep, recall } from "./storage.ts";

const THEMES = ["light", "dark", "system"] as const;

/** The switch, and what it is set to. */
export function themeSwitch(parent: HTMLElement): void {
  const buttons = THEMES.map((theme) => {
    const words = theme === "system" ? "As the system has it" : theme === "light" ? "Light" : "Dark";
    const choose = () => {
      keep("local", "theme", theme);
      show();
    };
    return h("button.plain", { type: "button", title: words, "aria-label": words, onclick: choose }, icon(theme));
  });
  function show(): void {
    const kept = recall("local", "theme");
    const theme = THEMES.find((one) => one === kept) ?? "system";
    document.documentElement.dataset.theme = theme;
    buttons.forEach((button, at) => button.setAttribute("aria-pressed", String(THEMES[at] === theme)));
  }
  parent.append(...buttons);
  window.addEventListener("storage", show); // another tab's choice
  show();
}
