"""The yardstick: the provider's stream through one Starlette StreamingResponse, with no log in between.

`python -m tests.bench.bare PORT`, the provider being at OPENAI_BASE_URL. What one would write in an afternoon.
"""

import json
import sys
from collections.abc import AsyncIterator

import uvicorn
from openai import AsyncOpenAI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route


async def chat(request: Request) -> StreamingResponse:
    content = (await request.json())["content"]

    async def tokens() -> AsyncIterator[bytes]:
        stream = await client.chat.completions.create(
            model="bench", messages=[{"role": "user", "content": content}], stream=True
        )
        async for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                data = json.dumps({"type": "token", "text": chunk.choices[0].delta.content})
                yield f"event: token\ndata: {data}\n\n".encode()
        yield b"event: done\ndata: {}\n\n"

    return StreamingResponse(tokens(), media_type="text/event-stream")


if __name__ == "__main__":
    client = AsyncOpenAI()
    app = Starlette(routes=[Route("/chat", chat, methods=["POST"])])
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning")
