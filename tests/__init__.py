"""Tests, and what they share."""

from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent
"""Of the repository."""
