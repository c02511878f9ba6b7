"""Type hints as the contract of a tool: its arguments' JSON Schema, and their conversion, strictly by the hints.

Both come from one msgspec Struct made of the function's parameters, in which the arguments that are pydantic's may be
anything: see `models`. It never calls the function.
"""

import inspect
import re
import typing
from collections.abc import Callable
from typing import Any

import msgspec

from .context import Context
from .models import Mismatch, Model, model, refusal

_SECTION = re.compile(r"(Args|Arguments|Parameters|Returns|Yields|Raises|Examples?|Notes?|Warnings?):\s*$")
_ARGUMENT = re.compile(r"\*{0,2}(\w+)\s*(?:\([^)]*\))?:\s*(.*)$")

_PLACE = re.compile(r" - at `[^`]*`$")


class Invalid(ValueError):
    """These arguments are not what the hints ask for. The message is for the model; the cause, if there is one, is for
    the log.
    """


class Arguments:
    """The arguments of one function. Raises `TypeError` for a function that cannot be a tool."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.description, described = _docstring(function)
        self.context_name: str | None = None
        hints = typing.get_type_hints(function, include_extras=True)
        fields: list[tuple[str, Any] | tuple[str, Any, Any]] = []
        defaults: dict[str, Any] = {}
        self._models: dict[str, Model] = {}
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise TypeError(f"argument {parameter}: the model gives arguments by name, one by one")
            if name not in hints:
                raise TypeError(f"argument {name} has no type hint")
            if hints[name] is Context:
                if self.context_name:
                    raise TypeError(f"argument {name}: there is a Context already")
                self.context_name = name
                continue
            if made := model(name, hints[name], parameter.default):
                self._models[name] = made
                hints[name] = Any
            else:
                _check(name, hints[name])
            if parameter.default is parameter.empty:
                fields.append((name, hints[name]))
            else:  # left out when not given, so that the function's own default applies
                fields.append((name, hints[name] | msgspec.UnsetType, msgspec.UNSET))
                defaults[name] = parameter.default
        self._struct = msgspec.defstruct("Arguments", fields, kw_only=True, forbid_unknown_fields=True)
        self.schema = _schema(self._struct, self._models, described, defaults)

    def convert(self, arguments: Any) -> dict[str, Any]:
        """The values to call the function with, the context apart. Raises `Invalid`."""
        if not isinstance(arguments, dict):
            raise Invalid("the arguments are not a JSON object")
        try:
            values = msgspec.convert(arguments, self._struct)
            given = {
                name: self._models[name].convert(value) if name in self._models else value
                for name in self._struct.__struct_fields__
                if (value := getattr(values, name)) is not msgspec.UNSET
            }
        except msgspec.ValidationError as error:
            if (cause := error.__cause__) is None:
                raise Invalid(f"invalid arguments: {error}") from None
            place = _PLACE.search(str(error))  # what is before it is the author's
            raise Invalid(f"invalid arguments: {refusal(cause)}{place[0] if place else ''}") from cause
        except Mismatch as error:
            raise Invalid(f"invalid arguments: {error}") from error.__cause__
        except RecursionError:
            raise Invalid("invalid arguments: nested too deeply") from None
        return given


class Given:
    """Arguments by a JSON Schema that somebody else wrote. The function gets them as they are, in one dictionary
    called `arguments`, and the `context`. `check` raises `Invalid`.
    """

    context_name: str | None = "context"

    def __init__(self, schema: dict[str, Any], description: str, check: Callable[[dict[str, Any]], None]) -> None:
        self.schema = schema
        self.description = description
        self.check = check

    def convert(self, arguments: Any) -> dict[str, Any]:
        """The values to call the function with, the context apart. Raises `Invalid`."""
        if not isinstance(arguments, dict):
            raise Invalid("the arguments are not a JSON object")
        self.check(arguments)
        return {"arguments": arguments}


def _check(name: str, hint: Any) -> None:
    """Raises `TypeError` where JSON cannot carry the hint, now rather than at the first call."""
    try:
        msgspec.json.schema(hint)
        msgspec.json.Decoder(hint)
    except (TypeError, ValueError) as error:
        reason = str(error).splitlines()[-1]
        raise TypeError(f"argument {name}: {hint!r} cannot be given as JSON: {reason}") from error


def _schema(
    struct: type[msgspec.Struct], models: dict[str, Model], described: dict[str, str], defaults: dict[str, Any]
) -> dict[str, Any]:
    """The JSON Schema in one piece: providers want an object at the top, not a reference."""
    (top,), components = msgspec.json.schema_components([struct], ref_template="#/$defs/{name}")
    schema: dict[str, Any] = components.pop(top["$ref"].rpartition("/")[2])
    del schema["title"]
    for definition in components.values():
        if "description" in definition:  # a class's docstring, as it is written
            definition["description"] = inspect.cleandoc(definition["description"])
    for name, property_schema in schema["properties"].items():
        if name in models:
            property_schema |= models[name].schema(components, described.get(name, ""))
        if name in described:
            property_schema.setdefault("description", described[name])
        if name in defaults:
            as_json = models[name].as_json if name in models else msgspec.to_builtins
            try:
                property_schema["default"] = as_json(defaults[name])
            except (TypeError, ValueError):
                continue  # a default that is not JSON is the function's own business
    if components:
        schema["$defs"] = components
    return schema


def _docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """The description, and that of each argument, from a docstring in Google style."""
    description: list[str] = []
    arguments: dict[str, str] = {}
    section = current = ""
    indent = 0
    for line in (inspect.getdoc(function) or "").splitlines():
        words = line.strip()
        if header := _SECTION.match(line):
            section, current = header[1], ""
        elif not section:
            description.append(line)
        elif line and not line[0].isspace():  # prose again
            section = ""
            description.append(line)
        elif section in ("Args", "Arguments", "Parameters") and words:
            depth = len(line) - len(line.lstrip())
            entry = _ARGUMENT.match(words)
            if entry and (not current or depth <= indent):
                current, indent = entry[1], depth
                arguments[current] = entry[2]
            elif current:
                arguments[current] = f"{arguments[current]} {words}".strip()
    return "\n".join(description).strip(), arguments
