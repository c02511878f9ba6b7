// The side bar where there is no room for it beside the conversation: it slides in.

import { find } from "./dom.ts";
import { icon } from "./icon.ts";

export function drawer(): { close(): void } {
  const node = find("drawer", HTMLElement);
  const main = find("main", HTMLElement);
  const menu = find("menu", HTMLButtonElement);
  const shade = find("shade", HTMLElement);

  function show(isOpen: boolean): void {
    node.classList.toggle("open", isOpen);
    shade.hidden = !isOpen;
    menu.setAttribute("aria-expanded", String(isOpen));
    main.inert = isOpen;
    if (isOpen) find("new", HTMLButtonElement).focus();
  }

  const close = () => show(false);
  menu.append(icon("menu"));
  menu.addEventListener("click", () => show(true));
  shade.addEventListener("click", close);
  node.addEventListener("click", (click) => {
    if (click.target instanceof HTMLAnchorElement) close(); // also to the conversation that is open already
  });
  document.addEventListener("keydown", (key) => {
    if (key.key !== "Escape" || !node.classList.contains("open") || document.querySelector("dialog[open]")) return;
    close();
    menu.focus();
  });
  matchMedia("(max-width: 800px)").addEventListener("change", close);
  return { close };
}
