"""A provider for measurements: Chat Completions over real HTTP, each chunk saying when it was sent.

`python -m tests.bench.provider PORT`. The request's user message says what to send: `chunks=400 rate=50`.
Clocks of different processes on one machine compare: `monotonic_ns` is the kernel's.
"""

import asyncio
import json
import re
import sys
import time

HEADERS = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(delta: dict[str, str], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    body = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "bench", "choices": [choice]}
    return framed(f"data: {json.dumps(body)}\n\n".encode())


def framed(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = re.search(rb"content-length: (\d+)", head)
            body = await reader.readexactly(int(length[1]) if length else 0)
            asked = re.findall(rb"chunks=(\d+) rate=(\d+)", body)
            if not asked:
                writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
                continue
            count, rate = map(int, asked[-1])
            writer.write(HEADERS + chunk({"role": "assistant", "content": ""}))
            start = time.monotonic()
            for number in range(count):
                await asyncio.sleep(max(0.0, start + number / rate - time.monotonic()))
                writer.write(chunk({"content": f"{time.monotonic_ns()} "}))
            writer.write(chunk({}, "stop") + framed(b"data: [DONE]\n\n") + b"0\r\n\r\n")
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        return
    finally:
        writer.close()


async def main() -> None:
    server = await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[1]))
    print("provider ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
