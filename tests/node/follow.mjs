// Follows a URL with npm's `eventsource`, listening for the named events, and says what it hears: a line of JSON for
// each event, and for each loss of the connection. Ends when the EventSource does.
import { EventSource } from "eventsource";

const [url, ...names] = process.argv.slice(2);
const source = new EventSource(url);
const say = (heard) => process.stdout.write(`${JSON.stringify(heard)}\n`);

for (const name of names) {
  source.addEventListener(name, ({ lastEventId, data }) => {
    if (data !== undefined) say({ id: lastEventId, event: name, data });
  });
}

// An event of ours may be called `error`, too; the EventSource's own has no data.
source.addEventListener("error", ({ code, data }) => {
  if (data === undefined) say({ lost: code ?? null, closed: source.readyState === EventSource.CLOSED });
});
