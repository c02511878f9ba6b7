"""What a model is asked, as plain data.

Owns the shape of a prompt: who said what, which tools are offered. Knows no provider's wire, which is
`provider`'s, and does not decide what belongs in a prompt, which is the engine's.
"""

from typing import Any

from msgspec import Struct


class Call(Struct, frozen=True):
    """A tool call the model asked for."""

    id: str
    tool: str
    arguments: dict[str, Any] | str
    """The raw text where the model wrote no JSON object."""


class UserTurn(Struct, frozen=True):
    """The user said something."""

    content: str


class AnswerTurn(Struct, frozen=True):
    """The model answered: one step."""

    text: str
    thinking: str = ""
    calls: list[Call] = []


class ResultTurn(Struct, frozen=True):
    """What came of a call."""

    call: str
    tool: str
    content: str
    is_error: bool = False


Turn = UserTurn | AnswerTurn | ResultTurn


class ToolSpec(Struct, frozen=True):
    """A tool the model may call."""

    name: str
    description: str
    parameters: dict[str, Any]
    """JSON Schema of the arguments."""


class Prompt(Struct, frozen=True):
    """Everything one request to a model says."""

    system: str
    turns: list[Turn]
    tools: list[ToolSpec]
    model: str = ""
    """`provider:name`; empty: the deployment's default."""
