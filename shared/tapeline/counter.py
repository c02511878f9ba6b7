"""How much a user has used in a minute, over all processes: counted in NATS, and forgotten soon after.

Minutes are those of the epoch, by the clock of whoever counts.
"""

from typing import Final

from . import subjects
from .tape import Tape

MESSAGES: Final = "messages"  # put on the tape; edges count them
TOKENS: Final = "tokens"  # read and written by models, as their providers say; inference counts them
MINUTE_MS: Final = 60_000


async def add(tape: Tape, user: str, what: str, amount: int, now: int) -> int:
    """Counts in the minute of `now` (ms since the epoch); what the user has used in it by then. Raises `Unavailable`,
    which may have counted nevertheless, and `Refused`.
    """
    return await tape.count(subjects.counter(user, what, now // MINUTE_MS), amount)


async def used(tape: Tape, user: str, what: str, now: int) -> int:
    """What the user has used in the minute of `now` (ms since the epoch). Raises `Unavailable`."""
    return await tape.counted(subjects.COUNTERS, subjects.counter(user, what, now // MINUTE_MS))


def rest_s(now: int) -> int:
    """Whole seconds until the minute of `now` (ms since the epoch) is over, 1 at least."""
    return -(-(MINUTE_MS - now % MINUTE_MS) // 1000)
