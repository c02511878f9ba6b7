"""Arguments that only pydantic can make: its models and fields in type hints, where the tool's author uses it.

It is never imported here: a hint can hold something of pydantic's only after somebody else has imported it.
"""

import sys
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Final

import msgspec

from .context import ToolError

_PROBLEMS_MAX: Final = 3  # told of one argument
_KEY_CHARS_MAX: Final = 60  # of the model's own keys, where a problem names the place
_META: Final = (
    *("gt", "ge", "lt", "le", "multiple_of", "pattern", "min_length", "max_length"),
    *("title", "description", "examples"),
)
_RECORD: Final = ("__dataclass_fields__", "__total__", "_fields", "__struct_fields__")  # of what has typed fields


class Mismatch(ValueError):
    """A value is not what the hint asks for. The message says what is, and where; the cause is what a validator of the
    author's has raised.
    """


class Model:
    """An argument that pydantic makes. Raises `TypeError` where JSON cannot carry it."""

    def __init__(self, pydantic: Any, name: str, hint: Any) -> None:
        self._pydantic = pydantic
        self.name = name
        hint = _translated(pydantic, hint)
        self._is_described = any(getattr(about, "description", None) for about in typing.get_args(hint)[1:])
        if any(isinstance(part, msgspec.Meta) for part in _parts(hint)):
            raise TypeError(f"argument {name}: inside a hint for pydantic, describe and bound with pydantic's Field")
        try:
            self._adapter = pydantic.TypeAdapter(hint)
            self._adapter.json_schema()
        except (pydantic.PydanticUserError, NameError) as error:
            reason = str(error).splitlines()[0]
            raise TypeError(f"argument {name}: {hint!r} cannot be given as JSON: {reason}") from error

    def schema(self, definitions: dict[str, Any], description: str) -> dict[str, Any]:
        """Its JSON Schema. What that refers to is added to `definitions`, under names that are free there.

        `description` is the argument's own, unless the hint has one: it goes before the class's.
        """
        prefix = ""
        while True:
            schema: dict[str, Any] = self._adapter.json_schema(ref_template=f"#/$defs/{prefix}{{model}}")
            own = {f"{prefix}{name}": part for name, part in schema.pop("$defs", {}).items()}
            if all(definitions.get(name, part) == part for name, part in own.items()):
                definitions |= own
                return schema | ({"description": description} if description and not self._is_described else {})
            prefix = f"{self.name}_{prefix}"

    def convert(self, value: Any) -> Any:
        """The value as the hint has it, strictly. Raises `Mismatch`."""
        try:
            return self._adapter.validate_json(msgspec.json.encode(value), strict=True)
        except self._pydantic.ValidationError as error:
            problems = error.errors(include_url=False, include_input=False)
            causes = [_raised(problem) for problem in problems]
            told = [
                f"{refusal(cause) if cause else problem['msg']} - at `{self._place(problem['loc'])}`"
                for problem, cause in zip(problems[:_PROBLEMS_MAX], causes, strict=False)
            ]
            if len(problems) > _PROBLEMS_MAX:
                told.append(f"and {len(problems) - _PROBLEMS_MAX} more")
            raise Mismatch("; ".join(told)) from next(filter(None, causes), None)

    def as_json(self, default: Any) -> Any:
        """A default value for the schema. Raises `TypeError` or `ValueError` where it is not JSON."""
        return self._adapter.dump_python(default, mode="json", warnings="error")

    def _place(self, path: tuple[int | str, ...]) -> str:
        keys = (f"[{key}]" if isinstance(key, int) else f".{key[:_KEY_CHARS_MAX]}" for key in path)
        return f"$.{self.name}{''.join(keys)}"


def refusal(raised: BaseException) -> str:
    """What the model is told of what a validator of the author's has raised. Raises it where it is a `ToolError`."""
    if isinstance(raised, ToolError):
        raise raised
    return f"refused with {type(raised).__name__}"


def model(name: str, hint: Any, default: Any) -> Model | None:
    """How pydantic makes the argument; None where there is nothing of pydantic's in its hint. Raises `TypeError`."""
    pydantic: Any = sys.modules.get("pydantic")
    if pydantic is None or not hasattr(pydantic, "TypeAdapter"):
        return None
    field = type(pydantic.Field())
    if isinstance(default, field):
        raise TypeError(f"argument {name}: pydantic's Field belongs into the hint, as in Annotated[int, Field(ge=1)]")
    return Model(pydantic, name, hint) if any(_is_pydantic(part, field) for part in _parts(hint)) else None


def dumped(value: Any) -> Any:
    """A pydantic model as plain JSON types. Raises `TypeError` for anything else."""
    if callable(dump := getattr(value, "model_dump", None)):
        return dump(mode="json")
    raise TypeError(f"{type(value).__name__} is not JSON")


def _raised(problem: Any) -> BaseException | None:
    """What a validator of the author's has raised, if that is the problem."""
    raised = problem.get("ctx", {}).get("error")
    return raised if isinstance(raised, BaseException) else None


def _is_pydantic(part: Any, field: type) -> bool:
    return (
        isinstance(part, field)
        or hasattr(part, "__get_pydantic_core_schema__")
        or hasattr(part, "__pydantic_fields__")  # a pydantic dataclass
    )


def _parts(hint: Any) -> Iterator[Any]:
    """The hint and all that it is made of. Raises `NameError` for what cannot be resolved."""
    seen: dict[int, Any] = {}
    waiting = [hint]
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen[id(part)] = part
        yield part
        waiting += (typing.get_origin(part), *typing.get_args(part), getattr(part, "__value__", None))
        if isinstance(part, type) and any(hasattr(part, mark) for mark in _RECORD):
            waiting += typing.get_type_hints(part, include_extras=True).values()


def _translated(pydantic: Any, hint: Any) -> Any:
    """The hint with its own `msgspec.Meta` as pydantic's Field."""
    if typing.get_origin(hint) is not Annotated:
        return hint
    inner, *about = typing.get_args(hint)
    translated = (
        pydantic.Field(**{key: said for key in _META if (said := getattr(meta, key)) is not None})
        if isinstance(meta, msgspec.Meta)
        else meta
        for meta in about
    )
    return Annotated[inner, *translated]
