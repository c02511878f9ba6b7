// Asks the edge at `line` and reads along in a chat, though `line` cuts every connection; `direct` is the same edge with
// nothing in between. Prints what was read as JSON: {asked, events, stored}. tests/test_client.py runs it.

import assert from "node:assert/strict";
import { Tapeline, fold, fromSnapshot } from "../../shared/client/src/index.ts";

const [line = "", direct = "", content = ""] = process.argv.slice(2);
const times = { retryMs: 1, backoffMaxMs: 20 };
const over = new Tapeline({ url: line, times });
const there = new Tapeline({ url: direct });
const { id } = await there.create();

const chat = over.chat(id);
const asked = await Array.fromAsync(over.ask(id, content));
const last = asked.at(-1)?.id ?? NaN;
await new Promise<void>((resolve) => {
  const look = () => chat.state.last_event_id >= last && resolve();
  chat.subscribe(look);
  look();
});
chat.close();

const run = asked[0]?.run;
const events = await Array.fromAsync(over.events(id, { run }));
const stored = await Array.fromAsync(there.stored(id));
const fresh = fromSnapshot(await there.snapshot(id));
assert.deepEqual(chat.state, fresh, "the chat is what the server folds");
assert.deepEqual(fold(stored).runs, fresh.runs);
console.log(JSON.stringify({ id, asked, events, stored: stored.map(({ id }) => id) }));
