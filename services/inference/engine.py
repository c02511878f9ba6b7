"""The reactor: whatever woke it, it folds the conversation from the log, decides, acts, and looks again until
there is nothing left to do here. A run that waits for a tool or a person holds no worker.
"""

import asyncio
import logging
from collections.abc import Collection

from tapeline import telemetry
from tapeline.append import Chain, Overtaken
from tapeline.clock import now_ms
from tapeline.connection import Refused
from tapeline.fold import State
from tapeline.registry import Registry
from tapeline.replay import load
from tapeline.tape import Tape

from .attempt import Attempt, Failed
from .conclude import Entries, ended, issued, partial, settled
from .decide import Budget, Claim, End, Issue, Leave, Purge, Rest, Settle, Sweep, Trigger, Wait, decide, matters
from .model import Models

log = logging.getLogger(__name__)


class Engine:
    """Decides and acts for one inference process, `worker` being its name in the log."""

    def __init__(
        self, tape: Tape, registry: Registry, models: Models, default_model: str, budget: Budget, worker: str
    ) -> None:
        self.tape = tape
        self.registry = registry
        self.models = models
        self.default_model = default_model
        self.budget = budget
        self.worker = worker

    async def react(self, conversation: str, trigger: Trigger) -> bool:
        """Does all there is to do in the conversation now. Whether the trigger may be acknowledged."""
        while True:
            state = await load(self.tape, conversation)
            action = decide(state, trigger, now_ms(), self.budget, await self._absent(state))
            try:
                match action:
                    case Rest():
                        return True
                    case Leave():
                        return False
                    case Wait(run=run, until=until):
                        await self.tape.set_alarm(conversation, run.run, until)
                        return True
                    case Claim():
                        await self._step(conversation, state, action, trigger)
                    case Settle():
                        await self._commit(conversation, state, settled(action, now_ms()))
                    case Issue():
                        await self._commit(conversation, state, issued(action, now_ms(), self.budget))
                    case End():
                        await self._end(conversation, state, action)
                    case Purge(through=through):
                        await self._purge(conversation, through)
                    case Sweep():
                        await self.tape.purge_results(conversation)
                        return True
            except Overtaken as overtaken:
                log.info("%s: %s", conversation, overtaken)

    async def fail(self, conversation: str, trigger: int, code: str, message: str) -> None:
        """Ends the active run with an error, for a trigger that cannot be handled; not a run that began after it.

        Nothing is added to a conversation that was deleted; it is purged.
        """
        while run := (state := await load(self.tape, conversation)).active:
            if run.message.event_id > trigger:
                return
            try:
                await self._end(conversation, state, End(run, "error", code, message))
                return
            except Overtaken:
                continue
        if state.deleted:
            await self._purge(conversation, state.last_event_id)

    async def _step(self, conversation: str, state: State, claim: Claim, trigger: Trigger) -> None:
        """Makes attempts at a step until one is an answer, or no further one may be made."""
        about = state.about
        offered = await self.registry.offered()
        if about is not None and about.tools is not None:
            offered = {name: spec for name, spec in offered.items() if name in about.tools}
        model = claim.run.model or self.default_model
        while True:
            attempt = Attempt(
                self.tape,
                self.models,
                conversation,
                state,
                claim,
                trigger,
                self.worker,
                model,
                offered,
                self.budget,
                now_ms,
            )
            until_deadline = asyncio.timeout((self.budget.deadline(claim.run) - now_ms()) / 1000)
            try:
                async with until_deadline:
                    await attempt.make()
                return
            except TimeoutError:
                if not until_deadline.expired():
                    raise
                return  # decide says what a run is that has met its deadline
            except Failed as failed:
                error = failed.error
                log.warning("%s: %s: %s", conversation, error.code, error.message)
                state = await load(self.tape, conversation)
                run = state.active
                step = run.step if run else None
                if run is None or run.run != claim.run.run or step is None or step.worker != self.worker:
                    return  # overtaken meanwhile
                if failed.again and step.attempt < self.budget.attempts:
                    claim = Claim(run, step.step, step.attempt + 1, over=step)
                    continue
                end = End(run, "error", error.code, error.message, error.retryable)
                await self._end(conversation, state, end)
                return
            except Refused as refused:
                state = await load(self.tape, conversation)
                if state.active is not None and state.active.run == claim.run.run:
                    await self._end(conversation, state, End(state.active, "error", "append_refused", str(refused)))
                return

    async def _absent(self, state: State) -> Collection[str]:
        """Tools that are called and have no workers any more."""
        calls = state.active.calls.values() if state.active else ()
        return await self.registry.absent({call.tool for call in calls if call.status == "pending"})

    async def _end(self, conversation: str, state: State, end: End) -> None:
        run, step = end.run, end.run.step
        said = None
        if step is not None and step.finish is None:
            # The attempts before it count where it has said nothing; a first one has none.
            after = run.message.event_id if step.attempt > 1 else step.event_id
            records = await self.tape.read(conversation, after, until=state.last_event_id)
            said = partial((record.event() for record in records), run.run, step)
        entries = ended(end, said, now_ms())
        await self._commit(conversation, state, entries)
        if run.calls:
            await self.tape.cancel_alarm(conversation, run.run)

    async def _purge(self, conversation: str, through: int) -> None:
        """Purges a deleted conversation, also of what a writer that does not know of `deleted` adds meanwhile."""
        while through:
            await self.tape.purge(conversation, through)
            rest = await self.tape.read(conversation)
            # A first event that names one before it is no conversation's first.
            through = rest[-1].seq if rest and rest[0].prev else 0
        log.info("%s: deleted, and purged", conversation)

    async def _commit(self, conversation: str, state: State, entries: Entries) -> None:
        """Appends after what was decided on; if something came between that matters, we decide again (`Overtaken`)."""
        await Chain(self.tape, conversation, state.last_event_id, matters).commit(entries, telemetry.carrier())
