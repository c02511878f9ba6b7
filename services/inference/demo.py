"""The `demo` model: a script that shows what a run can look like, for people without a key and for tests.

Owns the script. It is pydantic-ai's `FunctionModel`, so it takes the same way through `provider` as a real
model. Never calls a tool that was not offered, and never passes for an AI: every run's first text says so.
"""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from pydantic_ai import RunContext
from pydantic_ai.messages import ModelMessage, ModelRequest, ModelResponse, ToolReturnPart, UserPromptPart
from pydantic_ai.models import ModelRequestParameters, StreamedResponse
from pydantic_ai.models.function import AgentInfo, DeltaThinkingPart, DeltaToolCall, FunctionModel
from pydantic_ai.settings import ModelSettings
from pydantic_ai.tools import ToolDefinition

NAME: Final = "demo"
LABEL: Final = "**Scripted demo model, not an AI.** "

DELAY_MS_DEFAULT: Final = 20.0  # between two chunks: 50 chunks/s
FIRST_CHUNK_DELAYS: Final = 7.5  # the wait before the first chunk, in delays: 150 ms by default
LONG_WORDS_MAX: Final = 100_000
QUOTE_CHARS_MAX: Final = 80
RESULT_CHARS_MAX: Final = 200
CALLS_MAX: Final = 3  # calls the script asks for at once
FRAGMENT_CHARS: Final = 8  # of a call's arguments in one chunk

_Chunk = str | dict[int, DeltaThinkingPart] | dict[int, DeltaToolCall]
_Call = tuple[str, dict[str, Any]]


class DemoModel(FunctionModel):
    """The script as a model. It works without a key and without a network."""

    def __init__(self, delay_s: float) -> None:
        async def script(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[_Chunk]:
            await asyncio.sleep(delay_s * FIRST_CHUNK_DELAYS)
            scene = _Scene.read(messages, info)
            for chunk in _continued(_chunks(scene), scene.begun):
                yield chunk
                await asyncio.sleep(delay_s)

        super().__init__(stream_function=script, model_name=NAME)

    @asynccontextmanager
    async def request_stream(
        self,
        messages: list[ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
        run_context: RunContext[Any] | None = None,
    ) -> AsyncGenerator[StreamedResponse]:
        """Stream the script's answer. It counts as finished: a function's stream is not cut, it raises."""
        request = super().request_stream(messages, model_settings, model_request_parameters, run_context)
        async with request as response:
            response.finish_reason = "stop"
            yield response


@dataclass(frozen=True)
class _Scene:
    """What the script reacts to."""

    said: str
    before: list[str]
    """What the user said earlier in the conversation."""
    step: int
    results: list[ToolReturnPart]
    """All results of this run."""
    tools: dict[str, ToolDefinition]
    begun: str
    """What it has said of this answer already."""

    @classmethod
    def read(cls, messages: list[ModelMessage], info: AgentInfo) -> "_Scene":
        said: list[str] = []
        step = 0
        results: list[ToolReturnPart] = []
        for message in messages:
            if isinstance(message, ModelResponse):
                step += 1
            elif isinstance(message, ModelRequest):
                for part in message.parts:
                    if isinstance(part, UserPromptPart):
                        said.append(str(part.content))
                        step, results = 0, []
                    elif isinstance(part, ToolReturnPart):
                        results.append(part)
        *before, last = said or [""]
        begun = ""
        if isinstance(newest := messages[-1], ModelResponse):
            begun, step = newest.text or "", step - 1
        return cls(last, before, step, results, {tool.name: tool for tool in info.function_tools}, begun)


def _chunks(scene: _Scene) -> Iterator[_Chunk]:
    """One answer, in the order of a reasoning model: thinking, text, calls."""
    plan = _plan(scene)
    calls = plan[scene.step] if scene.step < len(plan) else []
    if scene.step == 0:
        for word in _words(_thought(scene, calls)):
            yield {0: DeltaThinkingPart(content=word)}
    if calls:
        yield from _words(_introduction(scene, calls))
    else:
        yield from _words(_answer(scene))
    for index, (tool, arguments) in enumerate(calls, start=1):
        yield {index: DeltaToolCall(name=tool, tool_call_id=f"demo-{scene.step}-{index}")}
        text = json.dumps(arguments)
        for start in range(0, len(text), FRAGMENT_CHARS):
            yield {index: DeltaToolCall(json_args=text[start : start + FRAGMENT_CHARS])}


def _continued(chunks: Iterator[_Chunk], begun: str) -> Iterator[_Chunk]:
    """The answer without what was said of it before: the thinking, and the text as far as it had come."""
    left = len(begun)
    for chunk in chunks:
        if left and isinstance(chunk, str):
            left, chunk = max(0, left - len(chunk)), chunk[left:]
        if chunk and not (begun and isinstance(chunk, dict) and 0 in chunk):
            yield chunk


def _words(text: str) -> Iterator[str]:
    return (match[0] for match in re.finditer(r"\s*\S+(?:\s+$)?", text))


# Which tools a message asks for

_HINTS: Final = {
    "clock": {"time", "date"},
    "calculate": {"math", "sum"},
    "search_notes": {"weather"},
}


def _plan(scene: _Scene) -> list[list[_Call]]:
    """The calls of each step, as far as the tools are offered."""
    said = scene.said.lower()
    clock: _Call = ("clock", {"timezone": "UTC"})
    calculate: _Call = ("calculate", {"expression": _expression(scene.said)})
    search: _Call = ("search_notes", {"query": _quote(scene.said)})
    if _long(scene.said):
        plan: list[list[_Call]] = []
    elif "parallel" in said:
        plan = [[clock, calculate, search]]
    elif "fail" in said:
        plan = [[("fail", {"message": "the demo asked for this failure"})]]
    elif "steps" in said:
        plan = [[clock], [calculate]]
    elif named := _named(scene):
        plan = [named]
    else:
        plan = [[clock, calculate]]
    offered = [[call for call in step if call[0] in scene.tools] for step in plan]
    return [step for step in offered if step]


def _named(scene: _Scene) -> list[_Call]:
    """Calls of the tools a message names or hints at; of any that are offered if it only speaks of tools."""
    words = set(re.findall(r"[a-z]+", scene.said.lower()))
    named = [name for name in scene.tools if words & (_name_words(name) | _HINTS.get(name, set()))]
    if not named and words & {"tool", "tools"}:
        named = [name for name in scene.tools if name != "fail"]
    return [(name, _arguments(scene, name)) for name in named[:CALLS_MAX]]


def _name_words(tool: str) -> set[str]:
    return {word for word in re.split(r"[^a-z]+", tool.lower()) if len(word) > 3}  # not the `get` of get_weather


def _arguments(scene: _Scene, tool: str) -> dict[str, Any]:
    if tool == "calculate":
        return {"expression": _expression(scene.said)}
    schema = scene.tools[tool].parameters_json_schema
    properties = schema.get("properties", {})
    return {name: _sample(properties.get(name, {}), scene.said) for name in schema.get("required", [])}


def _sample(schema: dict[str, Any], said: str) -> Any:
    """Some value the schema allows: the script understands no argument, it only fills it in."""
    for key in ("const", "default"):
        if key in schema:
            return schema[key]
    for key in ("enum", "examples"):
        if schema.get(key):
            return schema[key][0]
    for option in schema.get("anyOf", []):
        return _sample(option, said)
    number = schema.get("minimum", 1)
    return {"string": _quote(said), "integer": number, "number": number, "boolean": True, "array": []}.get(
        schema.get("type", "object"), {}
    )


# What it says


def _thought(scene: _Scene, calls: list[_Call]) -> str:
    plan = f"I will call {_list(calls)}." if calls else "I need no tool for this; I will just answer."
    return f"The user wrote “{_quote(scene.said)}”. I am a script, so I look for keywords in it. {plan}"


def _introduction(scene: _Scene, calls: list[_Call]) -> str:
    if scene.step:
        return f"One result is here. Next I call {_list(calls)}."
    return f"{LABEL}You said “{_quote(scene.said)}”. First I call {_list(calls)}."


def _answer(scene: _Scene) -> str:
    label = "" if scene.step else f"{LABEL}You said “{_quote(scene.said)}”. "
    if words := _long(scene.said):
        return label + " ".join(f"word{number}" for number in range(1, words + 1))
    if any(result.outcome == "failed" for result in scene.results):
        return f"{label}Not everything worked. {_told(scene)}\n\nA model learns of an error as its call's result."
    return "\n\n".join(filter(None, (label + _told(scene), _remembered(scene), _SHOWCASE)))


def _told(scene: _Scene) -> str:
    if not scene.tools:
        return "No tools are offered in this conversation, so I call none."
    if not scene.results:
        return "I called no tool for this."
    lines = [
        f"- `{result.tool_name}` {'failed' if result.outcome == 'failed' else 'answered'}: "
        f"{_clip(str(result.content), RESULT_CHARS_MAX)}"
        for result in scene.results
    ]
    return "The results:\n\n" + "\n".join(lines)


def _remembered(scene: _Scene) -> str:
    if not scene.before:
        return ""
    number = len(scene.before) + 1
    return f"This is message {number} of our conversation; before it you said “{_quote(scene.before[-1])}”."


_SHOWCASE: Final = """\
What else to try:

| Say | and see |
|---|---|
| parallel | three tools at once, one of them slow |
| steps | one tool after the other |
| fail | a tool that fails, and how a model learns of it |
| long 500 | 500 words, time enough to press stop or reload |

A tool of your own is a function. Run a worker with this one, and say “forecast”:

```python
from tapeline.tools import tool


@tool
def forecast(city: str) -> str:
    \"\"\"The weather to come.\"\"\"
    return f"Sunny in {city}."
```
"""


def _long(said: str) -> int:
    match = re.search(r"\blong\s+(\d{1,9})\b", said.lower())
    return min(int(match[1]), LONG_WORDS_MAX) if match else 0


def _expression(said: str) -> str:
    match = re.search(r"\d[\d.]*(?:\s*[-+*/]\s*\d[\d.]*)+", said)
    return match[0] if match else "6 * 7"


def _list(calls: list[_Call]) -> str:
    return " and ".join(f"`{tool}`" for tool, _ in calls)


def _quote(text: str) -> str:
    return _clip(text, QUOTE_CHARS_MAX)


def _clip(text: str, chars_max: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= chars_max else line[: chars_max - 1] + "…"
