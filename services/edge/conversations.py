"""Conversations and their runs: create, show, rename, delete, say something, stop, approve. Each is one fenced
decision on the log, so two edges that are asked at the same instant agree.
"""

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from tapeline import events, subjects, telemetry
from tapeline.append import Chain, Overtaken
from tapeline.clock import now_ms
from tapeline.fold import CallState, RunState, State
from tapeline.replay import may_have_expired, outline, snapshot, whole_after
from tapeline.tape import Tape

from . import answer
from .body import NewApproval, NewConversation, NewMessage
from .feed import About, Span
from .listing import Listing, derived
from .models import Models
from .problem import Problem, not_found
from .quota import Quota


@dataclass(frozen=True)
class Posted:
    """A message that is on the tape, and the run it started."""

    run: str
    event_id: int
    about: About


class Conversations:
    """The edge's side of the log, for one user at a time. Every call raises `Problem` and `Unavailable`."""

    def __init__(self, tape: Tape, models: Models, quota: Quota) -> None:
        self._tape = tape
        self._models = models
        self._quota = quota
        self.listing = Listing(tape)

    async def create(self, user: str, new: NewConversation) -> tuple[str, int]:
        """Begins a conversation; its id and the sequence of its first event."""
        self._models.check(new.model)
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
        await self.listing.add(user, conversation, new.title, seq, about.ts)
        return conversation, seq

    async def check_owner(self, user: str, conversation: str) -> None:
        """Raises the same `Problem` 404 for a conversation of another user and for one that is not there, having read
        the same of both: one event. Whatever takes longer the more there is to read comes after this.
        """
        if await self._owner(conversation) != user:
            await self._tape.confirm(conversation)  # a leader that was cut off may not have heard of it yet
            if await self._owner(conversation) != user:
                raise not_found()

    async def _owner(self, conversation: str) -> str | None:
        first = await self._tape.first(conversation, subjects.INPUT)
        about = first.event() if first else None
        return about.owner if isinstance(about, events.Conversation) else None

    async def rename(self, user: str, conversation: str, title: str) -> answer.Entry:
        """Gives a conversation another title; what it is in the list then."""
        while True:
            state = await self.owned(user, conversation)
            titled = state.titled_event_id
            if state.title != title:
                event = events.Title(run=events.NO_RUN, ts=now_ms(), title=title, by=user)
                try:
                    titled = await self._append(conversation, state.last_event_id, [event])
                except Overtaken:
                    continue
            await self.listing.retitle(user, conversation, title, titled)
            assert state.about is not None
            return answer.Entry(conversation, title, state.about.ts, url(conversation))

    async def delete(self, user: str, conversation: str) -> None:
        """Deletes a conversation, as a fact: it is gone for everybody at once, and inference purges it."""
        while True:
            try:
                state = await self.owned(user, conversation)
            except Problem:
                await self.listing.remove(user, conversation)  # whoever deleted it may have got no further
                raise
            deleted = events.Deleted(run=events.NO_RUN, ts=now_ms(), by=user)
            try:
                await self._append(conversation, state.last_event_id, [deleted])
            except Overtaken:
                continue
            await self.listing.remove(user, conversation)
            return

    async def owned(self, user: str, conversation: str, call: str = "") -> State:
        """The outline of the conversation, with what `call` returned, if it is the user's."""
        await self.check_owner(user, conversation)
        return _of(user, await outline(self._tape, conversation, call))

    async def check_cursor(self, conversation: str, about: About, after: int, *, full: bool) -> None:
        """Raises `Problem` 410 where nobody can go on after this cursor without missing something."""
        if after > about.last_event_id:
            raise Problem(
                410,
                "cursor_ahead",
                "This cursor is newer than the log. Load the snapshot and follow after its `last_event_id`.",
                earliest=0,
                snapshot=url(conversation),
            )
        if not full or not may_have_expired(self._tape, about.created_ts):
            return  # facts are kept for ever, and nothing of this conversation is old enough
        whole = await whole_after(self._tape, conversation, after)
        if whole > after:
            raise Problem(
                410,
                "cursor_expired",
                "Tokens after this cursor have expired. Load the snapshot and follow after its `last_event_id`, go on "
                "after `earliest`, or ask for `view=compact`, which is kept for ever.",
                earliest=whole,
                snapshot=url(conversation),
            )

    async def shown(self, user: str, conversation: str) -> answer.Snapshot:
        """What a reader loads before it follows after `last_event_id`."""
        await self.check_owner(user, conversation)
        return described(conversation, _of(user, await snapshot(self._tape, conversation)))

    async def post(self, user: str, conversation: str, new: NewMessage, key: str | None) -> Posted:
        """Puts a message on the tape, unless it replaces a run that is not there, `on_busy` says not to while a run is
        active, or the user has had enough for now. The same key, the same run, which counts once.
        """
        run = _run_id(user, conversation, key)
        listed = counted = False
        while True:
            try:
                state = await self.owned(user, conversation)
            except Problem:
                if listed:  # and deleted meanwhile
                    await self.listing.remove(user, conversation)
                raise
            assert state.about is not None
            if run not in state.runs:
                # The conversation's own too: it may be older than the list of what is allowed.
                self._models.check(new.model or state.about.model)
                if new.replaces:
                    run_in(state, new.replaces)
            begins = run not in state.runs and (state.active is None or new.on_busy != "reject")
            if begins and not counted:  # before it leaves a title in the list
                await self._quota.message(user)
                counted = True
            if listed or not state.runs:  # again if another message came first, which gives the title
                title = _title(state) or derived(new.content)
                await self.listing.add(user, conversation, title, state.titled_event_id, state.about.ts)
                listed = True
            if earlier := state.runs.get(run):
                if (earlier.message.content, earlier.replaces) != (new.content, new.replaces):
                    raise Problem(422, "idempotency_mismatch", "This `Idempotency-Key` was used for another message.")
                return Posted(run, earlier.message.event_id, about_of(state))
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
            message = events.Message(
                run=run,
                ts=now_ms(),
                content=new.content,
                by=user,
                model=new.model,
                on_busy=new.on_busy,
                replaces=new.replaces,
            )
            entries.append(message)
            try:
                seq = await self._append(conversation, state.last_event_id, entries)
                return Posted(run, seq, about_of(state))
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

    async def returned(self, user: str, conversation: str, run: str, call: str) -> CallState:
        """A call that has returned something; which that is, is on the tape or beside it."""
        found = call_in(run_in(await self.owned(user, conversation, call), run), call)
        if found.status != "done":
            raise Problem(404, "no_result", "The call has not ended yet: wait for its `tool_result`.")
        if found.is_error and found.content is None and found.stored is None:
            raise Problem(
                404, "call_failed", f"The call returned nothing; it ended as {found.outcome}: {found.message}"
            )
        return found

    async def approve(self, user: str, conversation: str, run: str, call: str, new: NewApproval) -> None:
        """Decides on a call that waits for it, once."""
        while True:
            state = await self.owned(user, conversation)
            check_waits(run_in(state, run), call, now_ms())
            approval = events.Approval(
                run=run,
                ts=now_ms(),
                call=call,
                approved=new.approved,
                arguments=new.arguments,
                reason=new.reason,
                by=user,
            )
            try:
                await self._append(conversation, state.last_event_id, [approval])
            except Overtaken:
                continue
            return

    async def _append(self, conversation: str, after: int, entries: Sequence[events.Event]) -> int:
        """Appends right after what was decided on, but for deltas, which change no decision of the edge."""
        chain = Chain(self._tape, conversation, after, lambda record: record.is_fact)
        batch = [(subjects.INPUT, event) for event in entries]
        return (await chain.commit(batch, telemetry.carrier()))[-1]


def url(conversation: str) -> str:
    """Where a conversation is."""
    return f"/v1/conversations/{conversation}"


def described(conversation: str, state: State) -> answer.Snapshot:
    """What a reader is shown of a conversation that exists."""
    about = state.about
    assert about is not None
    return answer.Snapshot(
        id=conversation,
        title=_title(state),
        owner=about.owner,
        system=about.system,
        model=about.model,
        tools=about.tools,
        metadata=about.metadata,
        created_ts=about.ts,
        last_event_id=state.last_event_id,
        messages=[message for run in state.runs.values() if not run.replaced_by for message in _messages(run)],
        runs=list(state.runs.values()),
    )


def run_in(state: State, run: str) -> RunState:
    """The run, or 404."""
    found = state.runs.get(run)
    if found is None:
        raise Problem(404, "unknown_run", "There is no such run in this conversation.")
    return found


def call_in(run: RunState, call: str) -> CallState:
    """The run's call, or 404."""
    found = run.calls.get(call)
    if found is None:
        raise Problem(404, "unknown_call", "There is no such call in this run.")
    return found


def check_waits(run: RunState, call: str, now: int) -> None:
    """Raises `Problem` unless the call of that id waits for a decision. `now` is in ms since the epoch."""
    found = call_in(run, call)
    if found.approved is not None:
        done = "approved" if found.approved else "denied"
        raise Problem(409, "already_decided", f"This call was {done} already, by {found.decided_by}.")
    if found.status != "waiting" or run.stopped or now >= found.deadline:
        raise Problem(409, "not_waiting", "This call does not wait for a decision, or not any more.")


def about_of(state: State, run: str | None = None) -> About:
    """What lets a reader in, of a conversation that exists, or of one run of it. Raises `Problem` 404."""
    assert state.about is not None
    about = About(state.about.owner, state.about.ts, state.last_event_id)
    if run is None:
        return about
    found = run_in(state, run)
    return about._replace(span=Span(run, found.message.event_id, found.ended_event_id))


def _of(user: str, state: State) -> State:
    if state.about is None or state.about.owner != user or state.deleted:
        raise not_found()
    return state


def _title(state: State) -> str:
    """The title it was given, else one made from what was said first; empty where nothing was."""
    first = next(iter(state.runs.values()), None)
    return state.title or (derived(first.message.content) if first else "")


def _run_id(user: str, conversation: str, key: str | None) -> str:
    if key is None:
        return secrets.token_hex(10)
    return hashlib.sha256(f"{user}\n{conversation}\n{key}".encode()).hexdigest()[:20]


def _messages(run: RunState) -> list[answer.Said]:
    """The run as plain messages: what the user said, and what was answered, if anything was."""
    said = answer.Said("user", run.message.content, run.run, run.message.ts)
    text = "\n\n".join(step.text for step in run.steps if step.text)
    return [said, answer.Said("assistant", text, run.run)] if text else [said]
