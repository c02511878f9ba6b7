"""Model providers, as one stream of parts and one kind of error.

Owns, with `received`, everything that knows pydantic-ai, and what it and the SDKs below it do by surprise: the clients
and their connections, and the translation of a prompt and of how a provider fails. Never retries and keeps nothing of
an answer: that is the engine's.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any, Final, Literal

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
    SystemPromptPart,
    TextPart,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)
from pydantic_ai.models import Model, ModelRequestParameters, StreamedResponse, infer_model
from pydantic_ai.providers import Provider, infer_provider
from pydantic_ai.settings import ModelSettings
from pydantic_ai.tools import ToolDefinition
from tapeline.settings import ConfigError

from . import demo
from .part import Part, ProviderCode, ProviderError
from .prompt import AnswerTurn, Call, Prompt, ResultTurn, UserTurn
from .received import Answer

MESSAGE_CHARS_MAX: Final = 500  # of a provider's own words in an error
TOOL_NAME_CHARS_MAX: Final = 64  # what every provider accepts
SECRET_CHARS_MIN: Final = 8  # a shorter value would blot out ordinary words


class Providers:
    """Every provider this deployment can ask, and the connections to them."""

    def __init__(self, environ: Mapping[str, str], stall_s: float) -> None:
        """`environ` has their keys and addresses; a silence longer than `stall_s`, in seconds, is a failure."""
        self._environ = environ
        self._stall_s = stall_s
        # One client per provider, for all its models and requests: a pooled connection saves the first token
        # a TCP and a TLS handshake.
        self._providers: dict[str, Provider[Any]] = {}

    def check(self, name: str) -> None:
        """Raise ConfigError if this model (`provider:name`) cannot be asked. Loads the provider's SDK."""
        self._model(name)

    async def stream(self, name: str, prompt: Prompt) -> AsyncGenerator[Part, None]:
        """Ask this model; as `Models.stream`."""
        provider, _, _ = name.partition(":")
        opened, answer = False, Answer()
        try:
            if provider not in self._providers:
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
        from pydantic_ai.models.openai import OpenAIChatModel
        from pydantic_ai.profiles.openai import OpenAIModelProfile

        if isinstance(inferred, OpenAIChatModel):
            # By default a stream that just ends counts as finished; an answer cut short would pass for whole.
            profile = OpenAIModelProfile(openai_chat_streaming_requires_finish_reason=True)
            return type(inferred)(inferred.model_name, provider=provider, profile=profile)
        return inferred

    def _provider(self, prefix: str) -> Provider[Any]:
        # An SDK takes up to a second to load: only those are that are asked for.
        if prefix in ("openai", "openai-chat", "openai-responses"):
            from pydantic_ai.providers.openai import OpenAIProvider

            url = self._environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
            # A server of one's own often wants no key, but the SDK insists on some.
            key = self._key("OPENAI_API_KEY", "none" if self._environ.get("OPENAI_BASE_URL") else "")
            return OpenAIProvider(base_url=url, api_key=key)
        if prefix == "anthropic":
            from pydantic_ai.providers.anthropic import AnthropicProvider

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
