"""Every Python block of the documentation runs as it stands, its tests included."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from services.inference import demo
from tests import ROOT

TEXTS: Final = {
    **{name: (ROOT / name).read_text() for name in ("README.md", "docs/tools.md", "docs/api.md", "docs/operating.md")},
    "services/inference/demo.py": "\n\n".join(value for value in vars(demo).values() if isinstance(value, str)),
}
FENCED: Final = re.compile(r"^```python.*?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS: Final = [(name, block) for name, text in TEXTS.items() for block in FENCED.findall(text)]


def called(block: str) -> str:
    """The name of the block's file: what its first line says, such as `# my_tools.py`."""
    named = re.match(r"# (\w+\.py)\n", block)
    return named[1] if named else "block.py"


@pytest.mark.parametrize(("name", "block"), BLOCKS, ids=[f"{name}-{called(block)}" for name, block in BLOCKS])
def test_a_block_runs(name: str, block: str, tmp_path: Path) -> None:
    for other, earlier in BLOCKS:  # a block may import the files of those before it on its page
        if other == name and called(earlier) != "block.py":
            (tmp_path / called(earlier)).write_text(earlier)
    file = tmp_path / called(block)
    file.write_text(block)
    functions = [node.name for node in ast.parse(block).body if isinstance(node, ast.FunctionDef)]
    has_tests = any(function.startswith("test_") for function in functions)
    command = ["-m", "pytest", "-q", "--import-mode=prepend"] if has_tests else ["-W", "error"]
    ended = subprocess.run(
        [sys.executable, *command, file], cwd=tmp_path, capture_output=True, text=True, timeout=50, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_there_are_blocks_on_each_page() -> None:
    assert {"README.md", "docs/tools.md", "services/inference/demo.py"} <= {name for name, _ in BLOCKS}
