// A block of code: plain while it is written, coloured when its fence closes and now and then while it is long.
//
// Class names, for prose.css: figure.code > figcaption > (span.language, button.copy), then pre > code. Colours are
// highlight.js's own classes (hljs-keyword, …). figure.code.pending: its colours are on their way.

import { visible } from "./bidi.ts";
import { copied } from "./clipboard.ts";
import { h, setText } from "./dom.ts";
import type { lowlight } from "./languages.ts";

const COLOURED_CHARS_MAX = 30_000; // of a block: a longer one stays plain
const COLOURED_EVERY_CHARS = 4_000; // while a block is written, it is coloured each time it has grown by this
const COPIED_MS = 1_500; // how long the button says so

type Lowlight = typeof lowlight;
type Content = ReturnType<Lowlight["highlight"]>["children"][number];

export interface Code {
  readonly node: HTMLElement;
  update(text: string, closed: boolean): void;
}

/** Draws code in `language`, a name as after a fence; `update` takes all of it each time. */
export function code(language: string): Code {
  const onclick = async () => {
    setText(copy, (await copied(text)) ? "Copied" : "Not copied");
    setTimeout(() => setText(copy, "Copy"), COPIED_MS);
  };
  const copy = h("button.copy", { type: "button", onclick }, "Copy");
  const body = h("code");
  const label = language ? `Code in ${visible(language)}` : "Code";
  const pre = h("pre", { tabindex: 0, role: "region", "aria-label": label }, body); // it scrolls: for the keyboard
  const caption = h("figcaption", {}, h("span.language", {}, visible(language) || "text"), copy);
  const figure = h("figure.code", { dir: "ltr" }, caption, pre);
  let text = "";
  let colouredChars = 0;
  let turns = 0; // how often colours were asked for

  async function colour(turn: number): Promise<void> {
    const lowlight = await loaded().catch(() => null);
    if (turn !== turns) return;
    // More may have come while the languages were loaded: all of it is coloured.
    if (text.length <= COLOURED_CHARS_MAX && lowlight?.registered(language)) {
      body.replaceChildren(...lowlight.highlight(language, text).children.map(drawn));
    }
    figure.classList.remove("pending");
  }

  function update(next: string, closed: boolean): void {
    const more = next.startsWith(text) ? next.slice(text.length) : null;
    if (more === null) {
      body.textContent = visible(next);
      colouredChars = 0;
    } else if (more) {
      if (body.lastChild instanceof Text) body.lastChild.appendData(visible(more));
      else body.append(visible(more));
    }
    text = next;
    const isDue = text.length - colouredChars >= (closed ? 1 : COLOURED_EVERY_CHARS);
    if (!isDue || !language || text.length > COLOURED_CHARS_MAX) return;
    colouredChars = text.length;
    turns += 1;
    figure.classList.add("pending");
    setTimeout(() => void colour(turns)); // a task of its own: drawing goes first
  }
  return { node: figure, update };
}

let loading: Promise<Lowlight> | undefined;

/** The languages, fetched when there is code to colour; after a failure again with the next. */
function loaded(): Promise<Lowlight> {
  loading ??= import("./languages.ts").then(
    ({ lowlight }) => lowlight,
    (error: unknown) => {
      loading = undefined;
      throw error;
    },
  );
  return loading;
}

function drawn(content: Content): Node {
  if (content.type === "text") return document.createTextNode(visible(content.value));
  const span = h("span");
  if (content.type !== "element") return span;
  const names = content.properties["className"];
  if (Array.isArray(names)) span.className = names.join(" ");
  span.append(...content.children.map(drawn));
  return span;
}
