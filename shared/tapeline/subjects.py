"""Where things are: the names of streams, subjects, consumers and buckets, and nothing else.

A conversation is one chain of events under `tape.<shard>.<conversation>.`; the `Kind` of an event, the rest of
its subject, follows its writer, so that NATS permissions can.
"""

import hashlib
import re
import zlib
from typing import Final

from .limits import CONVERSATION_ID_CHARS_MAX

# Kinds: `fact.…` is kept, `delta.…` may expire
INPUT: Final = "fact.input"
MODEL: Final = "fact.model"
TOOL: Final = "fact.tool"
MODEL_DELTA: Final = "delta.model"
TOOL_DELTA: Final = "delta.tool"
DUE: Final = "due"  # not an event: a timer that fired
FACTS: Final = "fact.>"
ALL: Final = ">"

TRIGGERS: Final = "inference"  # the durable consumer that wakes inference: one per shard, one of the timers
WAKES: Final = "WAKES"  # the stream of timers
DEAD: Final = "DEAD"  # the dead-letter stream
REGISTRY: Final = "tapeline_tools"  # the bucket of tools on offer
RESULTS: Final = "RESULTS"  # the stream of what tools returned that is too large for an event
LISTS: Final = "LISTS"  # the stream of each user's list of conversations
COUNTERS: Final = "COUNTERS"  # the stream of what each user has used in the last minutes
LEASES: Final = "LEASES"  # the stream of what each user holds open at the moment

_CONVERSATION = re.compile(rf"[A-Za-z0-9_-]{{1,{CONVERSATION_ID_CHARS_MAX}}}")
_TOOL = re.compile(r"[A-Za-z0-9_-]{1,64}")


def is_conversation(name: str) -> bool:
    """Whether `name` can be a conversation's id: it becomes part of a subject."""
    return _CONVERSATION.fullmatch(name) is not None


def is_tool(name: str) -> bool:
    """Whether `name` can be a tool's name: it becomes part of a subject, and providers take no other."""
    return _TOOL.fullmatch(name) is not None


def shard(conversation: str, shards: int) -> int:
    """The shard a conversation lives in, for ever."""
    return zlib.crc32(conversation.encode()) % shards


def stream(shard: int) -> str:
    """The stream that holds a shard."""
    return f"TAPE_{shard}"


def chain(shard: int, conversation: str, kind: str = ALL) -> str:
    """A conversation's subject for one kind of event; by default the filter over all of them."""
    return f"tape.{shard}.{conversation}.{kind}"


def chain_of(subject: str) -> str:
    """The filter over all of the conversation that has this subject."""
    return ".".join(subject.split(".", 3)[:3]) + ".>"


def live(subject: str) -> str:
    """Where the republished copy of what is stored at `subject` appears."""
    return f"live.{subject}"


def call(tool: str) -> str:
    """The kind of a `tool_call` event, which wakes that tool's workers."""
    return f"fact.call.{tool}"


def result(conversation: str, call: str = "*", attempt: int | str = "*") -> str:
    """Where one attempt at a call stores its result, in chunks; by default the filter over all of a conversation."""
    return f"result.{conversation}.{call}.{attempt}"


def alarm(shard: int, conversation: str, run: str) -> str:
    """Where a run's one timer is set; setting it again replaces it, purging it cancels it."""
    return f"wake.{shard}.at.{conversation}.{run}"


def due(shard: int, conversation: str) -> str:
    """Where a timer that fires is delivered."""
    return f"wake.{shard}.due.{conversation}"


def split(subject: str) -> tuple[str, str]:
    """`(conversation, kind)` of a subject on the tape, live or stored; kind `DUE` for a timer that fired."""
    parts = subject.removeprefix("live.").split(".", 3)
    if len(parts) == 4 and parts[0] == "tape":
        return parts[2], parts[3]
    if len(parts) == 4 and parts[0] == "wake" and parts[2] == "due":
        return parts[3], DUE
    raise ValueError(f"not a subject of the tape: {subject}")


def dead(service: str) -> str:
    """Where a service puts what it cannot handle."""
    return f"dead.{service}"


def tool_consumer(tool: str) -> str:
    """The durable consumer that all workers of one tool share, one per shard."""
    return f"tool_{tool}"


def user(name: str) -> str:
    """A user's name as one token of a subject: any name will do, and none can be read from it."""
    return hashlib.sha256(name.encode()).hexdigest()[:32]


def listed(name: str, page: str = "*", conversation: str = "*") -> str:
    """A conversation's entry in a user's list; by default the filter over all of them."""
    return f"list.{user(name)}.{page}.{conversation}"


def list_head(name: str) -> str:
    """How many entries a user's list has ever had."""
    return f"list.{user(name)}.head"


def counter(name: str, what: str, window: int) -> str:
    """How much of something (`messages`, `tokens`) a user has used in a window of time."""
    return f"count.{user(name)}.{what}.{window}"


def lease(name: str, holder: str = "*") -> str:
    """How many streams a user has open at one edge, `holder`; by default the filter over all edges."""
    return f"lease.{user(name)}.{holder}"
