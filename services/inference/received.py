"""What a provider streams, as parts: the library's events in, and what servers do by surprise mended.

Never waits, and keeps of an answer only what its next event needs.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from pydantic_ai.messages import (
    ModelResponseStreamEvent,
    PartDeltaEvent,
    PartStartEvent,
    TextPart,
    TextPartDelta,
    ThinkingPart,
    ThinkingPartDelta,
    ToolCallPart,
    ToolCallPartDelta,
)
from pydantic_ai.models import StreamedResponse
from tapeline.depth import is_too_deep

from .part import CallInput, Finish, FinishReason, Part, ProviderError, Text, Thinking
from .prompt import Call


class Answer:
    """One answer being received: turns the library's events into parts."""

    def __init__(self) -> None:
        self._calls: dict[int, CallInput] = {}  # by part index: how the call began
        self._halves: dict[int, str] = {}  # by part index: the first half of a character

    def parts(self, event: ModelResponseStreamEvent) -> Iterator[Part]:
        """What the event says."""
        match event:
            case PartStartEvent(part=TextPart(content=text)) | PartDeltaEvent(delta=TextPartDelta(content_delta=text)):
                if whole := self._whole(event.index, text):
                    yield Text(whole)
            case (
                PartStartEvent(part=ThinkingPart(content=text))
                | PartDeltaEvent(delta=ThinkingPartDelta(content_delta=str(text)))
            ):
                if whole := self._whole(event.index, text):
                    yield Thinking(whole)
            case PartStartEvent(part=ToolCallPart() as call) if event.index not in self._calls:
                # A provider's id may be missing, repeated, or in letters that another provider refuses.
                index = len(self._calls)
                self._calls[event.index] = CallInput(index, f"call_{index}", call.tool_name, "")
                yield self._input(event.index, call.args)
            case PartDeltaEvent(delta=ToolCallPartDelta(args_delta=arguments)) if arguments:
                yield self._input(event.index, arguments)

    def refusal(self, response: StreamedResponse) -> Text | None:
        """What OpenAI calls a refusal is text to a reader; the library keeps it aside until the end."""
        refusal = (response.provider_details or {}).get("refusal")
        return Text(_mended(refusal)) if refusal and isinstance(refusal, str) else None

    def finish(self, response: StreamedResponse) -> Finish:
        """The end of the whole answer. Raises ProviderError where it is none."""
        # A reason the library has no name for is a finish all the same.
        unnamed = (response.provider_details or {}).get("finish_reason")
        reason = response.finish_reason or ("stop" if unnamed else None)
        if reason is None:
            raise ProviderError("provider_cut", "the answer ended without saying it was finished")
        if reason == "error":
            raise ProviderError("provider_unavailable", "the provider gave up on the answer")
        received = response.get()
        written = dict(
            zip(sorted(self._calls), (p for p in received.parts if isinstance(p, ToolCallPart)), strict=True)
        )
        calls = [
            Call(began.id, written[index].tool_name, _read_arguments(written[index].args))
            for index, began in self._calls.items()
        ]
        usage = received.usage
        counts = {
            "input_tokens": usage.input_tokens,
            "output_tokens": usage.output_tokens,
            "cache_read_tokens": usage.cache_read_tokens,
            "cache_write_tokens": usage.cache_write_tokens,
            **usage.details,
        }
        return Finish(_finish_reason(reason, calls), calls, {name: count for name, count in counts.items() if count})

    def _input(self, index: int, arguments: str | Mapping[str, Any] | None) -> CallInput:
        began = self._calls[index]
        return CallInput(began.index, began.id, began.tool, self._whole(index, _written(arguments)))

    def _whole(self, index: int, text: str) -> str:
        """Text that UTF-8 can carry. A server that counts in UTF-16 may cut a character in two."""
        if text.isascii() and not self._halves:
            return text
        text = self._halves.pop(index, "") + text
        if "\ud800" <= text[-1:] <= "\udbff":
            text, self._halves[index] = text[:-1], text[-1]
        return _mended(text)


def _finish_reason(reason: str, calls: list[Call]) -> FinishReason:
    """The one word for each ending, for some servers say `stop` after calls."""
    if reason in ("length", "content_filter"):
        return "length" if reason == "length" else "content_filter"
    if calls:
        return "tool_calls"
    if reason == "tool_call":
        raise ProviderError("provider_malformed", "the model asked for calls but named no tool")
    return "stop"


def _written(arguments: str | Mapping[str, Any] | None) -> str:
    """The arguments as JSON, of which some providers make an object first."""
    return json.dumps(arguments) if isinstance(arguments, Mapping) else arguments or ""


def _read_arguments(arguments: str | Mapping[str, Any] | None) -> dict[str, Any] | str:
    """An object; the text as it is where it is none, or one too deep for whoever reads it from the tape."""
    text = _mended(_written(arguments))
    if not text.strip():
        return {}
    try:
        read = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return text
    return read if isinstance(read, dict) and not is_too_deep(read) else text


def _mended(text: str) -> str:
    """The text with both halves of a character joined, and a half without its other replaced."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
