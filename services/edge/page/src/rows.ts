// A long list of which only what can be seen is in the document: rows of one height, chosen by pointer or keys.

import { h } from "./dom.ts";

const ROW_PX = 46; // as in rows.css
const AROUND = 8; // rows drawn above and below what can be seen

export interface Rows<T> {
  readonly node: HTMLElement;
  /** Shows these items, of which the one at `chosen` is marked; -1: none. */
  show(items: readonly T[], chosen: number): void;
}

/** `choose` hears which item a person wants. */
export function rows<T>(label: string, row: (item: T) => Node[], choose: (index: number) => void): Rows<T> {
  const all = h("div.all", { role: "presentation" });
  const node = h("div.rows", { role: "listbox", tabindex: "0", "aria-label": label }, all);
  const drawn = new Map<number, HTMLElement>();
  let items: readonly T[] = [];
  let chosen = -1;
  const prefix = `row-${label.toLowerCase()}`;

  function draw(): void {
    const first = Math.max(0, Math.floor(node.scrollTop / ROW_PX) - AROUND);
    const last = Math.min(items.length, Math.ceil((node.scrollTop + node.clientHeight) / ROW_PX) + AROUND);
    for (const [index, old] of drawn) {
      if (index >= first && index < last) continue;
      old.remove();
      drawn.delete(index);
    }
    for (let index = first; index < last; index += 1) {
      if (!drawn.has(index)) {
        const made = h(
          "div.row",
          { role: "option", id: `${prefix}-${index}`, "aria-posinset": index + 1, "aria-setsize": items.length },
          ...row(items[index]!),
        );
        made.style.top = `${index * ROW_PX}px`;
        drawn.set(index, made);
        all.append(made);
      }
      drawn.get(index)!.setAttribute("aria-selected", String(index === chosen));
    }
    if (drawn.has(chosen)) node.setAttribute("aria-activedescendant", `${prefix}-${chosen}`);
    else node.removeAttribute("aria-activedescendant");
  }

  node.addEventListener("scroll", draw);
  new ResizeObserver(draw).observe(node);
  node.addEventListener("click", (click) => {
    const target = (click.target as Element).closest<HTMLElement>("[role=option]");
    if (target) choose(Number(target.id.slice(prefix.length + 1)));
  });
  node.addEventListener("keydown", (key) => {
    const page = Math.max(1, Math.floor(node.clientHeight / ROW_PX) - 1);
    const wanted: Record<string, number> = {
      ArrowDown: chosen + 1,
      ArrowUp: chosen - 1,
      PageDown: chosen + page,
      PageUp: chosen - page,
      Home: 0,
      End: items.length - 1,
    };
    const index = wanted[key.key];
    if (index === undefined || !items.length) return;
    key.preventDefault();
    choose(Math.max(0, Math.min(items.length - 1, index)));
  });

  return {
    node,
    show(wanted, index) {
      if (wanted !== items) {
        items = wanted;
        for (const old of drawn.values()) old.remove();
        drawn.clear();
        all.style.height = `${items.length * ROW_PX}px`;
      }
      chosen = index;
      if (index >= 0) {
        const [above, below] = [index * ROW_PX - node.scrollTop, node.clientHeight - ROW_PX];
        if (above < -ROW_PX || above > below + ROW_PX) node.scrollTop += above - below / 2; // far away: to the middle
        else if (above < 0) node.scrollTop += above;
        else if (above > below) node.scrollTop += above - below;
      }
      draw();
    },
  };
}
