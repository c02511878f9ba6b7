// The person's conversations, as the server lists them: newest first, more of them on scrolling down.

import { Refused, type Tapeline } from "@tapeline/client";

import { ask } from "./dialog.ts";
import { find, h, keyed, setText, type View } from "./dom.ts";
import { icon } from "./icon.ts";
import { changed, grouped, merged, renewed, type Entry, type Group } from "./list.ts";
import { reason } from "./problem.ts";
import { href } from "./route.ts";

const PAGE_SIZE = 40;
const MORE_PX = 400; // so far before its end the list goes on

export interface Sidebar {
  /** Asks the server again, for what other tabs and devices have done. */
  refresh(): Promise<void>;
  /** The conversation that is open. */
  mark(id: string): void;
  began(id: string, title: string): void;
  titled(id: string, title: string): void;
  gone(id: string): void;
}

/** `onGone`: the person has deleted a conversation. Whoever has one open hears of its new title by itself. */
export function sidebar(tapeline: Tapeline, onGone: (id: string) => void): Sidebar {
  const list = find("list", HTMLElement);
  const end = find("list-end", HTMLElement);
  const problem = find("list-problem", HTMLElement);
  let entries: readonly Entry[] = [];
  let next: string | null = null; // where the list goes on
  let current = "";
  let loading: Promise<void> | null = null;
  let wantsKey = false; // and the person gave none: they are not asked each time they come back
  const changes = new Map<string, Entry | null>(); // since the server was asked, which may not know of them

  const update = keyed<Group, string>(list, (group) => group.name, () => groupView({ rename, remove }), () => false);
  const show = () => update(grouped(entries, Date.now()), current);

  function set(all: readonly Entry[]): void {
    entries = all;
    show();
  }

  /** null: it is no more. */
  function change(id: string, entry: Entry | null): void {
    changes.set(id, entry);
    set(changed(entries, new Map([[id, entry]])));
  }

  function load(before?: string): Promise<void> {
    if (!loading) changes.clear();
    loading ??= tapeline
      .conversations({ limit: PAGE_SIZE, ...(before ? { before } : {}) })
      .then(
        (page) => {
          if (before) next = page.next;
          else if (page.next === null || !next) next = page.next;
          const { conversations } = page;
          const all = before ? merged(entries, conversations) : renewed(entries, conversations, page.next === null);
          set(changed(all, changes));
          problem.hidden = true;
          wantsKey = false;
        },
        (error: unknown) => {
          const again = h("button", { type: "button", onclick: () => void load() }, "Try again");
          problem.replaceChildren(reason(error, "Your conversations could not be loaded."), " ", again);
          problem.hidden = false;
          wantsKey = error instanceof Refused && error.status === 401;
        },
      )
      .finally(() => {
        loading = null;
        sight.unobserve(end); // and look again: the end may still be in sight
        if (next !== null && problem.hidden) sight.observe(end);
      });
    return loading;
  }

  const sight = new IntersectionObserver(
    ([seen]) => {
      if (seen?.isIntersecting && next !== null) void load(next);
    },
    { root: find("list-scroll", HTMLElement), rootMargin: `${MORE_PX}px` },
  );

  async function rename({ id, title }: Entry): Promise<void> {
    const wanted = await ask({ title: "Rename the conversation", label: "Title", value: title, action: "Rename" });
    if (!wanted || wanted === title) return;
    try {
      await tapeline.rename(id, wanted);
      titled(id, wanted);
    } catch (error) {
      void tell("It was not renamed", reason(error, "The server could not be reached. Try again."));
    }
  }

  async function remove({ id, title }: Entry): Promise<void> {
    const text = `“${title}” will be gone on all your devices, and cannot be brought back.`;
    if ((await ask({ title: "Delete the conversation?", text, action: "Delete", danger: true })) === null) return;
    try {
      await tapeline.delete(id);
      gone(id);
      find("new", HTMLButtonElement).focus(); // what had the focus is no more
      onGone(id);
    } catch (error) {
      void tell("It was not deleted", reason(error, "The server could not be reached. Try again."));
    }
  }

  function tell(title: string, text: string): Promise<string | null> {
    return ask({ title, text, action: "OK" });
  }

  function gone(id: string): void {
    change(id, null);
  }

  function titled(id: string, title: string): void {
    const known = entries.find((entry) => entry.id === id);
    if (known && known.title !== title) change(id, { ...known, title });
  }

  return {
    refresh: async () => {
      if (!wantsKey) await load();
    },
    mark(id) {
      current = id;
      show();
    },
    began(id, title) {
      change(id, { id, title, created_ts: Date.now() });
      if (wantsKey) void load(); // there is one now
    },
    titled,
    gone,
  };
}

interface EntryActs {
  rename(entry: Entry): Promise<void>;
  remove(entry: Entry): Promise<void>;
}

function groupView(acts: EntryActs): View<Group, string> {
  const title = h("h2");
  const list = h("ul");
  const update = keyed<Entry, string>(list, (entry) => entry.id, () => entryView(acts));
  return {
    node: h("section.group", {}, title, list),
    update({ name, entries }, current) {
      setText(title, name);
      update(entries, current);
    },
  };
}

function entryView(acts: EntryActs): View<Entry, string> {
  let shown: Entry;
  const link = h("a");
  const rename = h("button.plain", { type: "button", onclick: () => void acts.rename(shown) }, icon("edit"));
  const remove = h("button.plain", { type: "button", onclick: () => void acts.remove(shown) }, icon("remove"));
  return {
    node: h("li", {}, link, rename, remove),
    update(entry, current) {
      shown = entry;
      const title = entry.title || "New chat"; // nobody has said anything there yet
      link.href = href({ id: entry.id, view: "chat" });
      setText(link, title);
      link.title = title;
      if (entry.id === current) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
      for (const [button, verb] of [[rename, "Rename"], [remove, "Delete"]] as const) {
        button.title = verb;
        button.setAttribute("aria-label", `${verb} “${title}”`);
      }
    },
  };
}
