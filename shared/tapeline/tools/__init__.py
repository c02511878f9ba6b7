"""What a tool author needs: `tool` makes a typed function one, `Context` is what it may ask for while it runs,
`ToolError` is how it tells the model that it failed. `tapeline.tools.testing` calls a tool without a server;
`python -m tapeline.tools my_tools` runs a worker.
"""

from .context import Context, ToolError
from .definition import Tool, tool

__all__ = ["Context", "Tool", "ToolError", "tool"]
