"""Tests, and what they share."""

from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent
"""Of the repository."""
PATIENT_S: Final = 60.0
"""How long a test waits for what should come soon. It takes so long only where something is wrong; but a machine that
has other things to do may stand still for seconds.
"""
