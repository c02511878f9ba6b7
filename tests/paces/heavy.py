"""A pool whose calls take a second and a half each, in a thread."""

import time

from tapeline.tools import tool


@tool(idempotent=True)
def heavy() -> str:
    """Blocks its thread."""
    time.sleep(1.5)
    return "heavy"
