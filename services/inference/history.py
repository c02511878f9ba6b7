"""What the model is told of the conversation so far: from the folded state to a prompt. Pure."""

from collections.abc import Iterable
from typing import Any

import msgspec
from tapeline.events import AnswerCall
from tapeline.fold import CallState, RunState, State, StepState
from tapeline.registry import ToolSpec

from .prompt import AnswerTurn, Call, Prompt, ResultTurn, Turn, UserTurn
from .prompt import ToolSpec as OfferedTool


def prompt_of(state: State, run: RunState, model: str, offered: Iterable[ToolSpec], begun: str = "") -> Prompt:
    """The prompt for the next step of `run`: every run that counts for it, stopped and failed ones as far as they got.

    `begun` is what the model has said of this step already, for it to go on from.
    """
    turns: list[Turn] = []
    for one in (*state.before(run), run):
        turns.append(UserTurn(one.message.content))
        for step in one.steps:
            turns += _step(step)
    if begun:
        turns.append(AnswerTurn(begun))
    tools = [OfferedTool(spec.name, spec.description, spec.parameters) for spec in offered]
    return Prompt(system=state.about.system if state.about else "", turns=turns, tools=tools, model=model)


def _step(step: StepState) -> Iterable[Turn]:
    if step.finish is None or not (step.text or step.asked):
        return
    yield AnswerTurn(step.text, step.thinking, [Call(asked.call, asked.tool, asked.arguments) for asked in step.asked])
    calls = {call.call: call for call in step.calls}
    for asked in step.asked:  # a provider wants a result for every call, also for one that was never issued
        yield _result(asked, calls.get(asked.call))


def _result(asked: AnswerCall, call: CallState | None) -> ResultTurn:
    if call is None or call.status != "done":
        content = "The call was not carried out: the run ended first."
    elif call.is_error:
        content = call.message or f"The call ended as {call.outcome}."
    elif stored := call.stored:
        content = f"{stored.preview}\n\n[The result has {stored.bytes} bytes. This is only its beginning.]"
    else:
        content = call.content if isinstance(call.content, str) else _json(_readable(call.content))
    if call is not None and call.arguments != asked.arguments:
        content = f"The user approved this call with other arguments: {_json(call.arguments)}\n{content}"
    return ResultTurn(asked.call, asked.tool, content, is_error=call is None or call.status != "done" or call.is_error)


def _readable(content: Any) -> Any:
    """A list of content blocks, as MCP servers return them, without the base64 in it: no model can read that, and an
    image of 300 kB is as long as a whole book.
    """
    return [_told(block) for block in content] if isinstance(content, list) else content


def _told(block: Any) -> Any:
    match block:
        case {"type": "image" | "audio", "data": str(data)}:
            return block | {"data": f"({len(data)} characters, which are not shown to you)"}
        case {"type": "resource", "resource": {"blob": str(blob)} as resource}:
            return block | {"resource": resource | {"blob": f"({len(blob)} characters, which are not shown to you)"}}
    return block


def _json(content: Any) -> str:
    return msgspec.json.encode(content).decode()
