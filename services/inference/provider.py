"""Model providers, as one stream of parts and one kind of error.

Owns everything that knows pydantic-ai, and what it and the SDKs below it do by surprise: the clients and their
connections, and the translation of a prompt, of what a provider streams and of how it fails. Never retries and
keeps nothing of an answer: that is the engine's.
"""

import asyncio
import json
import math
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from fnmatch import fnmatchcase
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct
from pydantic_ai.direct import model_request_stream
from pydantic_ai.exceptions import (
    ModelAPIError,
    ModelAuthenticationError,
    ModelConnectionError,
    ModelHTTPError,
    ModelQuotaExceededError,
    ModelRateLimitError,
    ModelRequestRejectedError,
    ModelServerError,
    ModelTimeoutError,
    ModelUnavailableError,
    UnexpectedModelBehavior,
    UserError,
)
from pydantic_ai.messages import (
    ModelMessage,
    ModelRequest,
    ModelRequestPart,
    ModelResponse,
    ModelResponsePart,
    ModelResponseStreamEvent,
    PartDeltaEvent,
    PartStartEvent,
    SystemPromptPart,
    TextPart,
    TextPartDelta,
    ThinkingPart,
    ThinkingPartDelta,
    ToolCallPart,
    ToolCallPartDelta,
    ToolReturnPart,
    UserPromptPart,
)
from pydantic_ai.models import Model, ModelRequestParameters, StreamedResponse, infer_model
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.profiles.openai import OpenAIModelProfile
from pydantic_ai.providers import Provider, infer_provider
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings
from pydantic_ai.tools import ToolDefinition
from tapeline.settings import ConfigError

from . import demo
from .prompt import AnswerTurn, Call, Prompt, ResultTurn, UserTurn

STALL_S_DEFAULT: Final = 120.0  # silence before the first chunk or between two; hidden reasoning is silence
STALL_S_MIN: Final = 0.01
MESSAGE_CHARS_MAX: Final = 500  # of a provider's own words in an error
TOOL_NAME_CHARS_MAX: Final = 64  # what every provider accepts
SECRET_CHARS_MIN: Final = 8  # a shorter value would blot out ordinary words

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


class Models:
    """Every model this deployment can ask: `demo`, or `provider:name`."""

    def __init__(self, default: str, environ: Mapping[str, str]) -> None:
        """Read the settings; raises ConfigError where one makes no sense. Nothing is opened yet."""
        self.default = default
        self._environ = environ
        self._stall_s = _number(environ, "TAPELINE_PROVIDER_STALL_S", STALL_S_DEFAULT, least=STALL_S_MIN)
        delay_ms = _number(environ, "TAPELINE_DEMO_DELAY_MS", demo.DELAY_MS_DEFAULT, least=0)
        self._demo = demo.DemoModel(delay_ms / 1000)
        # One client per provider, for all its models and requests: a pooled connection saves the first token
        # a TCP and a TLS handshake.
        self._providers: dict[str, Provider[Any]] = {}

    def check(self, name: str = "") -> None:
        """Raise ConfigError if this model (by default the default) cannot be asked. Sends nothing.

        It loads the provider's SDK, which takes a second: at start, so that no run waits for it.
        """
        self._model(name or self.default)

    def continues(self, name: str) -> bool:
        """Whether the model goes on from a prompt that ends in its own words, instead of beginning again.

        `TAPELINE_CONTINUES` says which do, as patterns (`anthropic:claude-3-*,openai:local-*`): no provider does.
        """
        patterns = [demo.NAME, *self._environ.get("TAPELINE_CONTINUES", "").split(",")]
        return any(fnmatchcase(name, pattern.strip()) for pattern in patterns)

    async def stream(self, prompt: Prompt) -> AsyncGenerator[Part, None]:
        """Ask the model; every part comes as it arrives, and exactly one Finish comes last.

        Every failure is a ProviderError. Closing the generator, or cancelling whoever reads it, closes the
        provider's connection.
        """
        name = prompt.model or self.default
        provider, _, _ = name.partition(":")
        opened, answer = False, _Answer()
        try:
            if name != demo.NAME and provider not in self._providers:
                await asyncio.to_thread(self._model, name)  # loading an SDK would stall every other stream
            async with AsyncExitStack() as connection:
                async with asyncio.timeout(self._stall_s):
                    response = await connection.enter_async_context(self._request(name, prompt))
                opened = True
                events = aiter(response)
                while (event := await self._next(response, events)) is not None:
                    for part in answer.parts(event):
                        yield part
            if refusal := answer.refusal(response):
                yield refusal
            finish = answer.finish(response)
        except ProviderError:
            raise
        except Exception as error:
            raise self._explained(provider, error, opened=opened) from error
        yield finish

    async def aclose(self) -> None:
        """Close all connections."""
        for provider in self._providers.values():
            async with provider:  # leaving it is how a provider closes the client it made
                pass
        self._providers.clear()

    def _request(self, name: str, prompt: Prompt) -> AbstractAsyncContextManager[StreamedResponse]:
        return model_request_stream(
            self._model(name),
            _messages(prompt),
            # No tries but the engine's: it knows what is visible already, and says so in the log.
            model_settings=ModelSettings(max_retries=0),
            model_request_parameters=ModelRequestParameters(
                function_tools=[
                    ToolDefinition(name=tool.name, description=tool.description, parameters_json_schema=tool.parameters)
                    for tool in prompt.tools
                ]
            ),
            instrument=False,
        )

    async def _next(
        self, response: StreamedResponse, events: AsyncIterator[ModelResponseStreamEvent]
    ) -> ModelResponseStreamEvent | None:
        try:
            async with asyncio.timeout(self._stall_s):
                return await anext(events, None)
        except (TimeoutError, ModelConnectionError):
            if response.finish_reason is None:
                raise
            return None  # the answer is complete; only the courtesies after it were lost

    def _model(self, name: str) -> Model:
        if name == demo.NAME:
            return self._demo
        prefix, _, model = name.partition(":")
        if not prefix or not model:
            raise ConfigError(f"{name!r} is not a model; use {demo.NAME} or provider:name, such as openai:gpt-5-mini")
        if prefix not in self._providers:
            self._providers.setdefault(prefix, self._provider(prefix))
        provider = self._providers[prefix]
        # To pydantic-ai `openai:` is the Responses API; to us it is what every compatible server speaks.
        kind = "openai-chat" if prefix == "openai" else prefix
        try:
            inferred = infer_model(f"{kind}:{model}", lambda _: provider)
        except (UserError, ImportError, ValueError) as error:
            raise ConfigError(_first_line(f"{name}: {error}")) from error
        if isinstance(inferred, OpenAIChatModel):
            # By default a stream that just ends counts as finished; an answer cut short would pass for whole.
            profile = OpenAIModelProfile(openai_chat_streaming_requires_finish_reason=True)
            return type(inferred)(inferred.model_name, provider=provider, profile=profile)
        return inferred

    def _provider(self, prefix: str) -> Provider[Any]:
        if prefix in ("openai", "openai-chat", "openai-responses"):
            url = self._environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
            # A server of one's own often wants no key, but the SDK insists on some.
            key = self._key("OPENAI_API_KEY", "none" if self._environ.get("OPENAI_BASE_URL") else "")
            return OpenAIProvider(base_url=url, api_key=key)
        if prefix == "anthropic":
            from pydantic_ai.providers.anthropic import AnthropicProvider  # here, for its SDK takes a second to load

            url = self._environ.get("ANTHROPIC_BASE_URL") or "https://api.anthropic.com"
            return AnthropicProvider(base_url=url, api_key=self._key("ANTHROPIC_API_KEY"))
        try:
            return infer_provider(prefix)
        except ValueError as error:
            raise ConfigError(f"{prefix!r} is no provider that pydantic-ai knows") from error
        except ImportError as error:
            raise ConfigError(_first_line(str(error))) from error
        except UserError as error:
            variable = re.search(r"`([A-Z][A-Z0-9_]+)`", str(error))
            raise ConfigError(_missing(variable[1]) if variable else _first_line(str(error))) from error

    def _key(self, variable: str, otherwise: str = "") -> str:
        key = self._environ.get(variable) or otherwise
        if not key:
            raise ConfigError(_missing(variable))
        return key

    def _explained(self, provider: str, error: Exception, *, opened: bool) -> ProviderError:
        code, retryable, says = _kind(error, opened=opened)
        silent = isinstance(error, TimeoutError)
        detail = f"nothing came for {self._stall_s:g} s" if silent else _detail(error)
        for name, value in self._environ.items():
            if name.endswith(("_KEY", "_TOKEN", "_SECRET")) and len(value) >= SECRET_CHARS_MIN:
                detail = detail.replace(value, "***")  # some servers quote the key they refuse
        message = f"{provider} {says}: {detail}"[:MESSAGE_CHARS_MAX]
        retry_after_s = error.retry_after if isinstance(error, ModelAPIError) else None
        return ProviderError(code, message, retryable=retryable, retry_after_s=retry_after_s)


# Failures


def _kind(error: Exception, *, opened: bool) -> tuple[ProviderCode, bool, str]:
    """What an error means: its code, whether the same request may succeed later, and what it says in words."""
    match error:
        case ModelAuthenticationError():
            return "provider_auth", False, "refused the credentials"
        case ModelQuotaExceededError():
            return "provider_rejected", False, "says the account's quota is used up"
        case ModelRateLimitError():
            return "provider_rate_limited", True, "limits the rate of requests"
        case ModelUnavailableError() | ModelServerError():
            return "provider_unavailable", True, "is not able to answer"
        case ModelRequestRejectedError():
            return "provider_rejected", False, "rejected the request"
        case ModelHTTPError(status_code=408 | 409 | 425):
            return "provider_unavailable", True, "is not able to answer"
        case ModelHTTPError():
            return "provider_rejected", False, "rejected the request"
        case TimeoutError() | ModelTimeoutError():
            return "provider_timeout", True, "fell silent"
        case ModelConnectionError(phase="pool" | "connect"):
            return "provider_unavailable", True, "cannot be reached"
        case ModelConnectionError() if not opened:
            return "provider_unavailable", True, "closed the connection without an answer"
        case ModelConnectionError():
            return "provider_cut", True, "broke off"
        case ModelAPIError(in_stream=True):
            return "provider_unavailable", True, "failed in the middle of the answer"
        case ModelAPIError() if error.__cause__ is None:  # the library's own finding, see _model
            return "provider_cut", True, "ended the stream without saying it was finished"
        case UnexpectedModelBehavior() if not opened:
            return "provider_cut", True, "ended the stream without saying it was finished"
        case UserError() | ConfigError():
            return "provider_rejected", False, "cannot be asked"
    return "provider_malformed", True, "sent what cannot be read as an answer"


def _detail(error: Exception) -> str:
    """The provider's own words, without the library's wrapping."""
    if isinstance(error, ModelHTTPError):
        body = error.body
        if isinstance(body, dict):
            body = body.get("error", body)
        if isinstance(body, dict):
            body = body.get("message", body)
        return f"{body or 'no further word'} (status {error.status_code})"
    if isinstance(error, ModelConnectionError):
        cause: BaseException = error
        while cause.__cause__ is not None:  # the SDK says only "Connection error."
            cause = cause.__cause__
        return str(cause) or type(cause).__name__
    if isinstance(error, ModelAPIError | UnexpectedModelBehavior):
        return error.message
    return str(error) or type(error).__name__


def _missing(variable: str) -> str:
    return f"{variable} is not set; export it or set TAPELINE_MODEL={demo.NAME}"


def _first_line(text: str) -> str:
    return " ".join(text.split())[:MESSAGE_CHARS_MAX]


def _number(environ: Mapping[str, str], variable: str, default: float, *, least: float) -> float:
    text = environ.get(variable, "").strip()
    if not text:
        return default
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not least <= number < math.inf:
        raise ConfigError(f"{variable} is {text!r}; it must be a number, {least:g} or more")
    return number


# What is sent


def _messages(prompt: Prompt) -> list[ModelMessage]:
    """The turns as every provider accepts them.

    The results of an answer's calls follow it at once, whatever came between, and a call without one gets a
    result that says so. Reasoning is not sent back: Anthropic takes its own only with the signature, which is not
    kept, and adaptive thinking, all that its models do unasked, does without.
    """
    results = {turn.call: turn for turn in prompt.turns if isinstance(turn, ResultTurn)}
    messages: list[ModelMessage] = []
    request: list[ModelRequestPart] = [SystemPromptPart(prompt.system)] if prompt.system else []
    for turn in prompt.turns:
        if isinstance(turn, UserTurn):
            request.append(UserPromptPart(turn.content))
        elif isinstance(turn, AnswerTurn) and (turn.text or turn.calls):
            if request:
                messages.append(ModelRequest(request))
            response: list[ModelResponsePart] = [TextPart(turn.text)] if turn.text else []
            response += [
                ToolCallPart(_tool_name(call.tool), _sent_arguments(call.arguments), call.id) for call in turn.calls
            ]
            messages.append(ModelResponse(response))
            request = [_result(call, results.get(call.id)) for call in turn.calls]
    if request:
        messages.append(ModelRequest(request))
    return messages


def _result(call: Call, result: ResultTurn | None) -> ToolReturnPart:
    if result is None:
        content = "This call has no result: the run ended first."
        return ToolReturnPart(_tool_name(call.tool), content, call.id, outcome="interrupted")
    outcome: Literal["failed", "success"] = "failed" if result.is_error else "success"
    return ToolReturnPart(_tool_name(call.tool), result.content, call.id, outcome=outcome)


def _tool_name(name: str) -> str:
    """What the model called a tool, in the letters providers take; it may have made the name up."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[:TOOL_NAME_CHARS_MAX] or "_"


def _sent_arguments(arguments: dict[str, Any] | str) -> dict[str, Any]:
    """An object, as providers insist, also where the model wrote none."""
    return {"not_a_json_object": arguments} if isinstance(arguments, str) else arguments


# What is received


class _Answer:
    """One answer being received: turns the library's events into parts."""

    def __init__(self) -> None:
        self._calls: dict[int, CallInput] = {}  # by part index: how the call began
        self._halves: dict[int, str] = {}  # by part index: the first half of a character

    def parts(self, event: ModelResponseStreamEvent) -> Iterator[Part]:
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
        text = json.dumps(arguments) if isinstance(arguments, Mapping) else arguments or ""
        return CallInput(began.index, began.id, began.tool, self._whole(index, text))

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


def _read_arguments(arguments: str | Mapping[str, Any] | None) -> dict[str, Any] | str:
    if isinstance(arguments, Mapping):
        return dict(arguments)
    text = _mended(arguments or "")
    if not text.strip():
        return {}
    try:
        read = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return text
    return read if isinstance(read, dict) else text


def _mended(text: str) -> str:
    """The text with both halves of a character joined, and a half without its other replaced."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
