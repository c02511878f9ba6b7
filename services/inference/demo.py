"""The `demo` model: a script that shows what a run can look like, for people without a key and for tests.

Owns the script, its words and its pace. Never calls a tool that was not offered, and never passes for an AI: every
run's first text says so.
"""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from typing import Any, Final

from tapeline.depth import is_too_deep

from .part import CallInput, Finish, Part, Text, Thinking
from .prompt import AnswerTurn, Call, Prompt, ResultTurn, ToolSpec, UserTurn

NAME: Final = "demo"
LABEL: Final = "**Scripted demo model, not an AI.** "

DELAY_MS_DEFAULT: Final = 20.0  # between two chunks: 50 chunks/s
FIRST_CHUNK_DELAYS: Final = 7.5  # the wait before the first chunk, in delays: 150 ms by default
LONG_WORDS_MAX: Final = 100_000
QUOTE_CHARS_MAX: Final = 80
RESULT_CHARS_MAX: Final = 200
CALLS_MAX: Final = 3  # calls the script asks for at once
FRAGMENT_CHARS: Final = 8  # of a call's arguments in one chunk
INPUT_TOKENS: Final = 50  # of every request; a script reads no prompt

_Planned = tuple[str, dict[str, Any]]


async def stream(prompt: Prompt, delay_s: float) -> AsyncGenerator[Part, None]:
    """The script's answer, `delay_s` seconds between two chunks. It needs no key and no network."""
    await asyncio.sleep(delay_s * FIRST_CHUNK_DELAYS)
    scene = _Scene.read(prompt)
    calls = _calls(scene)
    tokens = 0
    for part in _continued(_parts(scene, calls), scene.begun):
        tokens += _tokens(part.text)
        yield part
        await asyncio.sleep(delay_s)
    usage = {"input_tokens": INPUT_TOKENS, "output_tokens": tokens}
    yield Finish("tool_calls" if calls else "stop", calls, usage)


@dataclass(frozen=True)
class _Scene:
    """What the script reacts to."""

    said: str
    before: list[str]
    """What the user said earlier in the conversation."""
    step: int
    results: list[ResultTurn]
    """All results of this run."""
    tools: dict[str, ToolSpec]
    begun: str
    """What it has said of this answer already."""

    @classmethod
    def read(cls, prompt: Prompt) -> "_Scene":
        said: list[str] = []
        step = 0
        results: list[ResultTurn] = []
        for turn in prompt.turns:
            match turn:
                case UserTurn():
                    said.append(turn.content)
                    step, results = 0, []
                case AnswerTurn():
                    step += 1
                case ResultTurn():
                    results.append(turn)
        *before, last = said or [""]
        begun = ""
        if isinstance(newest := prompt.turns[-1], AnswerTurn):
            begun, step = newest.text, step - 1
        return cls(last, before, step, results, {tool.name: tool for tool in prompt.tools}, begun)


def _calls(scene: _Scene) -> list[Call]:
    """What this step asks for."""
    plan = _plan(scene)
    planned = plan[scene.step] if scene.step < len(plan) else []
    return [Call(f"call_{index}", tool, arguments) for index, (tool, arguments) in enumerate(planned)]


def _parts(scene: _Scene, calls: list[Call]) -> Iterator[Thinking | Text | CallInput]:
    """One answer, in the order of a reasoning model: thinking, text, calls."""
    if scene.step == 0:
        for word in _words(_thought(scene, calls)):
            yield Thinking(word)
    for word in _words(_introduction(scene, calls) if calls else _answer(scene)):
        yield Text(word)
    for index, call in enumerate(calls):
        text = json.dumps(call.arguments)
        starts = range(0, len(text), FRAGMENT_CHARS)
        for fragment in ("", *(text[start : start + FRAGMENT_CHARS] for start in starts)):
            yield CallInput(index, call.id, call.tool, fragment)


def _continued(parts: Iterator[Thinking | Text | CallInput], begun: str) -> Iterator[Thinking | Text | CallInput]:
    """The answer without what was said of it before: the thinking, and the text as far as it had come."""
    left = len(begun)
    for part in parts:
        match part:
            case Thinking() if begun:
                pass
            case Text(text=text) if left:
                left, text = max(0, left - len(text)), text[left:]
                if text:
                    yield Text(text)
            case _:
                yield part


def _words(text: str) -> Iterator[str]:
    return (match[0] for match in re.finditer(r"\s*\S+(?:\s+$)?", text))


def _tokens(text: str) -> int:
    """Roughly: no model has counted."""
    return len(re.split(r'[\s",.:]+', text.strip())) if text else 0


# Which tools a message asks for

_HINTS: Final = {
    "clock": {"time", "date"},
    "calculate": {"math", "sum"},
    "search_notes": {"weather"},
    "collatz": {"stream"},
}


_ASKED_FOR_BY_NAME: Final = {"fail", "draw_lots"}


def _plan(scene: _Scene) -> list[list[_Planned]]:
    """The calls of each step, as far as the tools are offered."""
    said = scene.said.lower()
    clock: _Planned = ("clock", {"timezone": "UTC"})
    calculate: _Planned = ("calculate", {"expression": _expression(scene.said)})
    search: _Planned = ("search_notes", {"query": _quote(scene.said)})
    if _long(scene.said):
        plan: list[list[_Planned]] = []
    elif "parallel" in said:
        plan = [[clock, calculate, search]]
    elif "approv" in said:
        plan = [[clock, ("draw_lots", {"names": ["tea", "coffee"]})]]
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


def _named(scene: _Scene) -> list[_Planned]:
    """Calls of the tools a message names or hints at; of any that are offered if it only speaks of tools."""
    words = set(re.findall(r"[a-z]+", scene.said.lower()))
    named = [name for name in scene.tools if words & (_name_words(name) | _HINTS.get(name, set()))]
    if not named and words & {"tool", "tools"}:
        named = [name for name in scene.tools if name not in _ASKED_FOR_BY_NAME]
    return [(name, _arguments(scene, name)) for name in named[:CALLS_MAX]]


def _name_words(tool: str) -> set[str]:
    return {word for word in re.split(r"[^a-z]+", tool.lower()) if len(word) > 3}  # not the `get` of get_weather


def _arguments(scene: _Scene, tool: str) -> dict[str, Any]:
    if tool == "calculate":
        return {"expression": _expression(scene.said)}
    schema = scene.tools[tool].parameters
    properties = schema.get("properties", {})
    arguments = {name: _sample(properties.get(name, {}), scene.said) for name in schema.get("required", [])}
    return {} if is_too_deep(arguments) else arguments  # of what a schema gives as an example


def _sample(schema: dict[str, Any] | bool, said: str) -> Any:
    """Some value the schema allows: the script understands no argument, it only fills it in."""
    if isinstance(schema, bool):
        return {}
    for key in ("const", "default"):
        if key in schema:
            return schema[key]
    for key in ("enum", "examples"):
        if schema.get(key):
            return schema[key][0]
    for option in schema.get("anyOf", []):
        return _sample(option, said)
    number = schema.get("minimum", 1)
    kind = schema.get("type", "object")
    return {"string": _quote(said), "integer": number, "number": number, "boolean": True, "array": []}.get(
        kind[0] if isinstance(kind, list) else kind, {}
    )


# What it says


def _thought(scene: _Scene, calls: list[Call]) -> str:
    plan = f"I will call {_list(calls)}." if calls else "I need no tool for this; I will just answer."
    return f"The user wrote “{_quote(scene.said)}”. I am a script, so I look for keywords in it. {plan}"


def _introduction(scene: _Scene, calls: list[Call]) -> str:
    if scene.step:
        return f"One result is here. Next I call {_list(calls)}."
    return f"{LABEL}You said “{_quote(scene.said)}”. First I call {_list(calls)}."


def _answer(scene: _Scene) -> str:
    label = "" if scene.step else f"{LABEL}You said “{_quote(scene.said)}”. "
    if words := _long(scene.said):
        return label + " ".join(f"word{number}" for number in range(1, words + 1))
    if any(result.is_error for result in scene.results):
        return f"{label}Not everything worked. {_told(scene)}\n\nA model learns of an error as its call's result."
    return "\n\n".join(filter(None, (label + _told(scene), _remembered(scene), _SHOWCASE)))


def _told(scene: _Scene) -> str:
    if not scene.tools:
        return "No tools are offered in this conversation, so I call none."
    if not scene.results:
        return "I called no tool for this."
    lines = [
        f"- `{result.tool}` {'failed' if result.is_error else 'answered'}: {_clip(result.content, RESULT_CHARS_MAX)}"
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
| stream | a tool whose output is shown as it comes |
| approval | a tool that waits until you approve or deny it |
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


def _list(calls: list[Call]) -> str:
    return " and ".join(f"`{call.tool}`" for call in calls)


def _quote(text: str) -> str:
    return _clip(text, QUOTE_CHARS_MAX)


def _clip(text: str, chars_max: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= chars_max else line[: chars_max - 1] + "…"
