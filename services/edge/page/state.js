// What a conversation is, folded from its events. Pure: no DOM, no clock, no I/O; a state is never changed in
// place, so whoever draws it can tell by identity what is new. Field names are those of the HTTP API.

export const EMPTY = Object.freeze({ id: "", title: "", model: "", last_event_id: 0, runs: [] });

const NEW_RUN = {
  status: "active", // queued | active | done | error
  model: "",
  steps: [],
  stopping: false, // somebody asked; the run has not ended yet
  reason: "",
  error: null,
  usage: {},
  first_token_ms: null,
  duration_ms: null,
};
const NEW_STEP = {
  attempt: 1,
  text: "",
  thinking: "",
  finish: null, // null while the model is still writing it
  calls: [],
  superseded: false, // what is shown is an earlier attempt's, until the new one's first delta
};
const NOTHING = { text: "", thinking: "", calls: [], superseded: false };
const NEW_CALL = {
  arguments: null,
  input: "", // the arguments as the model writes them
  status: "writing", // writing | pending | running | done
  needs_approval: false,
  approved: null,
  outcome: null,
  is_error: false,
  content: null,
  message: "",
  progress: null,
  started_ts: null,
  duration_ms: null,
  deadline: null,
};

/** The state a snapshot of the server describes. */
export function fromSnapshot(snapshot) {
  return {
    ...EMPTY,
    ...present(snapshot),
    last_event_id: Number(snapshot.last_event_id),
    runs: (snapshot.runs ?? []).map((run) => ({
      ...NEW_RUN,
      ...present(run),
      stopping: Boolean(run.stopped) && !ended(run),
      steps: (run.steps ?? []).map((step) => ({
        ...NEW_STEP,
        ...present(step),
        calls: [
          ...(step.calls ?? []).map((call) => ({ ...NEW_CALL, status: "pending", ...present(call) })),
          ...(step.inputs ?? []).map(({ call, tool, text }) => ({ ...NEW_CALL, call, tool, input: text })),
        ],
      })),
    })),
  };
}

/** The state after `event`. An event that has been applied already, or of an unknown type, changes nothing. */
export function reduce(state, event) {
  if (!(event.id > state.last_event_id)) return state;
  const apply = Object.hasOwn(EVENTS, event.type) ? EVENTS[event.type] : (same) => same;
  return { ...apply(state, event), last_event_id: event.id };
}

/** The run that is under way, if any. */
export function activeRun(state) {
  return state.runs.find((run) => run.status === "active") ?? state.runs.find((run) => run.status === "queued");
}

const EVENTS = {
  conversation: (state, { title = "", model = "" }) => ({ ...state, title, model }),

  message(state, event) {
    if (state.runs.some((run) => run.run === event.run)) return state;
    const { content, by = "", ts, id } = event;
    const run = {
      ...NEW_RUN,
      run: event.run,
      status: activeRun(state) ? "queued" : "active",
      model: event.model || state.model,
      message: { content, by, ts, event_id: id },
    };
    return { ...state, runs: [...state.runs, run] };
  },

  stop: (state, event) => inRun(state, event, (run) => (ended(run) ? run : { ...run, stopping: true })),

  step: (state, event) =>
    inStep(
      inRun(state, event, (run) => ({
        ...run,
        status: ended(run) ? run.status : "active",
        model: event.model || run.model,
      })),
      event,
      (step) =>
        event.attempt > step.attempt
          ? event.resume === "continue"
            ? { ...step, attempt: event.attempt, finish: null, text: event.text ?? "", thinking: event.thinking ?? "" }
            : { ...step, attempt: event.attempt, finish: null, superseded: true }
          : step,
    ),

  thinking: (state, event) =>
    delta(state, event, (step) => ({ ...step, thinking: step.thinking + event.text })),

  token: (state, event) => delta(state, event, (step) => ({ ...step, text: step.text + event.text })),

  tool_input: (state, event) =>
    delta(state, event, (step) => ({
      ...step,
      calls: upsert(step.calls, event, (call) => ({ ...call, input: call.input + event.text })),
    })),

  answer: (state, event) =>
    inStep(state, event, (step) => ({
      ...step,
      text: event.text ?? "",
      thinking: event.thinking ?? "",
      finish: event.finish,
      superseded: false,
      calls: (event.calls ?? []).map((asked) => ({
        ...NEW_CALL,
        ...step.calls.find((call) => call.call === asked.call),
        ...asked,
        status: "pending",
      })),
    })),

  tool_call: (state, event) =>
    inStep(state, event, (step) => ({
      ...step,
      calls: upsert(step.calls, event, (call) => ({
        ...call,
        arguments: event.arguments,
        deadline: event.deadline,
        needs_approval: event.needs_approval ?? false,
        status: "pending",
      })),
    })),

  approval: (state, event) =>
    inCall(state, event, (call) => ({
      ...call,
      approved: event.approved,
      arguments: event.arguments ?? call.arguments,
    })),

  tool_started: (state, event) =>
    inCall(state, event, (call) => ({ ...call, status: "running", started_ts: event.ts, progress: null })),

  tool_progress: (state, event) =>
    inCall(state, event, (call) => ({
      ...call,
      progress: { fraction: event.fraction ?? null, message: event.message ?? "" },
    })),

  tool_result: (state, event) =>
    inCall(state, event, (call) => ({
      ...call,
      status: "done",
      outcome: event.outcome,
      is_error: event.is_error ?? false,
      content: event.content ?? null,
      message: event.message ?? "",
      duration_ms: event.duration_ms ?? 0,
      progress: null,
    })),

  error: (state, event) =>
    end(state, event, {
      status: "error",
      error: { code: event.code, message: event.message, retryable: event.retryable ?? false },
    }),

  done: (state, event) => end(state, event, { status: "done", reason: event.reason }),
};

/** Whether `run` has its terminal event. */
export function ended(run) {
  return run.status === "done" || run.status === "error";
}

function end(state, event, how) {
  const { usage = {}, first_token_ms = null, duration_ms = 0 } = event;
  const over = inRun(state, event, (run) => ({
    ...run,
    ...how,
    steps: run.steps.map((step) => (step.superseded ? { ...step, ...NOTHING } : step)),
    stopping: false,
    usage,
    first_token_ms,
    duration_ms,
  }));
  const next = activeRun(over); // a queue needs no event of its own
  return next?.status === "queued" ? inRun(over, next, (run) => ({ ...run, status: "active" })) : over;
}

function inRun(state, event, change) {
  return { ...state, runs: state.runs.map((run) => (run.run === event.run ? change(run) : run)) };
}

function inStep(state, event, change) {
  return inRun(state, event, (run) => {
    const known = run.steps.some((step) => step.step === event.step);
    const steps = known ? run.steps : [...run.steps, { ...NEW_STEP, step: event.step, attempt: event.attempt }];
    return { ...run, steps: steps.map((step) => (step.step === event.step ? change(step) : step)) };
  });
}

function delta(state, event, append) {
  return inStep(state, event, (step) => {
    if (event.attempt < step.attempt) return step;
    if (!step.superseded) return append(step);
    return append({ ...step, ...NOTHING });
  });
}

function inCall(state, event, change) {
  const isMeant = (call) => call.call === event.call && call.status !== "done";
  return inRun(state, event, (run) => ({
    ...run,
    steps: run.steps.map((step) =>
      step.calls.some(isMeant)
        ? { ...step, calls: step.calls.map((call) => (isMeant(call) ? change(call) : call)) }
        : step,
    ),
  }));
}

function upsert(calls, event, change) {
  const known = calls.some((call) => call.call === event.call);
  const all = known ? calls : [...calls, { ...NEW_CALL, call: event.call, tool: event.tool }];
  return all.map((call) => (call.call === event.call ? change(call) : call));
}

function present(record) {
  return Object.fromEntries(Object.entries(record).filter(([, value]) => value !== null && value !== undefined));
}
