"""A conversation's state, read from the log: the I/O around `fold`.

History is read from whichever replica answers, and one may lag; what a writer decides on must not, so `Tape.pages`
reads on until what the leader has is there.
"""

from . import subjects
from .fold import State, fold
from .tape import Tape


async def load(tape: Tape, conversation: str) -> State:
    """The state from the facts alone, so in time that depends on them alone.

    `last_event_id` is the log's last sequence, which a writer may put its fence on: no fact before it is missing.
    Raises `Unavailable`.
    """
    await tape.confirm(conversation)
    last = await tape.last(conversation)
    newest = await tape.newest_fact(conversation, last)
    state = fold(await tape.read(conversation, kind=subjects.FACTS, until=newest))
    state.last_event_id = max(last, state.last_event_id)
    return state


async def snapshot(tape: Tape, conversation: str) -> State:
    """The state for a reader: with the partial text of a step that is being written, if there is one.

    A reader that follows after `last_event_id` continues exactly there. Raises `Unavailable`.
    """
    facts = await tape.read(conversation, kind=subjects.FACTS)
    state = fold(facts)
    run = state.active
    if run is None or run.step is None or run.step.finish is not None:
        return state
    claim = run.step.event_id
    state = fold(record for record in facts if record.seq <= claim)
    async for page in tape.pages(conversation, claim):
        state = fold(page, state)
    return state
