"""Tool workers as processes, and runs that call their tools as inference would write them."""

import os
import signal
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from tapeline import subjects
from tapeline.append import Chain
from tapeline.clock import now_ms
from tapeline.events import (
    Answer,
    AnswerCall,
    Conversation,
    Event,
    Message,
    Step,
    ToolCall,
    ToolEvent,
    ToolResult,
    ToolStarted,
)
from tapeline.tape import Tape

from tests import PATIENT_S
from tests.forkserver import Running, spawn
from tests.stack import until


class Asked:
    """One run that calls tools, as inference would write it."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.conversation = uuid4().hex
        self.chain = Chain(tape, self.conversation, 0, ends=lambda _: False)

    async def call(self, tool: str, arguments: Any, timeout_s: float = 60.0, *, calls: int = 1) -> list[str]:
        """Begins the run and calls the tool, or several of it at once; their ids."""
        ids = [uuid4().hex for _ in range(calls)]
        now = now_ms()
        asked = [AnswerCall(call=call, tool=tool, arguments=arguments) for call in ids]
        deadline = now + int(timeout_s * 1000)
        of_step: dict[str, Any] = {"run": "r", "ts": now, "step": 1, "attempt": 1}
        await self.chain.commit(
            [
                (subjects.INPUT, Conversation(run="-", ts=now, owner="local")),
                (subjects.INPUT, Message(run="r", ts=now, content="go")),
                (subjects.MODEL, Step(**of_step, worker="test", trigger=2)),
                (subjects.MODEL, Answer(**of_step, finish="tool_calls", calls=asked)),
                *(
                    (
                        subjects.call(tool),
                        ToolCall(**of_step, call=call, tool=tool, arguments=arguments, deadline=deadline),
                    )
                    for call in ids
                ),
            ]
        )
        return ids

    async def append(self, kind: str, event: Event) -> None:
        await self.chain.append(kind, event)

    async def events(self) -> list[Any]:
        return [record.event() for record in await self.tape.read(self.conversation)]

    async def of(self, kind: type[ToolEvent], call: str) -> list[Any]:
        return [event for event in await self.events() if isinstance(event, kind) and event.call == call]

    async def started(self, call: str, timeout_s: float = PATIENT_S) -> ToolStarted:
        found = await until("tool_started", lambda: self.of(ToolStarted, call), timeout_s)
        started: ToolStarted = found[0]
        return started

    async def result(self, call: str, timeout_s: float = PATIENT_S) -> ToolResult:
        found = await until("tool_result", lambda: self.of(ToolResult, call), timeout_s)
        assert len(found) == 1, found
        result: ToolResult = found[0]
        return result


class Worker:
    """`python -m tapeline.tools` as a process."""

    def __init__(self, folder: Path, nats_url: str) -> None:
        self.folder = folder
        self.nats_url = nats_url
        self.ready = ""
        self._process: Running | None = None

    @property
    def process(self) -> Running:
        assert self._process is not None
        return self._process

    @property
    def journal(self) -> Path:
        return self.folder / "journal"

    def noted(self) -> list[str]:
        return self.journal.read_text().splitlines() if self.journal.exists() else []

    async def start(self, *modules: str, ready: bool = True, env: Mapping[str, str] | None = None) -> "Worker":
        ours = {key: value for key, value in os.environ.items() if not key.startswith(("TAPELINE_", "OTEL_"))}
        if self.nats_url:
            ours["TAPELINE_NATS_URL"] = self.nats_url
        log = self.folder / f"worker-{uuid4().hex}.log"
        self._process = spawn(
            ["tapeline.tools", *(modules or ("tests.toolbox",))],
            ours | dict(env or {}) | {"TOOLBOX_JOURNAL": str(self.journal)},
            log.with_suffix(".out"),
            log,
        )
        if ready:
            self.ready = await until("tools ready", lambda: self._ready(log.with_suffix(".out")))
        return self

    def _ready(self, out: Path) -> str:
        assert self.process.poll() is None, self.said()
        line = out.read_text()
        assert "tools ready: ".startswith(line[:13]), line + self.said()
        return line if line.endswith("\n") else ""

    def said(self) -> str:
        return "".join(log.read_text() for log in self.folder.glob("worker-*.log"))

    async def ended(self, timeout_s: float = PATIENT_S) -> int:
        """Its exit code, when it has ended by itself."""
        await until("the worker has ended", lambda: self.process.poll() is not None, timeout_s)
        return self.process.wait()

    async def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return await self.ended()


Start = Callable[..., Awaitable[Worker]]


async def noted(worker: Worker, lines: int) -> bool:
    return len(worker.noted()) >= lines


async def said(worker: Worker, words: str) -> bool:
    return words in worker.said()
