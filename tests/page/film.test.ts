// Any moment of a long log is near: what it looked like is the fold of all before it, and little of that is folded again.

import assert from "node:assert/strict";
import { test } from "node:test";
import { Film } from "../../services/edge/page/src/film.ts";
import type { Logged } from "../../services/edge/page/src/timeline.ts";
import type { StoredEvent } from "../../shared/client/src/conversation.ts";
import { EMPTY, fold } from "../../shared/client/src/state.ts";

const EVENTS = 5_000;
const FOLDED_MAX = 250; // as film.ts keeps a state after so many

test("a moment anywhere is the fold up to it, and folds no more than there is between two states that are kept", () => {
  const folded = new Set<number>();
  const said: Logged[] = [{ id: 1, type: "message", run: "r", ts: 1, content: "go" }];
  said.push({ id: 2, type: "step", run: "r", ts: 2, step: 1, attempt: 1, worker: "w", trigger: 1 });
  for (let id = 3; id <= EVENTS; id += 1) {
    said.push({ id, type: "token", run: "r", ts: id, step: 1, attempt: 1, text: `word${id} ` });
  }
  const film = new Film();
  for (const { type, ...event } of said) {
    film.append({
      ...event,
      get type() {
        folded.add(event.id);
        return type;
      },
    });
  }
  for (const count of [0, 1, 2, 249, 250, 251, 4_999, 17, 2_600, 2_601, 2_550, EVENTS, 1_249]) {
    folded.clear();
    const { runs } = film.after(count);
    assert.ok(folded.size <= FOLDED_MAX, `${folded.size} events for the moment after ${count}`);
    assert.deepEqual(runs, fold(said.slice(0, count) as unknown as StoredEvent[], EMPTY).runs);
  }
});
