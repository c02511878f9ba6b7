"""The durable consumers through which a tool's workers get their calls: one per tool and shard, made by the first
worker that finds none. Never changes one that is there.
"""

import datetime
from typing import Any, Final

from tapeline import limits, subjects
from tapeline.connection import Refused, api
from tapeline.tape import Tape

_SECOND_NS: Final = 1_000_000_000


async def ensure(tape: Tape, tool: str, shard: int) -> bool:
    """Makes the consumer where it is absent; whether it was. Raises `Refused` where it has other settings."""
    stream, name = subjects.stream(shard), subjects.tool_consumer(tool)
    wanted = _config(tool, shard)
    found = await _find(tape, stream, name)
    if found is None:
        # A worker that joins does not replay history, but serves what was called while there was none.
        since = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=limits.TOOL_TIMEOUT_S_MAX)
        config = wanted | {"opt_start_time": since.isoformat().replace("+00:00", "Z")}
        try:
            await api(
                tape.nc,
                f"CONSUMER.CREATE.{stream}.{name}.{wanted['filter_subject']}",
                {"stream_name": stream, "config": config, "action": "create"},
            )
        except Refused:
            found = await _find(tape, stream, name)  # another worker may have made it this moment
            if found is None:
                raise
        else:
            return True
    for key, value in wanted.items():
        if found.get(key) != value:
            raise Refused(
                f"consumer {name} of {stream} has {key} {found.get(key)!r} and this worker needs {value!r}; "
                "another version made it: delete it once that version's workers are gone"
            )
    return False


def _config(tool: str, shard: int) -> dict[str, Any]:
    name = subjects.tool_consumer(tool)
    return {
        "name": name,
        "durable_name": name,
        "filter_subject": subjects.chain(shard, "*", subjects.call(tool)),
        "deliver_policy": "by_start_time",
        "ack_policy": "explicit",
        "ack_wait": int(limits.ACK_WAIT_S * _SECOND_NS),
        "max_deliver": -1,  # the worker counts: see TOOL_DELIVERIES_MAX
        "max_ack_pending": limits.TOOL_PENDING_MAX,
        "max_waiting": limits.TOOL_WORKERS_MAX,
        "inactive_threshold": int(limits.TOOL_CONSUMER_IDLE_S * _SECOND_NS),
    }


async def _find(tape: Tape, stream: str, name: str) -> dict[str, Any] | None:
    try:
        config: dict[str, Any] = (await api(tape.nc, f"CONSUMER.INFO.{stream}.{name}"))["config"]
    except Refused as error:
        if "not found" in str(error):
            return None
        raise
    return config
