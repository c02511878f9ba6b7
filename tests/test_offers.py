"""What a worker with many tools asks of NATS to keep them on offer."""

import asyncio
from typing import Any

import pytest
from tapeline import limits, subjects
from tapeline.record import Record
from tapeline.registry import Registry, ToolSpec
from tapeline.tape import Tape
from tapeline.tools import Tool, consumer
from tapeline.tools.definition import AnyTool
from tapeline.tools.worker import Worker

from tests.stack import until

KEYS = f"$KV.{subjects.REGISTRY}"


def named(name: str) -> AnyTool:
    def say() -> str:
        return name

    return Tool(say, name=name)


def spec(name: str) -> ToolSpec:
    return ToolSpec(name=name, description="", parameters={"type": "object"})


async def place(tape: Tape, key: str) -> int:
    (record,) = await tape.newest(f"KV_{subjects.REGISTRY}", f"{KEYS}.{key}")
    return record.seq


async def test_offers_are_renewed_though_consumers_take_long_to_answer(
    tape: Tape, nats_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "REGISTRY_REFRESH_S", 0.2)
    monkeypatch.setattr(limits, "STAND_BY_LOOK_S", 0.05)
    worker = Worker(tape, [named(f"t{number}") for number in range(8)], "", nats_url)
    await worker.start()
    announced = await place(tape, f"t7.{worker.id}")
    real, asked, answers = consumer.ensure, 0, asyncio.Event()

    async def slow(*what: Any) -> bool:
        nonlocal asked
        asked += 1
        await answers.wait()
        return await real(*what)

    monkeypatch.setattr(consumer, "ensure", slow)
    try:
        await until("many are asked at a time", lambda: asked == limits.CONSUMERS_ASKED_MAX)
        assert await place(tape, f"t7.{worker.id}") > announced, "before any of them has answered"
        answers.set()
        await until("all are asked", lambda: asked >= 8 * tape.deployment.shards)
    finally:
        answers.set()
        await worker.stop()


async def test_a_worker_reads_the_offers_of_its_own_tools_only(tape: Tape, monkeypatch: pytest.MonkeyPatch) -> None:
    await Registry(tape, "other").announce([spec(f"t{number}") for number in range(50)])
    await Registry(tape, "same").announce([spec("t7")])
    read: list[str] = []
    real = tape._page

    async def counted(stream: str, request: dict[str, Any]) -> tuple[list[Record], bool]:
        page, more = await real(stream, request)
        read.extend(record.subject for record in page)
        return page, more

    monkeypatch.setattr(tape, "_page", counted)
    assert (await Registry(tape, "w").counting("t7", "t70"))["t7"].worker == "other"
    assert sorted(read) == [f"{KEYS}.t7.other", f"{KEYS}.t7.same"]
