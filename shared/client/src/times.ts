// How long everything may take. All in milliseconds; `new Tapeline({times: {…}})` changes them.

export interface Times {
  /** Until a request has its response: the server answers at once. */
  connectMs: number;
  /** Without a byte of a response: the server's heartbeats come every 15 s, so the connection is dead. */
  silenceMs: number;
  /** Silence that is suspicious once somebody looks again, or a device that has slept for as long is awake. */
  staleMs: number;
  /** After which a hidden tab gives the connections back that have no end: browsers allow six to a host. */
  hiddenMs: number;
  /** Between the first tries when the network is back: a device says so before it works. */
  settleMs: number;
  /** From the end of a connection to the next, until the server says `retry:`. */
  retryMs: number;
  /** The longest to which that is doubled; up to half as long again is left to chance. */
  backoffMaxMs: number;
  /** A connection that lasts so long was a good one, though no event came. */
  steadyMs: number;
  /** Failing for so long without one good connection is being lost. */
  giveUpMs: number;
}

export const TIMES: Times = Object.freeze({
  connectMs: 15_000,
  silenceMs: 40_000,
  staleMs: 20_000,
  hiddenMs: 60_000,
  settleMs: 250,
  retryMs: 1_000,
  backoffMaxMs: 30_000,
  steadyMs: 5_000,
  giveUpMs: 600_000,
});

/** The longest that is waited because a server asks for it. */
export const RETRY_AFTER_MAX_MS = 3_600_000;
