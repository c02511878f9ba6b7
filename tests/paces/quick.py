"""A pool whose calls take no time."""

from tapeline.tools import tool


@tool(idempotent=True)
def quick() -> str:
    """Returns at once."""
    return "quick"
