"""`scripts/bench latency`: from the moment a provider sends a chunk to the moment a reader has it.

Through Tapeline (provider → inference → JetStream → edge → reader, each a process) and, beside it in the same
run, through a bare Starlette StreamingResponse. Rounds alternate, so that both meet the same machine.
"""

import argparse
import asyncio
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from services.process import spawn_options
from tests import ROOT
from tests.stack import Stack, free_port, wait_until

STAMP = re.compile(rb"(\d{10,}) ")


@asynccontextmanager
async def running(module: str, port: int, env: dict[str, str]) -> AsyncIterator[None]:
    process = _start(module, port, env)
    try:

        def up() -> bool:
            try:
                httpx.get(f"http://127.0.0.1:{port}/", timeout=1)
            except httpx.TransportError:
                return False
            return True

        await asyncio.to_thread(wait_until, module, up)
        yield
    finally:
        process.kill()
        process.wait()


def _start(module: str, port: int, env: dict[str, str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", module, str(port)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, **spawn_options())


async def receive(client: httpx.AsyncClient, url: str, content: str) -> tuple[list[float], float]:
    """Milliseconds from sent to received of each chunk, and from the request to the first chunk."""
    late_ms: list[float] = []
    started, first_ms, rest = time.monotonic_ns(), 0.0, b""
    headers = {"Accept": "text/event-stream"}
    async with client.stream("POST", url, json={"content": content}, headers=headers) as response:
        response.raise_for_status()
        async for data in response.aiter_raw():
            now = time.monotonic_ns()
            *frames, rest = (rest + data).split(b"\n\n")
            for frame in frames:
                if b"event: token" not in frame:
                    continue
                if not late_ms:
                    first_ms = (now - started) / 1e6
                late_ms += [(now - int(stamp)) / 1e6 for stamp in STAMP.findall(frame)]
    return late_ms, first_ms


async def tapeline(client: httpx.AsyncClient, base: str, content: str) -> tuple[list[float], float]:
    created = await client.post(f"{base}/v1/conversations", json={})
    return await receive(client, f"{base}{created.json()['url']}/messages", content)


async def measure(options: argparse.Namespace) -> None:
    content = f"chunks={options.chunks} rate={options.rate}"
    provider, bare = free_port(), free_port()
    provided = {"OPENAI_BASE_URL": f"http://127.0.0.1:{provider}/v1", "OPENAI_API_KEY": "bench"}
    env = {**os.environ, **provided}
    with tempfile.TemporaryDirectory() as folder:
        async with running("tests.bench.provider", provider, env), running("tests.bench.bare", bare, env):
            stack = await asyncio.to_thread(Stack, Path(folder), {**provided, "TAPELINE_MODEL": "openai:bench"})
            try:
                await asyncio.to_thread(stack.start_inference)
                await asyncio.to_thread(stack.add_edge)
                limits = httpx.Limits(max_connections=None)
                async with httpx.AsyncClient(limits=limits, timeout=None) as client:

                    async def round_of(name: str, count: int) -> tuple[list[float], list[float]]:
                        ways: dict[str, Callable[[], object]] = {
                            "tapeline": lambda: tapeline(client, stack.url, content),
                            "bare": lambda: receive(client, f"http://127.0.0.1:{bare}/chat", content),
                        }
                        got = await asyncio.gather(*(ways[name]() for _ in range(count)))  # type: ignore[call-overload]
                        return [ms for late, _ in got for ms in late], [first for _, first in got]

                    for name in ("tapeline", "bare"):
                        await round_of(name, 1)  # connections, imports
                    print(f"{options.chunks} chunks at {options.rate}/s per stream, {options.rounds} rounds, ms")
                    print(f"{'streams':>8} {'way':>9} {'p50':>8} {'p99':>8} {'max':>8} {'first':>8} {'chunks':>8}")
                    for count in options.streams:
                        medians = {}
                        totals: dict[str, tuple[list[float], list[float]]] = {"bare": ([], []), "tapeline": ([], [])}
                        for _ in range(options.rounds):
                            for name, (late, first) in totals.items():
                                got = await round_of(name, count)
                                late += got[0]
                                first += got[1]
                        for name, (late, first) in totals.items():
                            cuts = statistics.quantiles(late, n=100)
                            medians[name] = cuts[49]
                            print(
                                f"{count:>8} {name:>9} {cuts[49]:>8.2f} {cuts[98]:>8.2f} {max(late):>8.2f} "
                                f"{statistics.median(first):>8.2f} {len(late):>8}"
                            )
                        print(f"{count:>8} tapeline adds {medians['tapeline'] - medians['bare']:.2f} ms at p50")
            finally:
                stack.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=250)
    parser.add_argument("--rate", type=int, default=50, help="chunks a second")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 10, 40])
    asyncio.run(measure(parser.parse_args()))
