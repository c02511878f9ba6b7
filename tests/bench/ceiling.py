"""The ceiling: a bare uvicorn ASGI loop that sends ready-made frames to whoever listens, with no log behind it.

`python -m tests.bench.ceiling PORT`. `GET /<topic>` streams a topic; `POST /?topics=&events=&rate=` sends so many
events to each of the topics `0`, `1`…
"""

import asyncio
import sys
from collections import defaultdict
from typing import Any
from urllib.parse import parse_qs

import uvicorn

TEXT = b"a few words, "
DATA = b'{"type":"token","run":"bench","ts":1795365404662,"step":1,"attempt":1,"text":"%s"}' % TEXT
TICK_S = 0.002
FRAME = b"id: %d\nevent: token\ndata: %s\n\n"


class Topic:
    """What was sent on one topic, and who waits for more."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self._waiting: list[asyncio.Future[None]] = []

    def add(self, frame: bytes) -> None:
        self.frames.append(frame)
        waiting, self._waiting = self._waiting, []
        for news in waiting:
            if not news.done():
                news.set_result(None)

    def news(self) -> asyncio.Future[None]:
        """As the edge waits: with an `Event` an event costs half as much again, and the ceiling would be a low one."""
        news: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(news)
        return news


topics: dict[str, Topic] = defaultdict(Topic)
sending: set[asyncio.Task[None]] = set()


async def run(names: int, events: int, rate: float) -> None:
    """Each topic at its own times, evenly spread, as the conversations of people are."""
    clock = asyncio.get_running_loop().time
    started = clock()
    for number in range(events):
        frame = FRAME % (number + 1, DATA)
        for name in range(names):
            due = started + (number + name / names) / rate
            if due > clock():
                await asyncio.sleep(max(due - clock(), TICK_S))
            topics[str(name)].add(frame)


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        return
    if scope["method"] == "POST":
        query = {name: float(values[0]) for name, values in parse_qs(scope["query_string"].decode()).items()}
        task = asyncio.create_task(run(int(query["topics"]), int(query["events"]), query["rate"]))
        sending.add(task)
        await send({"type": "http.response.start", "status": 202, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        return
    topic = topics[scope["path"][1:]]
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    await send({"type": "http.response.body", "body": b": hello\n", "more_body": True})
    sent = len(topic.frames)
    while True:
        if sent == len(topic.frames):
            await topic.news()
        body = topic.frames[sent] if sent + 1 == len(topic.frames) else b"".join(topic.frames[sent:])
        sent = len(topic.frames)
        await send({"type": "http.response.body", "body": body, "more_body": True})


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", access_log=False, loop="uvloop")
