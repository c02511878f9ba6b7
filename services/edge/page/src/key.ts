// The bearer key, where the deployment wants one: asked for when it is needed, kept until the tab is closed.

import { ask } from "./dialog.ts";
import { keep, recall } from "./storage.ts";

/** The key, for the client; with the one that was `refused` ("": there was none), another. Undefined: there is none. */
export async function bearer(refused?: string): Promise<string | undefined> {
  if (refused === undefined) return recall("session", "key") ?? undefined;
  const key = await ask({
    title: "This deployment asks for a key",
    text: refused
      ? "That key was not accepted. Please check it, or ask whoever runs this for another."
      : "It is sent as a bearer token and kept until you close this tab.",
    label: "Key",
    secret: true,
    action: "Continue",
  });
  if (key) keep("session", "key", key);
  return key || undefined;
}
