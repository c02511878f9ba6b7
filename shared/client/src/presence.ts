// What a connection cannot see by itself: whether there is a network, and whether anybody looks.

import type { Times } from "./times.ts";

/** Told by `watch` or by hand, heard by `follow`. */
export class Presence {
  #isOffline = false;
  #isPaused = false;
  readonly #listeners = new Set<(silentMs: number) => void>();

  /** The device says that it has no network. It may be wrong: now and then it is tried all the same. */
  get isOffline(): boolean {
    return this.#isOffline;
  }

  /** Nobody looks: the server is left alone until `refresh`. */
  get isPaused(): boolean {
    return this.#isPaused;
  }

  /** `listener` hears of every change; a connection that has been silent for `silentMs` is to be replaced. */
  subscribe(listener: (silentMs: number) => void): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  /** The network came or went: whatever connection there was is a thing of the past. */
  network(isThere: boolean): void {
    this.#isOffline = !isThere;
    this.#tell(0);
  }

  pause(): void {
    this.#isPaused = true;
    this.#tell(0);
  }

  /** Connect now: at once if waiting, anew if the connection has been silent for `silentMs`. */
  refresh(silentMs = 0): void {
    this.#isPaused = false;
    this.#tell(silentMs);
  }

  #tell(silentMs: number): void {
    for (const listener of this.#listeners) listener(silentMs);
  }
}

/** Tells `presence` what a browser knows; returns how to stop that. Where there is no browser it does nothing. */
export function watch(presence: Presence, { staleMs, hiddenMs }: Pick<Times, "staleMs" | "hiddenMs">): () => void {
  if (typeof document === "undefined" || typeof window === "undefined") return () => {};
  const stop = new AbortController();
  const { signal } = stop;
  let hidden: ReturnType<typeof setTimeout> | undefined;

  const look = () => {
    clearTimeout(hidden);
    if (!document.hidden) presence.refresh(staleMs);
    else if (hiddenMs < Infinity) hidden = setTimeout(() => presence.pause(), hiddenMs);
  };
  window.addEventListener("online", () => presence.network(true), { signal });
  window.addEventListener("offline", () => presence.network(false), { signal });
  window.addEventListener("pageshow", look, { signal });
  document.addEventListener("visibilitychange", look, { signal });
  document.addEventListener("resume", look, { signal }); // after a freeze, which some browsers give a hidden tab
  if (!navigator.onLine) presence.network(false);
  look();
  return () => {
    clearTimeout(hidden);
    stop.abort();
  };
}
