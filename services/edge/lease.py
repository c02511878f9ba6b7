"""How many streams a user has open, over all edges: each edge says how many are open there, in a lease that it renews,
and that expires when the edge is killed.

A place is given under a fence over all leases of the user, so two edges never give the last one twice. All who wait
for a place of one user at this edge get it by one write.
"""

import asyncio
import logging
import random
import secrets
from collections import deque
from collections.abc import Callable
from typing import Final

import msgspec
from tapeline import limits, subjects
from tapeline.connection import Refused, Unavailable
from tapeline.settings import Settings
from tapeline.tape import Stale, Tape

from .problem import Problem
from .quota import too_many

log = logging.getLogger(__name__)

STREAMS: Final = "TAPELINE_STREAMS_PER_USER"


class Lease(msgspec.Struct):
    """What an edge says of a user."""

    streams: int


_lease: Final = msgspec.json.Decoder(Lease)


class Leases:
    """The places this edge has given, by user."""

    def __init__(self, tape: Tape, most: int) -> None:
        """`most` streams for a user over all edges; 0: any number."""
        self.tape = tape
        self.most = most
        self.holder = secrets.token_hex(8)
        self._users: dict[str, _Held] = {}

    @classmethod
    def configured(cls, settings: Settings, tape: Tape, *, limited: bool) -> "Leases":
        """From `TAPELINE_STREAMS_PER_USER`, by default without a limit unless `limited`. Raises `ConfigError`."""
        return cls(tape, settings.number(STREAMS, limits.STREAMS_PER_USER if limited else 0, least=0))

    async def take(self, user: str) -> Callable[[], None]:
        """A place for one more stream of the user; what gives it back. Raises `Problem` 429, `Unavailable`."""
        if not self.most:
            return _nothing
        held = self._users.get(user)
        if held is None:
            held = self._users[user] = _Held(self, user)
        await held.take()
        return held.release

    def forget(self, user: str) -> None:
        """The user has nothing open here any more, and NATS knows."""
        del self._users[user]

    async def close(self) -> None:
        """Waits until NATS knows that all streams have ended. What it is too slow or too far away to take, expires."""
        give_up = asyncio.get_running_loop().time() + limits.LEASE_CLOSE_S
        while self._users and self.tape.connected and asyncio.get_running_loop().time() < give_up:
            await asyncio.sleep(limits.LEASE_CLOSE_TICK_S)


class _Held:
    """What one user has open at this edge, and one task at most that tells NATS."""

    def __init__(self, leases: Leases, user: str) -> None:
        self._leases = leases
        self._tape = leases.tape
        self._user = user
        self._mine = subjects.lease(user, leases.holder)
        self._all = subjects.lease(user)
        self._open = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._written = 0
        """What NATS knows."""
        self._seq: int | None = 0
        """Where it knows that from; None where we are not sure."""
        self._is_due = False
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def take(self) -> None:
        place = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        self._tell()
        try:
            await place
        except asyncio.CancelledError:
            if not place.cancelled() and place.exception() is None:  # it was given at the same moment
                self.release()
            raise

    def release(self) -> None:
        self._open -= 1
        self._tell()

    def _tell(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._work())

    async def _work(self) -> None:
        try:
            while self._waiting or self._is_due or self._open != self._written:
                if self._waiting:
                    await self._tape.patiently(subjects.LEASES, self._admit)
                else:
                    await self._renew()
        except (Unavailable, Refused) as error:
            log.warning("a lease could not be written: %s", error)
            self._seq = None
        finally:
            while self._waiting:
                self._answer(Unavailable("no place could be taken for a stream"))
            self._task = None
            self._rest()

    async def _admit(self) -> None:
        """Gives a place to those who wait, as many as there are; the others are refused."""
        asked = len(self._waiting)
        leases = await self._tape.newest(subjects.LEASES, self._all)
        others = sum(_lease.decode(one.data).streams for one in leases if one.subject != self._mine)
        given = max(0, min(asked, self._leases.most - others - self._open))
        if given and not await self._put(self._open + given, leases[-1].seq if leases else 0, self._all):
            return  # another edge was first: look again
        for number in range(asked):
            if number < given:
                self._open += self._answer()
            else:
                most = self._leases.most
                self._answer(too_many("streams", most, "streams open at a time", limits.STREAMS_RETRY_S))

    def _answer(self, error: Problem | Unavailable | None = None) -> bool:
        """Tells who has waited longest. Whether a place was taken."""
        place = self._waiting.popleft()
        if place.done():  # gone meanwhile
            return False
        if error is None:
            place.set_result(None)
        else:
            place.set_exception(error)
        return error is None

    async def _renew(self) -> None:
        """Writes what is open. It asks nobody, as that is so whatever others have."""
        self._is_due = False
        if self._seq is None:
            leases = await self._tape.newest(subjects.LEASES, self._mine)
            self._seq = leases[-1].seq if leases else 0
        await self._put(self._open, self._seq, self._mine)

    async def _put(self, streams: int, after: int, within: str) -> bool:
        """Whether it was stored, nothing having come in between."""
        try:
            self._seq = await self._tape.put(
                self._mine, msgspec.json.encode(Lease(streams)), after=after, within=within
            )
        except Stale as stale:
            self._seq = None
            if stale.last < 0:  # another write is under way
                await asyncio.sleep(limits.APPEND_RACE_S)
            return False
        self._written = streams
        return True

    def _rest(self) -> None:
        """Until there is something to tell, or the lease is due: not all users' at once."""
        if self._timer is not None:
            self._timer.cancel()
        if self._open or self._written:
            wait_s = limits.LEASE_REFRESH_S * random.uniform(0.75, 1.25)
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._due)
        else:
            self._leases.forget(self._user)

    def _due(self) -> None:
        if self._task is not None:
            return  # which comes to rest again
        if self._tape.connected:
            self._is_due = True
            self._tell()
        else:
            self._rest()


def _nothing() -> None:
    """Gives nothing back."""
