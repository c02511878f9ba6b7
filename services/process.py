"""How a child process of ours starts and ends.

A child gets a session of its own, so that Ctrl-C in a terminal reaches only its parent, which then ends it in
order. On Linux the kernel kills it when its parent dies, however that dies; elsewhere a parent that is killed
leaves its children behind.
"""

import ctypes
import functools
import os
import signal
import sys
from collections.abc import Callable
from typing import Final, TypedDict

from tapeline import limits

STOP_GRACE_S: Final = limits.EXIT_S  # from SIGTERM to SIGKILL

_PR_SET_PDEATHSIG: Final = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class SpawnOptions(TypedDict):
    """What `Popen` and `create_subprocess_exec` take alike."""

    start_new_session: bool
    preexec_fn: Callable[[], None] | None


def spawn_options() -> SpawnOptions:
    """Call this from the thread that starts the child: the kernel means that thread when it says parent."""
    return {"start_new_session": True, "preexec_fn": functools.partial(bind_to, os.getpid()) if _libc else None}


def signal_group(pid: int, number: signal.Signals) -> None:
    """Signals the child and everything it has started itself. No error when all of it has gone already."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return


def ending(code: int) -> str:
    """How a process ended, in words, from its return code as Python gives it."""
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def bind_to(parent: int) -> None:
    """In a child on Linux: has it killed when its parent ends."""
    # Runs between fork and exec: nothing here may import, allocate much or take a lock.
    assert _libc is not None
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the kernel was told
        os._exit(1)
