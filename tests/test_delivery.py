"""Deliveries from a durable consumer of a real server."""

from typing import Any, Final
from urllib.parse import urlsplit

from tapeline import subjects
from tapeline.connection import api
from tapeline.delivery import Deliveries, Delivery
from tapeline.tape import Tape

from tests.line import Line
from tests.stack import until

NEVER_NS: Final = 24 * 3_600 * 1_000_000_000  # until the server delivers again by itself
STREAM: Final = subjects.stream(0)


async def test_what_is_on_its_way_when_no_more_is_taken_is_given_back(tape: Tape, nats_url: str) -> None:
    config = {"name": "d", "durable_name": "d", "filter_subject": "tape.0.>", "ack_policy": "explicit"}
    body = {"stream_name": STREAM, "config": config | {"ack_wait": NEVER_NS}, "action": "create"}
    await api(tape.nc, f"CONSUMER.CREATE.{STREAM}.d.tape.0.>", body)

    async def consumer_has(key: str) -> bool:
        found: dict[str, Any] = await api(tape.nc, f"CONSUMER.INFO.{STREAM}.d")
        return bool(found[key])

    taken: list[tuple[str, Delivery]] = []

    async def of_one(delivery: Delivery) -> None:
        taken.append(("one", delivery))

    async def of_other(delivery: Delivery) -> None:
        taken.append(("other", delivery))
        await delivery.ack()

    port = urlsplit(nats_url).port
    assert port is not None
    async with Line.to(port) as line:
        one = Deliveries(line.url.replace("http:", "nats:"), "one", of_one)
        await one.start()
        await one.bind(STREAM, "d", "tape.0.>")
        await until("it asks", lambda: consumer_has("num_waiting"))
        line.hold()
        await tape.put(subjects.chain(0, "c", subjects.INPUT), b"{}")
        await until("it is sent", lambda: consumer_has("num_ack_pending"))
        one.stop_taking()
        line.let_go()
        other = Deliveries(nats_url, "other", of_other)
        await other.start()
        await other.bind(STREAM, "d", "tape.0.>")
        ((who, delivery),) = await until("it is delivered again", lambda: taken)
        assert (who, delivery.number) == ("other", 2)
        for deliveries in (one, other):
            deliveries.stop_taking()
            await deliveries.close()
