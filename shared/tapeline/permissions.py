"""Who may write what: the accounts of the NATS server, one for each role. Pure: from names to configuration text.

Publish permissions alone do not hold. JetStream sends what it is asked for to whatever reply subject the asker names,
and does not ask whether the asker may publish there: a direct get of one's own event with the reply subject of a
token forges that token. So every role has an account, and imports what it may ask of the tape's account: the replies
come back into its own, where no stream listens and nobody else has an inbox. The permissions within the account say
the same once more, for what imports cannot say (`deny`), and so that the server names what it refuses.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from . import subjects

TAPE: Final = "TAPE"  # the account that has the streams; nobody but an administrator logs in there
ROOT: Final = "root"  # that administrator, if there is one
LIVE: Final = subjects.live("tape.>")

_API: Final = "$JS.API"
_BESIDE: Final = (f"KV_{subjects.REGISTRY}", subjects.DEAD, subjects.LISTS, subjects.COUNTERS, subjects.LEASES)
_INFO: Final = (f"{_API}.INFO", f"{_API}.STREAM.INFO.*", f"{_API}.CONSUMER.INFO.*.*")
_READ: Final = (*_INFO, f"{_API}.STREAM.MSG.GET.*", f"{_API}.DIRECT.GET.*")
_STREAMED: Final = (f"{_API}.DIRECT.GET.", f"{_API}.CONSUMER.MSG.NEXT.")  # one request, any number of replies


class Role(NamedTuple):
    """What one kind of service may send; `deny` counts before `publish`."""

    name: str
    publish: tuple[str, ...]
    deny: tuple[str, ...] = ()
    live: bool = True
    """Whether it may listen to live copies."""


def _tape(kind: str) -> str:
    return f"tape.*.*.{kind}"


def _deliveries(consumer: str) -> tuple[str, str]:
    return f"{_API}.CONSUMER.MSG.NEXT.*.{consumer}", f"$JS.ACK.*.{consumer}.*.*.*.*.*"


EDGE: Final = Role(
    "edge",
    (*_READ, _tape(subjects.INPUT), "list.>", "count.*.messages.*", "lease.>"),
)
INFERENCE: Final = Role(
    "inference",
    (
        *_READ,
        *map(_tape, (subjects.MODEL, subjects.call("*"), subjects.MODEL_DELTA)),
        "wake.*.at.>",
        "count.*.tokens.*",
        subjects.dead("inference"),
        *_deliveries(subjects.TRIGGERS),
        f"{_API}.STREAM.PURGE.*",  # alarms are cancelled so, and what was deleted goes, results too
    ),
    deny=tuple(f"{_API}.STREAM.PURGE.{stream}" for stream in _BESIDE),
)
PROVISION: Final = Role(
    "provision",
    (*_INFO, f"{_API}.STREAM.CREATE.*", f"{_API}.STREAM.UPDATE.*", f"{_API}.CONSUMER.CREATE.*.*"),
    live=False,
)
AUDITOR: Final = Role("auditor", _READ)


def pool(name: str, tools: Iterable[str] = ("*",)) -> Role:
    """A pool of tool workers. One that is told its `tools` gets the calls of no other, and offers no other."""
    calls: list[str] = []
    for tool in tools:
        consumer = "*" if tool == "*" else subjects.tool_consumer(tool)
        calls += (
            f"$KV.{subjects.REGISTRY}.{tool}.*",
            f"{_API}.CONSUMER.CREATE.*.{consumer}.{_tape(subjects.call(tool))}",
            *_deliveries(consumer),
        )
    triggers = (
        f"{_API}.CONSUMER.CREATE.*.{subjects.TRIGGERS}.>",  # which would change what wakes inference
        *_deliveries(subjects.TRIGGERS),
    )
    private = (subjects.LISTS, subjects.COUNTERS, subjects.LEASES, subjects.DEAD)
    unread = tuple(f"{_API}.{read}.{stream}" for stream in private for read in ("STREAM.MSG.GET", "DIRECT.GET"))
    return Role(
        name,
        (
            *_READ,
            *map(_tape, (subjects.TOOL, subjects.TOOL_DELTA)),
            subjects.result("*"),
            subjects.dead("tools"),
            *calls,
        ),
        deny=(*triggers, *unread),
    )


ROLES: Final = (EDGE, INFERENCE, pool("tools"), PROVISION, AUDITOR)


def configuration(passwords: Mapping[str, str], roles: Iterable[Role] = ROLES) -> str:
    """The `accounts` of a server's configuration. The user of a role has its name.

    `passwords` are by role, as they stand in the file: quoted, or the name of a variable. With one for `ROOT`, that
    user may do anything with the tape.
    """
    roles = tuple(roles)
    root = f"users: [{{ user: {ROOT}, password: {passwords[ROOT]} }}]" if ROOT in passwords else "users: []"
    exported = dict.fromkeys(subject for role in roles for subject in role.publish)
    lines = [
        "accounts {",
        f"  {TAPE} {{",
        "    jetstream: enabled",
        f"    {root}",
        "    exports: [",
        f"      {{ stream: {json.dumps(LIVE)} }}",
        *(f"      {{ service: {json.dumps(subject)}{_replies(subject)} }}" for subject in exported),
        "    ]",
        "  }",
    ]
    for role in roles:
        lines += [f"  {json.dumps(role.name)} {{", *_account(role, passwords[role.name]), "  }"]
    return "\n".join([*lines, "}", ""])


def shipped(roles: Iterable[Role] = ROLES) -> str:
    """The same as a file of its own, its passwords being variables of the server's environment."""
    roles = tuple(roles)
    passwords = {role.name: f"$TAPELINE_NATS_{role.name.upper().replace('-', '_')}_PASSWORD" for role in roles}
    return f"# Generated from shared/tapeline/permissions.py. Do not edit.\n{configuration(passwords, roles)}"


def _replies(subject: str) -> str:
    return ", response_type: stream" if subject.startswith(_STREAMED) else ""


def _account(role: Role, password: str) -> list[str]:
    live = [f'      {{ stream: {{ account: {TAPE}, subject: "{LIVE}" }} }}'] if role.live else []
    return [
        f"    users: [{{ user: {json.dumps(role.name)}, password: {password}, permissions: {{ publish: {{",
        "      allow: [",
        *(f"        {json.dumps(subject)}" for subject in role.publish),
        "      ]",
        "      deny: [",
        *(f"        {json.dumps(subject)}" for subject in role.deny),
        "      ]",
        "    } } }]",
        "    imports: [",
        *live,
        *(f"      {{ service: {{ account: {TAPE}, subject: {json.dumps(subject)} }} }}" for subject in role.publish),
        "    ]",
    ]
