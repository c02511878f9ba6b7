// What a conversation looked like after any of its events, without folding it from the beginning each time. States are
// never changed in place, so keeping one costs no more than what differs in it.

import { EMPTY, reduce, type State, type StoredEvent } from "@tapeline/client";

import type { Logged } from "./timeline.ts";

const EVENTS_BETWEEN = 250; // two states that are kept

export class Film {
  readonly #events: StoredEvent[] = [];
  readonly #kept: State[] = [EMPTY]; // after 0, EVENTS_BETWEEN, 2 × EVENTS_BETWEEN… events
  #end: State = EMPTY;
  #shown: { after: number; state: State } = { after: 0, state: EMPTY };

  append(logged: Logged): void {
    const event = logged as unknown as StoredEvent; // as far as `reduce` knows its type
    this.#events.push(event);
    this.#end = reduce(this.#end, event);
    if (this.#events.length % EVENTS_BETWEEN === 0) this.#kept.push(this.#end);
  }

  /** The state after the first `count` events. */
  after(count: number): State {
    if (count === this.#events.length) return this.#end;
    const nearest = Math.floor(count / EVENTS_BETWEEN);
    let from = { after: nearest * EVENTS_BETWEEN, state: this.#kept[nearest]! };
    if (this.#shown.after <= count && this.#shown.after > from.after) from = this.#shown; // playing, from there on
    let { state } = from;
    for (let at = from.after; at < count; at += 1) state = reduce(state, this.#events[at]!);
    this.#shown = { after: count, state };
    return state;
  }
}
