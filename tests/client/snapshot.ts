// A state as the server would show it: the opposite of `fromSnapshot`, without `messages`. As a program it reads lines
// of JSON, each the events of a conversation, and writes what each adds up to.

import { createInterface } from "node:readline";

import type { State, StoredEvent } from "../../shared/client/src/conversation.ts";
import { fold } from "../../shared/client/src/state.ts";

export function toSnapshot({ deleted: _, phase: __, runs, ...about }: State) {
  return {
    ...about,
    runs: runs.map(({ phase: _, steps, ...run }) => ({
      ...run,
      steps: steps.map(({ superseded: _, fresh, ...shown }) => {
        const { calls, ...step } = { ...shown, ...fresh };
        return {
          ...step,
          calls: calls.filter((call) => call.status !== "writing").map(({ input: _, ...call }) => call),
          inputs: calls
            .filter((call) => call.status === "writing" && step.finish === null)
            .map(({ call, tool, input }) => ({ call, tool, text: input })),
        };
      }),
    })),
  };
}

if (process.argv[1] === import.meta.filename) {
  for await (const line of createInterface({ input: process.stdin })) {
    const events: StoredEvent[] = JSON.parse(line);
    console.log(JSON.stringify(toSnapshot(fold(events))));
  }
}
