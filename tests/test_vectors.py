"""The fold, and the client's reducer held against it: the vectors, every beginning of them, and thousands of chains of
events that nobody would write.
"""

import asyncio
import json
import random
import secrets
from pathlib import Path
from typing import Any

from tapeline.fold import State, fold

from tests import vectors
from tests.vectors import Event

CHAINS = 2_000
EVENTS_MAX = 40
CLIENT = Path(__file__).parent / "client/snapshot.ts"

RUNS = ["r1", "r2", "r3"]
CALLS = ["c1", "c2", "c3"]
WORDS = ["", "a ", "é\n", "\u2028 ", "👩\u200d🚀", "\u202e x\ufeff", "__proto__", "w" * 50]
VALUES: list[Any] = [None, False, 0, "", "constructor", [], {"a": [1]}, {"__proto__": 1}]
WRONG: list[Any] = [
    None,
    True,
    -1,
    0,
    7,
    0.5,
    1.5,
    "",
    "x",
    "0" * 64 + "\n",
    [],
    [None],
    ["x"],
    {},
    {"x": "y"},
    {"x": 2},
]
USAGE = [{}, {"input_tokens": 3}, {"output_tokens": 2, "input_tokens": 1}]
DONE = ["stop", "stopped", "max_steps"]


def test_the_snapshots_of_the_vectors() -> None:
    for path in sorted(vectors.VECTORS.glob("*.json")):
        vector = json.loads(path.read_text())
        assert vector["snapshot"] == vectors.snapshot(vector["events"]), path.name


async def test_the_client_folds_as_the_server_does() -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    chains = [chain(chance) for _ in range(CHAINS)]
    for path in sorted(vectors.VECTORS.glob("*.json")):
        stored = json.loads(path.read_text())["events"]
        parts = [stored[:count] for count in range(1, len(stored) + 1)]
        chains += [(part, fold(vectors.records(part))) for part in parts]
    shown = await client([events for events, _ in chains])
    for (events, state), theirs in zip(chains, shown, strict=True):
        assert theirs == known_to_client(vectors.shown(state)), (seed, events)


async def client(chains: list[list[Event]]) -> list[Any]:
    """What the client makes of each."""
    node = await asyncio.create_subprocess_exec(
        "node", CLIENT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    said, errors = await node.communicate("".join(json.dumps(events) + "\n" for events in chains).encode())
    assert (node.returncode, errors) == (0, b""), errors.decode()
    return [json.loads(line) for line in said.decode().split("\n")[:-1]]


def known_to_client(snapshot: Any) -> Any:
    """Without what no event says; a call that was issued is no longer being written."""
    snapshot["id"] = ""
    del snapshot["messages"]
    for run in snapshot["runs"]:
        for step in run["steps"]:
            issued = {call["call"] for call in step["calls"]}
            step["inputs"] = [one for one in step["inputs"] if one["call"] not in issued]
    return snapshot


def chain(chance: random.Random) -> tuple[list[Event], State]:
    """Events of one conversation, mostly such as fit what came before them, and some that make no sense; and what they
    add up to.
    """
    stored: list[Event] = [{"id": 1, "type": "conversation", "run": "-", "ts": 1, "owner": "me", "title": word(chance)}]
    state = fold(vectors.records(stored))
    for number in range(2, chance.randint(2, EVENTS_MAX)):
        seq = number if chance.random() < 0.95 else chance.randint(1, number)  # again, or out of order
        event = {"id": seq, "ts": chance.randint(1, 1_000), **body(chance, state)}
        if chance.random() < 0.1:
            damage(chance, event)
        stored.append(event)
        if seq > state.last_event_id:
            state = fold(vectors.records([event]), state)
    return stored, state


def damage(chance: random.Random, event: Event) -> None:
    """Makes it an event of a writer that is broken: one that lacks a field, or has something else there."""
    parts: list[Event] = [event, *(part for part in (event.get("stored"), *event.get("calls", [])) if part)]
    part = chance.choice(parts)
    name = chance.choice([name for name in part if name not in ("id", "type")])
    if chance.random() < 0.3:
        del part[name]
    else:
        part[name] = chance.choice(WRONG)


def body(chance: random.Random, state: State) -> Event:
    """One event, without its place."""
    active = state.active
    run = active.run if active and chance.random() < 0.9 else chance.choice([*RUNS, "-", "nobody"])
    newest = state.runs[run].step if run in state.runs else None
    number, attempt = (newest.step, newest.attempt) if newest else (1, 1)
    if chance.random() < 0.1:
        number, attempt = chance.randint(0, 3), chance.randint(0, 3)
    call = {"call": chance.choice(CALLS), "tool": chance.choice(["add", "pay"])}
    in_step: Event = {"run": run, "step": number, "attempt": attempt}
    usual = some(chance, usage=chance.choice(USAGE), first_token_ms=chance.choice([None, 7]))
    match chance.choice(KINDS):
        case "message":
            extras = some(chance, by="me", model="m", replaces=chance.choice([*RUNS, ""]), on_busy="queue")
            return {"type": "message", "run": chance.choice(RUNS), "content": word(chance), **extras}
        case "title" | "conversation" as kind:
            return {"type": kind, "run": "-", "owner": "you", "title": word(chance)}
        case "deleted":
            return {"type": "deleted", "run": "-"} if chance.random() < 0.1 else {"type": "later", "run": run}
        case "stop":
            return {"type": "stop", "run": run}
        case "step":
            if newest is None or chance.random() < 0.5:
                in_step |= {"step": number + (newest is not None), "attempt": 1}
            else:
                in_step |= {"attempt": attempt + 1}
            extras = some(chance, text=word(chance), thinking=word(chance), model="n", delivery=2)
            return {"type": "step", **in_step, "worker": "w", "trigger": 1, **extras}
        case "token" | "thinking" as kind:
            return {"type": kind, **in_step, "text": word(chance)}
        case "tool_input":
            return {"type": "tool_input", **in_step, **call, "text": word(chance)}
        case "answer":
            asked = [
                {"call": one, "tool": "add", "arguments": chance.choice(VALUES)}
                for one in chance.choices(CALLS, k=chance.randint(0, 3))
            ]
            extras = some(chance, text=word(chance), thinking=word(chance), calls=asked)
            return {"type": "answer", **in_step, "finish": "stop", **extras, **usual}
        case "tool_call":
            given = {"arguments": chance.choice(VALUES), "deadline": chance.randint(1, 9)}
            return {"type": "tool_call", **in_step, **call, **given, **some(chance, needs_approval=True, timeout_ms=5)}
        case "approval":
            verdict = {"approved": chance.random() < 0.7, **some(chance, arguments={"x": 1}, reason="so", by="me")}
            return {"type": "approval", "run": run, "call": call["call"], **verdict}
        case "tool_started":
            extras = some(chance, attempt=2, delivery=3, idempotent=True)
            return {"type": "tool_started", "run": run, **call, "worker": "t", **extras}
        case "tool_progress":
            extras = some(chance, fraction=0.5, message="half", text=word(chance))
            return {"type": "tool_progress", "run": run, **call, **extras}
        case "tool_result":
            stored = {"bytes": 1, "sha256": "0" * 64, "chunks": 1, "attempt": 1, "preview": "p"}
            extras = some(chance, is_error=True, content=chance.choice(VALUES), stored=stored, message="m")
            return {"type": "tool_result", "run": run, **call, "outcome": "ok", **extras}
        case "error":
            return {"type": "error", **in_step, "code": "c", "message": "m", **some(chance, retryable=True), **usual}
        case _:
            return {"type": "done", **in_step, "reason": chance.choice(DONE), **usual, **some(chance, duration_ms=8)}


OFTEN = ["message", "step", "token", "token", "thinking", "tool_input", "answer", "tool_call", "tool_call"]
OFTEN += ["tool_started", "tool_progress", "tool_result", "approval"]
KINDS = [*OFTEN * 3, "stop", "done", "error", "title", "conversation", "deleted"]


def some(chance: random.Random, **fields: Any) -> Event:
    """Some of these fields, which are all optional."""
    return {key: value for key, value in fields.items() if chance.random() < 0.5}


def word(chance: random.Random) -> str:
    return chance.choice(WORDS)
