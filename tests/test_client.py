"""The npm package shared/client and what of the page needs no browser: their own tests in Node, and a real edge over
a line that cuts every connection.
"""

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from tests import ROOT
from tests.client import as_received, log_of
from tests.line import Line
from tests.stack import Stack

BIN: Final = Path(sys.prefix) / "bin"
NODE: Final = str(BIN / "node")
SOURCE: Final = '"./shared/client/src/index.ts"'  # that it runs as a package is for package.test.ts
TESTS: Final = ROOT / "tests" / "client"
TIMEOUT_S: Final = 120.0
HEAD_BYTES: Final = 300  # of an answer: hardly more than its headers, so that the first connections give nothing


@pytest.mark.timeout(TIMEOUT_S + 10)
@pytest.mark.parametrize("folder", ["client", "page"])
def test_what_runs_in_node(folder: str) -> None:
    names = sorted(str(path) for path in (ROOT / "tests" / folder).glob("*.test.ts"))
    assert names
    ran = subprocess.run(
        [NODE, "--import", str(ROOT / "tests/client/sources.ts"), "--test", "--test-timeout=60000", *names],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},  # npm is there, and looks for node
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_example_of_its_readme_runs_in_node(stack: Stack) -> None:
    _, example = re.findall(r"(?ms)^```ts\n(.*?)^```", (ROOT / "shared" / "client" / "README.md").read_text())
    ran = subprocess.run(
        [NODE, "--input-type=module-typescript", "--eval", example.replace('"@tapeline/client"', SOURCE)],
        cwd=ROOT,
        env={**os.environ, "TAPELINE_URL": stack.url},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "408" in ran.stdout


@pytest.mark.parametrize("content", ["12 * 34 é 漢 🙂", "long 40"])
async def test_every_connection_to_a_real_edge_is_cut_and_each_event_comes_once(stack: Stack, content: str) -> None:
    async with Line.to(stack.ports[0]) as line:
        line.bytes_first = HEAD_BYTES
        node = await asyncio.create_subprocess_exec(
            NODE, str(TESTS / "reads.ts"), line.url, stack.url, content, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            out, err = await asyncio.wait_for(node.communicate(), TIMEOUT_S)
        finally:
            if node.returncode is None:
                node.kill()
        assert node.returncode == 0, err.decode()
        assert line.connections > 20
    read: dict[str, Any] = json.loads(out)
    log = await log_of(stack.nats.url, read["id"])
    expected = [{**json.loads(one.data), "id": one.id} for one in as_received(log, read["asked"][0]["run"])]
    assert read["asked"] == expected
    assert read["events"] == expected
    assert read["stored"] == [record.seq for record in log]
