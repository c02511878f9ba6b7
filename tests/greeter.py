"""A tool in two versions, for the tests of an upgrade. GREETER says which."""

import os

from tapeline.tools import tool

if os.environ.get("GREETER") == "2":

    @tool(idempotent=True)
    def greet(name: str, polite: bool = False) -> list[str]:
        """Greets, politely if asked."""
        return ["2", f"Good morning, {name}" if polite else f"Hi {name}"]

    @tool
    def wave() -> str:
        """Is only in the second version."""
        return "waves"
else:

    @tool(idempotent=True, name="greet")
    def greet_bluntly(name: str) -> list[str]:
        """Greets."""
        return ["1", f"Hi {name}"]
