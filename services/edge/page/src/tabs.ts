// Tabs, by pointer or arrow keys. What is shown of what they choose is for the style sheet: `.chosen`.

import { h } from "./dom.ts";

export interface Tabs {
  readonly node: HTMLElement;
  choose(panel: HTMLElement): void;
}

/** `chosen` hears which of `panels`, by their names, is. */
export function tabs(label: string, panels: Record<string, HTMLElement>, chosen: (panel: HTMLElement) => void): Tabs {
  const all = Object.entries(panels).map(([name, panel]) => ({
    panel,
    tab: h("button", { type: "button", role: "tab", onclick: () => choose(panel) }, name),
  }));
  const node = h("div.tabs", { role: "tablist", "aria-label": label, onkeydown }, ...all.map(({ tab }) => tab));

  function choose(panel: HTMLElement): void {
    for (const one of all) {
      const isChosen = one.panel === panel;
      one.tab.setAttribute("aria-selected", String(isChosen));
      one.tab.tabIndex = isChosen ? 0 : -1;
      one.panel.classList.toggle("chosen", isChosen);
    }
    chosen(panel);
  }

  function onkeydown(key: KeyboardEvent): void {
    const shown = all.map(({ tab }) => tab).filter((tab) => tab.offsetParent !== null);
    const index = shown.indexOf(document.activeElement as HTMLButtonElement);
    const step = { ArrowRight: 1, ArrowLeft: -1 }[key.key];
    if (step === undefined || index < 0) return;
    const tab = shown.at((index + step) % shown.length)!;
    tab.focus();
    tab.click();
  }
  return { node, choose };
}
