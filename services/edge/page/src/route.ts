// Where the person is: `#` or `#/` a new chat, `#<id>` a conversation, `#<id>/replay` its replay.

export interface Route {
  /** The conversation's; empty: a new one. */
  id: string;
  view: "chat" | "replay";
}

export function parse(hash: string): Route {
  const [id = "", view] = hash.replace(/^#/, "").split("/");
  return { id: decoded(id), view: id && view === "replay" ? "replay" : "chat" };
}

export function href({ id, view }: Route): string {
  return `#${encodeURIComponent(id)}${view === "replay" ? "/replay" : ""}`;
}

function decoded(part: string): string {
  try {
    return decodeURIComponent(part);
  } catch {
    return part; // a stray %: no conversation has such an id, and the server says so
  }
}
