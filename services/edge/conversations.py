"""Conversations and their runs: create, show, say something, stop. Each is one fenced decision on the log, so
two edges that are asked at the same instant agree.
"""

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from tapeline import events, subjects, telemetry
from tapeline.append import Chain, Overtaken
from tapeline.clock import now_ms
from tapeline.fold import RunState, State
from tapeline.replay import load, snapshot
from tapeline.tape import Tape

from .body import NewConversation, NewMessage
from .problem import Problem, not_found


@dataclass(frozen=True)
class Posted:
    """A message that is on the tape, and the run it started."""

    run: str
    event_id: int


class Conversations:
    """The edge's side of the log, for one user at a time. Every call raises `Problem` and `Unavailable`."""

    def __init__(self, tape: Tape) -> None:
        self._tape = tape

    async def create(self, user: str, new: NewConversation) -> tuple[str, int]:
        """Begins a conversation; its id and the sequence of its first event."""
        conversation = new.id or secrets.token_hex(12)
        about = events.Conversation(
            run=events.NO_RUN,
            ts=now_ms(),
            owner=user,
            title=new.title,
            system=new.system,
            model=new.model,
            tools=new.tools,
            metadata=new.metadata,
        )
        try:
            seq = await self._append(conversation, 0, [about])
        except Overtaken as overtaken:
            raise Problem(409, "exists", "There is a conversation with this id already.") from overtaken
        return conversation, seq

    async def owned(self, user: str, conversation: str) -> State:
        """The conversation's state from its facts, if it is the user's."""
        return _of(user, await load(self._tape, conversation))

    async def shown(self, user: str, conversation: str) -> dict[str, Any]:
        """What a reader loads before it follows after `last_event_id`."""
        state = _of(user, await snapshot(self._tape, conversation))
        about = state.about
        assert about is not None
        return {
            "id": conversation,
            "title": about.title,
            "owner": about.owner,
            "system": about.system,
            "model": about.model,
            "tools": about.tools,
            "metadata": about.metadata,
            "created_ts": about.ts,
            "last_event_id": state.last_event_id,
            "messages": [message for run in state.runs.values() for message in _messages(run)],
            "runs": [msgspec.to_builtins(run) for run in state.runs.values()],
        }

    async def post(self, user: str, conversation: str, new: NewMessage, key: str | None) -> Posted:
        """Puts a message on the tape, unless a run is active and `on_busy` says not to. The same key, the same run."""
        run = _run_id(user, conversation, key)
        while True:
            state = await self.owned(user, conversation)
            if earlier := state.runs.get(run):
                if earlier.message.content != new.content:
                    raise Problem(422, "idempotency_mismatch", "This `Idempotency-Key` was used for another message.")
                return Posted(run, earlier.message.event_id)
            entries: list[events.Event] = []
            if active := state.active:
                if new.on_busy == "reject":
                    raise Problem(
                        409,
                        "busy",
                        "A run is active. Wait for it, stop it, or send `on_busy`: `queue` or `interrupt`.",
                        run=active.run,
                    )
                if new.on_busy == "interrupt" and not active.stopped:
                    entries.append(events.Stop(run=active.run, ts=now_ms(), by=user, reason="interrupted"))
            entries.append(
                events.Message(run=run, ts=now_ms(), content=new.content, by=user, model=new.model, on_busy=new.on_busy)
            )
            try:
                return Posted(run, await self._append(conversation, state.last_event_id, entries))
            except Overtaken:
                continue  # something happened meanwhile: decide again

    async def stop(self, user: str, conversation: str, run: str, reason: str) -> None:
        """Stops a run; one that is stopped or has ended stays as it is."""
        while True:
            state = await self.owned(user, conversation)
            found = run_in(state, run)
            if found.ended or found.stopped:
                return
            stop = events.Stop(run=run, ts=now_ms(), by=user, reason=reason)
            try:
                await self._append(conversation, state.last_event_id, [stop])
            except Overtaken:
                continue
            return

    async def _append(self, conversation: str, after: int, entries: Sequence[events.Event]) -> int:
        """Appends right after what was decided on, but for deltas, which change no decision of the edge."""
        chain = Chain(self._tape, conversation, after, lambda record: record.is_fact)
        batch = [(subjects.INPUT, event) for event in entries]
        return (await chain.commit(batch, telemetry.carrier()))[-1]


def run_in(state: State, run: str) -> RunState:
    """The run, or 404."""
    found = state.runs.get(run)
    if found is None:
        raise Problem(404, "unknown_run", "There is no such run in this conversation.")
    return found


def _of(user: str, state: State) -> State:
    if state.about is None or state.about.owner != user:
        raise not_found()
    return state


def _run_id(user: str, conversation: str, key: str | None) -> str:
    if key is None:
        return secrets.token_hex(10)
    return hashlib.sha256(f"{user}\n{conversation}\n{key}".encode()).hexdigest()[:20]


def _messages(run: RunState) -> list[dict[str, Any]]:
    """The run as plain messages: what the user said, and what was answered, if anything was."""
    said = {"role": "user", "content": run.message.content, "run": run.run, "ts": run.message.ts}
    text = "\n\n".join(step.text for step in run.steps if step.text)
    return [said, {"role": "assistant", "content": text, "run": run.run}] if text else [said]
