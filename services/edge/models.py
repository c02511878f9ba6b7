"""Which models a user may choose: what is listed, and what a conversation or a message may name."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tapeline import limits
from tapeline.settings import ConfigError, Settings

from . import answer, body
from .problem import Problem

MODEL: Final = "TAPELINE_MODEL"
MODELS: Final = "TAPELINE_MODELS"

_DEMO: Final = "demo"
"""The scripted model, and the one where no other is set."""


@dataclass(frozen=True)
class Models:
    """The deployment's default, and the only ones that are allowed; none: any are."""

    default: str
    allowed: Sequence[str] = ()

    @classmethod
    def configured(cls, settings: Settings) -> "Models":
        """From `TAPELINE_MODEL` and `TAPELINE_MODELS`. Raises `ConfigError`."""
        default = settings.text(MODEL, _DEMO)
        allowed = tuple(dict.fromkeys(settings.several(MODELS)))
        for model in allowed:
            if len(model) > limits.MODEL_CHARS_MAX or not re.match(body.MODEL, model):
                raise ConfigError(f"{MODELS} has {model!r}; name them as in demo,openai:gpt-5-mini")
        if allowed and default not in allowed:
            raise ConfigError(
                f"{MODELS} does not have {default}, which is what answers where nobody chooses; add it, or set {MODEL}"
            )
        return cls(default, allowed)

    def check(self, name: str) -> None:
        """Raises `Problem` 422 unless users may choose this model; empty is the default."""
        if name and self.allowed and name not in self.allowed:
            raise Problem(422, "unknown_model", f"This is not a model to choose; there are: {', '.join(self.allowed)}.")

    def listed(self) -> answer.Models:
        """What to choose from."""
        return answer.Models(
            [answer.Model(one, one == self.default, one == _DEMO) for one in self.allowed or (self.default,)]
        )
