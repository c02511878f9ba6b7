"""What a deployment has in NATS: streams, consumers, buckets. `apply` makes it so, `drift` says what is not so.

Only the provision step calls `apply`; services call `drift`, change nothing, and refuse to start on drift.
It speaks the JetStream API in plain JSON, because nats-py's types drop the settings they do not know.
"""

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from nats.aio.client import Client

from . import limits, subjects
from .connection import Refused, Unavailable, api
from .tape import Deployment, Tape, find

log = logging.getLogger(__name__)


class Consumer(NamedTuple):
    """A durable consumer, as the JetStream API takes it."""

    stream: str
    name: str
    config: dict[str, Any]


Settings = Mapping[str, Any]
SECOND_NS = 1_000_000_000


def streams(deployment: Deployment) -> list[dict[str, Any]]:
    """The streams a deployment needs, as the JetStream API takes them."""
    shared = {"storage": "file", "num_replicas": deployment.replicas, "allow_direct": True}
    tapes = [
        shared
        | {
            "name": subjects.stream(shard),
            "subjects": [f"tape.{shard}.>"],
            "allow_atomic": True,
            "allow_msg_ttl": True,
            "republish": {"src": f"tape.{shard}.>", "dest": f"live.tape.{shard}.>"},
            "metadata": deployment.metadata,
        }
        for shard in range(deployment.shards)
    ]
    # Not among the events: a stream that allows schedules lets whoever can write one of its subjects write all of them,
    # and purge it by a roll-up.
    wakes = shared | {
        "name": subjects.WAKES,
        "subjects": ["wake.>"],
        "allow_msg_ttl": True,
        "allow_msg_schedules": True,
    }
    registry = shared | {
        "name": f"KV_{subjects.REGISTRY}",
        "subjects": [f"$KV.{subjects.REGISTRY}.>"],
        "max_msgs_per_subject": 1,
        "max_age": int(limits.REGISTRY_TTL_S * SECOND_NS),
        "discard": "new",
        "allow_rollup_hdrs": False,  # or one worker could withdraw what others offer
        "deny_delete": True,
    }
    dead = shared | {"name": subjects.DEAD, "subjects": ["dead.>"]}
    lists = shared | {
        "name": subjects.LISTS,
        "subjects": ["list.>"],
        "max_msgs_per_subject": 1,
        "allow_atomic": True,
        "allow_msg_ttl": True,
    }
    passing = shared | {"max_msgs_per_subject": 1}  # on disk: the server forgets a stream in memory when it restarts
    counters = passing | {
        "name": subjects.COUNTERS,
        "subjects": ["count.>"],
        "allow_msg_counter": True,  # which excludes a TTL for each message
        "max_age": int(limits.COUNTER_TTL_S * SECOND_NS),
    }
    leases = passing | {
        "name": subjects.LEASES,
        "subjects": ["lease.>"],
        "max_age": int(limits.LEASE_TTL_S * SECOND_NS),
    }
    results = shared | {  # append only: whoever stores one can neither change nor push out what is there
        "name": subjects.RESULTS,
        "subjects": ["result.>"],
        "max_msgs_per_subject": limits.RESULT_CHUNKS_MAX,
        "discard": "new",
        "discard_new_per_subject": True,
        "allow_rollup_hdrs": False,
        "deny_delete": True,
    }
    return [*tapes, wakes, registry, dead, results, lists, counters, leases]


def consumers(deployment: Deployment) -> list[Consumer]:
    """The durable consumers that wake inference. Tool workers make their own: see `tools.worker`."""
    shared = {
        "durable_name": subjects.TRIGGERS,
        "ack_policy": "explicit",
        "ack_wait": int(limits.ACK_WAIT_S * SECOND_NS),
        "max_deliver": -1,  # the worker counts, and ends a poisoned run with `error`
        "max_ack_pending": limits.TRIGGERS_PENDING_MAX,
    }
    tapes = [
        Consumer(
            subjects.stream(shard),
            subjects.TRIGGERS,
            shared | {"filter_subjects": [f"tape.{shard}.*.{subjects.INPUT}", f"tape.{shard}.*.{subjects.TOOL}"]},
        )
        for shard in range(deployment.shards)
    ]
    return [*tapes, Consumer(subjects.WAKES, subjects.TRIGGERS, shared | {"filter_subject": "wake.*.due.>"})]


async def apply(nc: Client, deployment: Deployment) -> list[str]:
    """Creates what is absent and updates what differs, keeping settings we say nothing about. Idempotent.

    Waits for a cluster that still elects its leaders. Returns a line per change. Raises `Refused` where the deployment
    cannot become so, `Unavailable`.
    """
    clock = asyncio.get_running_loop().time
    give_up = clock() + limits.PROVISION_PATIENCE_S
    changes: list[str] = []
    while True:
        try:
            await _apply(nc, deployment, changes)
        except Unavailable as error:
            if clock() > give_up:
                raise
            log.warning("%s; trying again", error)
            await asyncio.sleep(limits.PROVISION_RETRY_S)
        else:
            return changes


async def _apply(nc: Client, deployment: Deployment, changes: list[str]) -> None:
    for wanted in streams(deployment):
        name = wanted["name"]
        found = await _stream(nc, name)
        if found is None:
            await api(nc, f"STREAM.CREATE.{name}", wanted)
            changes.append(f"created stream {name}")
            continue
        shards = found.get("metadata", {}).get("tapeline.shards")
        if shards is not None and int(shards) != deployment.shards:
            raise Refused(
                f"this deployment has {shards} shards, which can never change; TAPELINE_SHARDS says {deployment.shards}"
            )
        if _differences(wanted, found):
            await api(nc, f"STREAM.UPDATE.{name}", _merged(wanted, found))
            changes.append(f"updated stream {name}")
        if found.get("allow_msg_schedules") and "allow_msg_schedules" not in wanted:
            log.warning("stream %s still allows schedules, for ever: see docs/operating.md, Who may write what", name)
    for stream, name, config in consumers(deployment):
        found = await _consumer(nc, stream, name)
        if found is None or _differences(config, found):
            merged = _merged(config, found or {})
            await api(nc, f"CONSUMER.CREATE.{stream}.{name}", {"stream_name": stream, "config": merged})
            changes.append(f"{'updated' if found else 'created'} consumer {name} of {stream}")


async def drift(nc: Client, deployment: Deployment) -> list[str]:
    """What differs from the deployment, a line each; empty where all is well."""
    lines = []
    for wanted in streams(deployment):
        found = await _stream(nc, wanted["name"])
        lines += _drift(f"stream {wanted['name']}", wanted, found)
    for stream, name, config in consumers(deployment):
        found = await _consumer(nc, stream, name)
        lines += _drift(f"consumer {name} of {stream}", config, found)
    return lines


async def verify(tape: Tape) -> None:
    """For a service: raises `Refused` with what has drifted, `Unavailable`."""
    if lines := await drift(tape.nc, await find(tape.nc)):
        raise Refused(
            "what is in NATS is not what was provisioned; run `python -m services.provision`: " + "; ".join(lines)
        )


async def verify_patiently(tape: Tape) -> None:
    """For a service about to start, perhaps while NATS elects its leaders. Raises as `verify` does."""
    await tape.patiently("JetStream", lambda: verify(tape))


def _drift(what: str, wanted: Settings, found: Settings | None) -> list[str]:
    if found is None:
        return [f"{what} is missing"]
    return [f"{what}: {key} is {found.get(key)!r}, not {wanted[key]!r}" for key in _differences(wanted, found)]


def _differences(wanted: Settings, found: Settings) -> list[str]:
    """The settings that are not as wanted; the server leaves out false and empty ones, and adds metadata."""
    different = []
    for key, value in wanted.items():
        actual = found.get(key)
        if key == "metadata":
            actual = {name: (actual or {}).get(name) for name in value}
        if actual != value and (actual or value):
            different.append(key)
    return different


def _merged(wanted: Settings, found: Settings) -> dict[str, Any]:
    merged = {**found, **wanted}
    if "metadata" in wanted:
        merged["metadata"] = {**found.get("metadata", {}), **wanted["metadata"]}
    return merged


async def _stream(nc: Client, name: str) -> dict[str, Any] | None:
    return await _config(nc, f"STREAM.INFO.{name}")


async def _consumer(nc: Client, stream: str, name: str) -> dict[str, Any] | None:
    return await _config(nc, f"CONSUMER.INFO.{stream}.{name}")


async def _config(nc: Client, method: str) -> dict[str, Any] | None:
    try:
        config: dict[str, Any] = (await api(nc, method))["config"]
    except Refused as error:
        if "not found" in str(error):
            return None
        raise
    return config
