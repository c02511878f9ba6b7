// Making nodes and keeping lists of them: all there is of a framework. Text only ever becomes text nodes.

type Child = Node | string;
type Listener<E extends Event> = (event: E) => void;
type Properties = {
  onclick?: Listener<MouseEvent>;
  onkeydown?: Listener<KeyboardEvent>;
  oninput?: Listener<Event>;
  onchange?: Listener<Event>;
  onsubmit?: Listener<SubmitEvent>;
  ontoggle?: Listener<Event>;
} & { [attribute: string]: string | number | null | undefined | Listener<never> };

/** An element: `h("p.note", {title}, "text", node)`; properties that start with `on` are listeners. */
export function h<T extends keyof HTMLElementTagNameMap>(
  name: T | `${T}.${string}`,
  properties: Properties = {},
  ...children: Child[]
): HTMLElementTagNameMap[T] {
  const [tag, ...classes] = name.split(".");
  const node = document.createElement(tag as T);
  if (classes.length) node.classList.add(...classes);
  for (const [key, value] of Object.entries(properties)) {
    if (typeof value === "function") node.addEventListener(key.slice(2), value as EventListener);
    else if (value !== null && value !== undefined) node.setAttribute(key, String(value));
  }
  node.append(...children);
  return node;
}

/** The element of `index.html` with this id, which is of this kind. */
export function find<T extends HTMLElement>(id: string, kind: new () => T): T {
  const node = document.getElementById(id);
  if (!(node instanceof kind)) throw new TypeError(`index.html has no ${kind.name} #${id}`);
  return node;
}

export function setText(node: Node, text: string): void {
  if (node.textContent !== text) node.textContent = text;
}

/** Something drawn: its node, and how to draw what it shows now. */
export interface View<T, C = void> {
  node: HTMLElement;
  update(item: T, context: C): void;
}

/**
 * Draws a list of things with a key, keeping each one's view and their order. Returns `update(items, context)`, which
 * touches only the items that are not the `same` as before, or all where `context` is another.
 */
export function keyed<T, C = void>(
  parent: HTMLElement,
  keyOf: (item: T) => string | number,
  create: (item: T) => View<T, C>,
  same: (a: T, b: T) => boolean = Object.is,
): (items: readonly T[], context: C) => void {
  const views = new Map<string | number, View<T, C> & { shown?: T }>();
  let before: C | undefined;
  return function update(items, context) {
    const anew = context !== before;
    before = context;
    const wanted = new Set(items.map(keyOf));
    for (const [key, view] of views) {
      if (wanted.has(key)) continue;
      view.node.remove();
      views.delete(key);
    }
    let at = parent.firstChild;
    for (const item of items) {
      const key = keyOf(item);
      let view = views.get(key);
      if (!view) views.set(key, (view = create(item)));
      if (view.node === at) at = at.nextSibling;
      else parent.insertBefore(view.node, at);
      if (anew || view.shown === undefined || !same(view.shown, item)) view.update(item, context);
      view.shown = item;
    }
  };
}
