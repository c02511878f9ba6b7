"""What a tool author needs: `tool` makes a typed function one, `Context` is what it may ask for while it runs,
`ToolError` is how it tells the model that it failed. A generator yields text, fractions or `Progress`, and may end
with `Return`. `tapeline.tools.testing` calls a tool without a server;
`python -m tapeline.tools my_tools` runs a worker.
"""

from .context import Context, Progress, ToolError
from .definition import Tool, tool
from .generators import Return

__all__ = ["Context", "Progress", "Return", "Tool", "ToolError", "tool"]
