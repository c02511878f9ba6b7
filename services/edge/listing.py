"""Each user's list of conversations, newest first. A copy for looking things up: the truth is on the tape.

A user's entries have ordinals, and so many of them make a page; a head says how many there have ever been. So the
newest page is known, and reading it costs the same however many conversations, users and events there are.
"""

import asyncio
import unicodedata
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple
from weakref import WeakValueDictionary

import msgspec
from tapeline import limits, subjects
from tapeline.connection import Unavailable
from tapeline.tape import Stale, Tape

_JOINERS: Final = "\u200c\u200d"  # of Persian words, and of emoji: format characters that one can see
_INVISIBLE: Final = ("Cc", "Cf", "Cs", "Co", "Cn")


class Listed(msgspec.Struct, frozen=True):
    """One conversation in its owner's list."""

    id: str
    number: int
    """Its ordinal among all that the user has ever had."""
    title: str
    titled: int
    """The event it has its title from: an older title does not replace it."""
    created_ts: int


class _Head(msgspec.Struct):
    entries: int = 0


class _Found(NamedTuple):
    listed: Listed
    subject: str
    seq: int


_listed: Final = msgspec.json.Decoder(Listed)
_head: Final = msgspec.json.Decoder(_Head)


class Listing:
    """The lists of all users. Every call raises `Unavailable`."""

    def __init__(self, tape: Tape) -> None:
        self._tape = tape
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by user, while one is added

    async def page(self, user: str, limit: int, before: int | None) -> tuple[list[Listed], int | None]:
        """Conversations with ordinals below `before` (None: all), newest first, and the ordinal below which there may
        be more. Fewer than `limit`, none even, where many were deleted.
        """
        entries, _ = await self._head(user)
        end = entries if before is None else min(before, entries)
        found: list[Listed] = []
        newest = (end - 1) // limits.LIST_PAGE_ENTRIES
        oldest = max(0, newest - limits.LIST_PAGES_MAX + 1)
        for page in range(newest, oldest - 1, -1):
            mine = await self._entries(subjects.listed(user, str(page)))
            found += sorted(
                (one.listed for one in mine if one.listed.number < end), key=lambda one: one.number, reverse=True
            )
            if len(found) > limit:
                return found[:limit], found[limit - 1].number
            if len(found) == limit or page == oldest:
                return found, page * limits.LIST_PAGE_ENTRIES or None
        return [], None

    async def add(self, user: str, conversation: str, title: str, titled: int, created_ts: int) -> None:
        """Lists a conversation once, however often it is added; gives it the title unless it has a newer one."""
        # Whoever has a hundred begun at once would lose a hundred races for the head to himself.
        async with self._turns.setdefault(user, asyncio.Lock()):
            for _ in range(limits.APPEND_CONFLICTS_MAX):
                entries, head = await self._head(user)  # before the look: whoever adds it after the look moves the head
                if await self.retitle(user, conversation, title, titled):
                    return
                listed = Listed(conversation, entries, title, titled, created_ts)
                page = str(entries // limits.LIST_PAGE_ENTRIES)
                batch = [
                    (subjects.list_head(user), msgspec.json.encode(_Head(entries + 1))),
                    (subjects.listed(user, page, conversation), msgspec.json.encode(listed)),
                ]
                try:
                    await self._tape.put_all(batch, head)
                except Stale:
                    continue
                return
        raise Unavailable("lost every race for this list")

    async def retitle(self, user: str, conversation: str, title: str, titled: int) -> bool:
        """Gives a conversation that is listed the title that event `titled` gave it, unless it has a newer one already.
        Whether it is listed.
        """
        return await self._replace(
            user,
            conversation,
            lambda old: (
                None
                if old.titled > titled or (old.title, old.titled) == (title, titled)
                else msgspec.json.encode(msgspec.structs.replace(old, title=title, titled=titled))
            ),
        )

    async def remove(self, user: str, conversation: str) -> None:
        """Takes a conversation off its owner's list, if it is there."""
        await self._replace(user, conversation, lambda _: b"", {"Nats-TTL": f"{limits.LIST_DELETED_TTL_S}s"})

    async def _replace(
        self, user: str, conversation: str, change: Callable[[Listed], bytes | None], headers: Mapping[str, str] = {}
    ) -> bool:
        """Puts what `change` makes of an entry in its place (None: it stays as it is). Whether there is one."""
        for _ in range(limits.APPEND_CONFLICTS_MAX):
            found = await self._entries(subjects.listed(user, conversation=conversation))
            if not found:
                return False
            entry = found[-1]
            data = change(entry.listed)
            if data is None:
                return True
            try:
                await self._tape.put(entry.subject, data, headers, after=entry.seq)
            except Stale:
                continue
            return True
        raise Unavailable("lost every race for this entry of a list")

    async def _head(self, user: str) -> tuple[int, int]:
        """How many entries there have ever been, and the sequence to fence the next on."""
        found = await self._tape.newest(subjects.LISTS, subjects.list_head(user))
        return (_head.decode(found[0].data).entries, found[0].seq) if found else (0, 0)

    async def _entries(self, subject: str) -> list[_Found]:
        """What is listed under `subject`; an empty message is what is left of one that was deleted."""
        stored = await self._tape.newest(subjects.LISTS, subject)
        return [_Found(_listed.decode(one.data), one.subject, one.seq) for one in stored if one.data]


def derived(content: str) -> str:
    """A title made from what was said: its first line that has anything to show, on one line and bounded."""
    for line in content.splitlines():
        shown = "".join(char for char in line if char.isspace() or char in _JOINERS or _is_visible(char))
        title = " ".join(shown.split()).strip(_JOINERS)
        if len(title) > limits.TITLE_DERIVED_CHARS_MAX:
            return title[: limits.TITLE_DERIVED_CHARS_MAX - 1].rstrip(f" {_JOINERS}") + "…"
        if title:
            return title
    return ""


def _is_visible(char: str) -> bool:
    """Not a control character, nor one that turns the direction of text or hides in it."""
    return unicodedata.category(char) not in _INVISIBLE
