"""Requests that were refused, in the log: who asked for what, for whoever has to find out who is knocking.

Bounded, so that a flood does not flood the log. Never the query, where tickets are, and never a header.
"""

import asyncio
import logging
from typing import Final

from starlette.types import Scope
from tapeline import limits

from .problem import Problem

log = logging.getLogger(__name__)

STATUSES: Final = frozenset({401, 403, 429})
"""With which a request is refused; other errors are its sender's business."""


class Refusals:
    """Says the first few of each second, and then how many more there were."""

    def __init__(self) -> None:
        self._said = 0
        self._more = 0

    def request(self, scope: Scope, problem: Problem) -> None:
        """A request that was answered with `problem`; logged at WARNING if that is a refusal."""
        if problem.status in STATUSES:
            path = scope["raw_path"].decode("latin-1")
            self._note(scope["client"], f" {scope['method']} {_plain(path)}", problem)

    def connection(self, client: tuple[str, int] | None, problem: Problem) -> None:
        """What came in on a connection was no request, or more than a request may be."""
        self._note(client, "", problem)

    def _note(self, client: tuple[str, int] | None, asked: str, problem: Problem) -> None:
        if self._said == limits.REFUSALS_LOGGED_PER_S:
            self._more += 1
            return
        if self._said == 0:
            asyncio.get_running_loop().call_later(1, self._end_second)
        self._said += 1
        log.warning("refused %s%s: %s %s", _plain(client[0] if client else "?"), asked, problem.status, problem.code)

    def _end_second(self) -> None:
        if self._more:
            log.warning("refused %d more within that second", self._more)
        self._said = self._more = 0


def _plain(text: str) -> str:
    """What a client chose, in a line of the log: one that it cannot break, nor fill."""
    return ascii(text[: limits.REFUSAL_CHARS_MAX])[1:-1]
