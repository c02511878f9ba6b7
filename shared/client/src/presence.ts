// What a connection cannot see by itself: whether there is a network, and whether anybody looks.

import type { Times } from "./times.ts";

/** The network came or went; nobody looks any more, or somebody does again; somebody wants it now. */
export type News = "online" | "offline" | "hidden" | "seen" | "asked";

/** How often it is looked whether time has passed unnoticed: the device has slept. */
const TICK_MS_MAX = 5_000;

/** Told by `watch` or by hand, heard by `follow`. */
export class Presence {
  #isOffline = false;
  #isPaused = false;
  readonly #listeners = new Set<(news: News) => void>();

  /** The device says that it has no network. It may be wrong: now and then it is tried all the same. */
  get isOffline(): boolean {
    return this.#isOffline;
  }

  /** Nobody looks: the server is left alone until somebody does. */
  get isPaused(): boolean {
    return this.#isPaused;
  }

  subscribe(listener: (news: News) => void): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  /** The network came or went: whatever connection there was is a thing of the past. */
  network(isThere: boolean): void {
    this.#isOffline = !isThere;
    this.#tell(isThere ? "online" : "offline");
  }

  pause(): void {
    this.#isPaused = true;
    this.#tell("hidden");
  }

  /** Somebody looks, perhaps after a sleep: a connection that has long been silent may be a dead one. */
  look(): void {
    this.#isPaused = false;
    this.#tell("seen");
  }

  /** Somebody wants a new connection now, whatever the server asked for. */
  refresh(): void {
    this.#isPaused = false;
    this.#tell("asked");
  }

  #tell(news: News): void {
    for (const listener of this.#listeners) listener(news);
  }
}

/** Tells `presence` what a device and a browser know; returns how to stop that. */
export function watch(presence: Presence, { staleMs, hiddenMs }: Pick<Times, "staleMs" | "hiddenMs">): () => void {
  const stop = new AbortController();
  const { signal } = stop;
  const isBrowser = typeof document !== "undefined" && typeof window !== "undefined";
  let hidden: ReturnType<typeof setTimeout> | undefined;

  // Timers stand still while a device sleeps; its clock does not. A hidden tab's run when the browser likes.
  let checkedAt = Date.now();
  const ticking: unknown = setInterval(
    () => {
      const passedMs = Date.now() - checkedAt;
      checkedAt += passedMs;
      if (passedMs >= staleMs && !(isBrowser && document.hidden)) presence.look();
    },
    Math.min(staleMs / 4, TICK_MS_MAX),
  );
  (ticking as { unref?: () => void }).unref?.(); // no reason for Node to live on
  signal.addEventListener("abort", () => clearInterval(ticking as number));
  if (isBrowser) {
    const look = () => {
      clearTimeout(hidden);
      if (!document.hidden) presence.look();
      else if (hiddenMs < Infinity) hidden = setTimeout(() => presence.pause(), hiddenMs);
    };
    window.addEventListener("online", () => presence.network(true), { signal });
    window.addEventListener("offline", () => presence.network(false), { signal });
    window.addEventListener("pageshow", look, { signal });
    document.addEventListener("visibilitychange", look, { signal });
    document.addEventListener("resume", look, { signal }); // after a freeze, which some browsers give a hidden tab
    if (!navigator.onLine) presence.network(false);
    look();
  }
  return () => {
    clearTimeout(hidden);
    stop.abort();
  };
}
