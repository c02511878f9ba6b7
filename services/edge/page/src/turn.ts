// A conversation as it is read: one run for each turn, with the versions of it that others replaced. Pure.

import type { Run } from "@tapeline/client";

export interface Turn {
  run: Run;
  /** All versions of this turn, the oldest first; `run` is one of them. */
  versions: readonly Run[];
  index: number;
  /** The run before it, for `chosen`; "" where it is the first. */
  after: string;
  /** Whether the model counts it: what is said next follows it. */
  counts: boolean;
}

/**
 * The turns of the branch that is shown. A run that replaces another takes the place of that one and of all after it.
 * `chosen` names the run wanted after each run; without a wish it is the newest.
 */
export function turns(runs: readonly Run[], chosen: ReadonlyMap<string, string>): Turn[] {
  const following = new Map<string, Run[]>();
  const branch: Run[] = []; // what counts, as the server has it
  for (const run of runs) {
    const replaced = run.replaces && runs.find((other) => other.run === run.replaces);
    if (replaced) while (branch.length && branch.at(-1)!.message.event_id >= replaced.message.event_id) branch.pop();
    const after = branch.at(-1)?.run ?? "";
    following.set(after, [...(following.get(after) ?? []), run]);
    branch.push(run);
  }
  const shown: Turn[] = [];
  for (let after = "", versions = following.get(after); versions; versions = following.get(after)) {
    const wanted = versions.findIndex((run) => run.run === chosen.get(after));
    const index = wanted < 0 ? versions.length - 1 : wanted;
    const run = versions[index]!;
    shown.push({ run, versions, index, after, counts: branch.includes(run) });
    after = run.run;
  }
  return shown;
}

/** Whether two turns look alike. */
export function sameTurn(a: Turn, b: Turn): boolean {
  return a.run === b.run && a.index === b.index && a.versions.length === b.versions.length && a.counts === b.counts;
}

/** A run by itself, as when its conversation is only looked at. */
export function alone(run: Run): Turn {
  return { run, versions: [run], index: 0, after: "", counts: false };
}
