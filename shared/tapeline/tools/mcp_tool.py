"""What an MCP server lists, as tools of ours, and what it answers, as their results. Pure: it calls nobody.

Needs `tapeline[mcp]`.
"""

import hashlib
import logging
import re
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

import jsonschema
import jsonschema.exceptions
import jsonschema.validators
import mcp_types
import msgspec
import referencing
import referencing.exceptions

from tapeline import limits, subjects

from .context import Context
from .definition import AnyTool, Tool
from .schema import Given, Invalid
from .servers import ServerConfig

log = logging.getLogger(__name__)

_NAME_CHARS: Final = 64
_NOT_OF_A_NAME: Final = re.compile(r"[^A-Za-z0-9_-]")


def tools(
    server: str,
    config: ServerConfig,
    listed: list[mcp_types.Tool],
    call: Callable[[str, dict[str, Any], Context], Awaitable[Any]],
) -> list[AnyTool]:
    """What a server lists as tools of ours, which run by `call`. The log says which of them cannot be, and why."""
    made: dict[str, AnyTool] = {}
    if len(listed) > limits.MCP_LISTED_MAX:
        log.warning("MCP server %s lists more than %d tools; the rest is not looked at", server, limits.MCP_LISTED_MAX)
    known = {one.name for one in listed}
    for named in (config.tools, config.needs_approval, config.idempotent):
        if isinstance(named, list) and (strangers := sorted(set(named) - known)):
            log.warning("MCP server %s has no tools %s, which its configuration names", server, ", ".join(strangers))
    wanted = [one for one in listed if config.tools is None or one.name in config.tools]
    for count, one in enumerate(wanted):
        try:
            if count >= limits.MCP_TOOLS_MAX:
                raise _CannotBe(f"a server has {limits.MCP_TOOLS_MAX} at most; choose them by `tools`")
            tool = _tool(config, one, call)
            if tool.name in made:
                raise _CannotBe(f"another has become {tool.name} too")
        except _CannotBe as reason:
            log.warning("MCP server %s: tool %r is left out: %s", server, one.name, reason)
        else:
            made[tool.name] = tool
    return list(made.values())


class _CannotBe(Exception):
    """What a server lists cannot be a tool of ours. The message says why."""


def _tool(
    config: ServerConfig, one: mcp_types.Tool, call: Callable[[str, dict[str, Any], Context], Awaitable[Any]]
) -> AnyTool:
    if not one.name:
        raise _CannotBe("it has no name")
    if one.execution and one.execution.task_support == "required":
        raise _CannotBe("it runs only as a task, which is not supported")
    if one.input_schema.get("type") != "object":
        raise _CannotBe("its arguments are no object")
    if len(msgspec.json.encode((one.description, one.input_schema))) > limits.MCP_TOOL_BYTES_MAX:
        raise _CannotBe(f"its description and schema are more than {limits.MCP_TOOL_BYTES_MAX} bytes")

    async def function(arguments: dict[str, Any], context: Context) -> Any:
        return await call(one.name, arguments, context)

    hints = one.annotations or mcp_types.ToolAnnotations()
    idempotent = bool(hints.read_only_hint or hints.idempotent_hint)
    return Tool(
        function,
        name=tool_name(config.prefix or "", one.name),
        timeout_s=config.timeout_s,
        idempotent=_is_among(config.idempotent, one.name, idempotent),
        needs_approval=_is_among(config.needs_approval, one.name, False),
        max_concurrency=config.max_concurrency,
        arguments=Given(one.input_schema, one.description or one.title or "", _check(one.input_schema)),
    )


def _is_among(named: bool | list[str] | None, name: str, default: bool) -> bool:
    if named is None:
        return default
    return name in named if isinstance(named, list) else named


def tool_name(prefix: str, name: str) -> str:
    """A name that subjects and every provider take: other characters become `_`, a long one ends in a hash."""
    whole = _NOT_OF_A_NAME.sub("_", f"{prefix}{name}")
    if subjects.is_tool(whole):
        return whole
    return f"{whole[: _NAME_CHARS - 9]}_{hashlib.sha256(f'{prefix}{name}'.encode()).hexdigest()[:8]}"


def _check(schema: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """Holds arguments to a JSON Schema, and raises `Invalid`; what a regular expression says is left to the server.

    The expressions are ECMA's, which Python has not, and one may take for ever, all of Python with it. Fetches no
    reference.
    """
    kind = jsonschema.validators.validator_for(schema)
    try:
        kind.check_schema(schema, format_checker=jsonschema.FormatChecker(()))  # type: ignore[call-arg] # it does take it
    except jsonschema.exceptions.SchemaError as error:
        raise _CannotBe(f"its schema is none: {error.message}") from error
    lenient = jsonschema.validators.extend(  # type: ignore[no-untyped-call]
        kind,
        dict.fromkeys(("pattern", "patternProperties", "unevaluatedProperties"), _no_error)
        | {"additionalProperties": _additional(kind.VALIDATORS["additionalProperties"])},
    )
    # Where a reference leads to the root, its $schema would bring the strict kind back.
    validator = lenient(
        {key: value for key, value in schema.items() if key != "$schema"}, registry=referencing.Registry()
    )

    def check(arguments: dict[str, Any]) -> None:
        try:
            error = jsonschema.exceptions.best_match(validator.iter_errors(arguments))
        except referencing.exceptions.Unresolvable as unresolvable:
            raise Invalid(f"the tool's schema cannot be resolved: {unresolvable}") from unresolvable
        except RecursionError as recursion:
            raise Invalid("invalid arguments: nested too deeply") from recursion
        if error is not None:
            raise Invalid(f"invalid arguments: {error.message} - at `{error.json_path}`")

    return check


Keyword = Callable[[Any, Any, Any, dict[str, Any]], Iterable[jsonschema.exceptions.ValidationError] | None]
"""Checks one keyword of a schema, given the validator, the keyword's value, the instance and the schema."""


def _no_error(*_: Any) -> None:
    """Of a keyword that is not checked."""


def _additional(strict: Keyword) -> Keyword:
    """The check of `additionalProperties`, which are those that no pattern of `patternProperties` names either."""
    return lambda validator, value, instance, schema: (
        None if "patternProperties" in schema else strict(validator, value, instance, schema)
    )


def content(answer: mcp_types.CallToolResult) -> Any:
    """A call's result as the model shall see it: structured, or text, or else the blocks as they are."""
    if answer.structured_content is not None:
        return answer.structured_content
    if all(isinstance(block, mcp_types.TextContent) for block in answer.content):
        return text(answer)
    return [block.model_dump(mode="json", by_alias=True, exclude_none=True) for block in answer.content]


def text(answer: mcp_types.CallToolResult) -> str:
    """The text of an answer, which is all there is to an error."""
    return "\n".join(block.text for block in answer.content if isinstance(block, mcp_types.TextContent))
