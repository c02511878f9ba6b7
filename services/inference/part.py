"""What a model answers, as plain data, and how it fails to.

Owns the shape of an answer on its way, whoever gives it: `demo`, or a provider by way of `received`.
"""

from typing import Literal

from msgspec import Struct

from .prompt import Call

ProviderCode = Literal[
    "provider_auth",
    "provider_rate_limited",
    "provider_unavailable",
    "provider_rejected",
    "provider_cut",
    "provider_timeout",
    "provider_malformed",
]
FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]


class Thinking(Struct, frozen=True):
    """Reasoning text, as it comes."""

    text: str


class Text(Struct, frozen=True):
    """Answer text, as it comes."""

    text: str


class CallInput(Struct, frozen=True):
    """A fragment of a call's arguments; the first, which may be empty, says that the call begins."""

    index: int
    """The call's place among `Finish.calls`, from 0."""
    id: str
    """Unique in this answer only."""
    tool: str
    text: str


class Finish(Struct, frozen=True):
    """The answer is complete."""

    reason: FinishReason
    calls: list[Call]
    usage: dict[str, int]
    """`input_tokens`, `output_tokens` and whatever else the provider counts."""


Part = Thinking | Text | CallInput | Finish


class ProviderError(Exception):
    """The provider gave no complete answer. `message` is readable and holds no credentials."""

    def __init__(
        self, code: ProviderCode, message: str, *, retryable: bool = True, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retryable = retryable
        self.retry_after_s = retry_after_s
