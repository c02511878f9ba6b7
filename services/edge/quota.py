"""How much a user may ask for in a minute, over all edges: messages, and tokens of all answers together.

The minute is a fixed one. Nothing that is under way is cut: it is the next message that is refused.
"""

from typing import Final

from opentelemetry import metrics
from tapeline import counter, limits, subjects
from tapeline.clock import now_ms
from tapeline.settings import Settings
from tapeline.tape import Tape

from .problem import Problem

MESSAGES: Final = "TAPELINE_MESSAGES_PER_MINUTE"
TOKENS: Final = "TAPELINE_TOKENS_PER_MINUTE"

_refused: Final = metrics.get_meter("tapeline").create_counter(
    "tapeline.limits.refused", "1", "Requests that were over a limit of their user, by code"
)


class Quota:
    """What each user may ask for in a minute; 0: any number."""

    def __init__(self, tape: Tape, messages: int, tokens: int) -> None:
        self._tape = tape
        self._messages = messages
        self._tokens = tokens

    @classmethod
    def configured(cls, settings: Settings, tape: Tape, *, limited: bool) -> "Quota":
        """From `TAPELINE_…_PER_MINUTE`, by default without a limit unless `limited`. Raises `ConfigError`."""
        messages = settings.number(MESSAGES, limits.MESSAGES_PER_MINUTE if limited else 0, least=0)
        tokens = settings.number(TOKENS, limits.TOKENS_PER_MINUTE if limited else 0, least=0)
        return cls(tape, messages, tokens)

    async def message(self, user: str) -> None:
        """Counts a message that is about to be put on the tape. Raises `Problem` 429, `Unavailable`."""
        now = now_ms()
        if self._tokens and await counter.used(self._tape, user, counter.TOKENS, now) >= self._tokens:
            raise too_many("tokens", self._tokens, "tokens a minute", counter.rest_s(now))
        if not self._messages:
            return
        # One of which the acknowledgement was lost counts again: better than to refuse it because NATS was away.
        sent = await self._tape.patiently(
            subjects.COUNTERS, lambda: counter.add(self._tape, user, counter.MESSAGES, 1, now)
        )
        if sent > self._messages:
            raise too_many("messages", self._messages, "messages a minute", counter.rest_s(now))


def too_many(what: str, limit: int, of: str, retry_after_s: int) -> Problem:
    """A user is over a limit."""
    code = f"too_many_{what}"
    _refused.add(1, {"code": code})
    detail = f"A user may have {limit} {of} here. Try again after `Retry-After`."
    return Problem(429, code, detail, {"Retry-After": str(retry_after_s)}, limit=limit)
