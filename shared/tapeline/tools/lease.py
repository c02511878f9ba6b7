"""One delivery of a `tool_call`, kept ours for as long as we work on it. Knows nothing of what it says."""

import asyncio
import logging
from collections.abc import Coroutine
from datetime import datetime
from typing import Any

import nats.errors
from faststream.nats import NatsMessage

from tapeline import limits

log = logging.getLogger(__name__)


class Lease:
    """Tells the server every `IN_PROGRESS_S` that the message is being worked on, until it is given back.

    Whether the server heard the last word does not matter: at worst the call is delivered again, and the log
    says what has become of it.
    """

    def __init__(self, message: NatsMessage) -> None:
        self._message = message
        self._beat = asyncio.create_task(self._keep())

    @property
    def seq(self) -> int:
        """Sequence of the `tool_call`."""
        return self._message.raw_message.metadata.sequence.stream

    @property
    def delivery(self) -> int:
        """Which delivery of it this is, from 1."""
        return self._message.raw_message.metadata.num_delivered or 1

    @property
    def called_at(self) -> datetime:
        """When it was stored."""
        return self._message.raw_message.metadata.timestamp

    def renew(self, message: NatsMessage) -> None:
        """Goes on with a newer delivery of the same call: the server has stopped listening to this one."""
        self._message = message

    async def ack(self) -> None:
        """The call is over."""
        await self._end(self._message.ack())

    async def give_back(self, delay_s: float | None = None) -> None:
        """Another worker shall have it."""
        await self._end(self._message.nack(delay_s))

    async def drop(self) -> None:
        """It shall never be delivered again."""
        await self._end(self._message.reject())

    def leave(self) -> None:
        """Says no more: it belongs to another worker, or comes again in `ACK_WAIT_S`."""
        self._beat.cancel()

    async def _end(self, word: Coroutine[Any, Any, None]) -> None:
        self._beat.cancel()
        await _said(word)

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(limits.IN_PROGRESS_S)
            await _said(self._message.in_progress())


async def _said(word: Coroutine[Any, Any, None]) -> None:
    try:
        await word
    except nats.errors.Error as error:
        log.warning("a delivery could not be answered: %s", str(error) or type(error).__name__)
