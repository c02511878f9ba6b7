"""Models: `demo`, and what providers have, behind one stream of parts.

Owns who is asked. Knows no provider: `provider` does, and is loaded when the first model is asked for that needs one,
for pydantic-ai and the SDKs take a second and 100 MB.
"""

import asyncio
import math
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from fnmatch import fnmatchcase
from importlib import import_module
from typing import TYPE_CHECKING, Final

from tapeline.settings import ConfigError

from . import demo
from .part import Part
from .prompt import Prompt

if TYPE_CHECKING:
    from .provider import Providers

STALL_S_DEFAULT: Final = 120.0  # silence before the first chunk or between two; hidden reasoning is silence
STALL_S_MIN: Final = 0.01


class Models:
    """Every model this deployment can ask: `demo`, or `provider:name`."""

    def __init__(self, default: str, environ: Mapping[str, str]) -> None:
        """Read the settings; raises ConfigError where one makes no sense. Nothing is opened yet."""
        self.default = default
        self._environ = environ
        self._stall_s = _number(environ, "TAPELINE_PROVIDER_STALL_S", STALL_S_DEFAULT, least=STALL_S_MIN)
        self._demo_delay_s = _number(environ, "TAPELINE_DEMO_DELAY_MS", demo.DELAY_MS_DEFAULT, least=0) / 1000
        self._providers: Providers | None = None

    def check(self, name: str = "") -> None:
        """Raise ConfigError if this model (by default the default) cannot be asked. Sends nothing.

        It loads what a provider needs, which takes seconds: at start, so that no run waits for it.
        """
        name = name or self.default
        if name != demo.NAME:
            self._provided().check(name)

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
        if name == demo.NAME:
            answer = demo.stream(prompt, self._demo_delay_s)
        else:
            if self._providers is None:
                await asyncio.to_thread(import_module, ".provider", __package__)  # here it would stall every stream
            answer = self._provided().stream(name, prompt)
        async with aclosing(answer) as parts:
            async for part in parts:
                yield part

    async def aclose(self) -> None:
        """Close all connections."""
        if self._providers is not None:
            await self._providers.aclose()

    def _provided(self) -> "Providers":
        if self._providers is None:
            from .provider import Providers

            self._providers = Providers(self._environ, self._stall_s)
        return self._providers


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
