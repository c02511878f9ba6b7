"""What the model is told of the conversation so far: from the folded state to a prompt. Pure."""

from collections.abc import Iterable

import msgspec
from tapeline.fold import CallState, RunState, State, StepState
from tapeline.registry import ToolSpec

from .prompt import AnswerTurn, Call, Prompt, ResultTurn, Turn, UserTurn
from .prompt import ToolSpec as OfferedTool


def prompt_of(state: State, run: RunState, model: str, offered: Iterable[ToolSpec], begun: str = "") -> Prompt:
    """The prompt for the next step of `run`: every run up to it, stopped and failed ones as far as they got.

    `begun` is what the model has said of this step already, for it to go on from.
    """
    turns: list[Turn] = []
    for earlier in state.runs.values():
        turns.append(UserTurn(earlier.message.content))
        for step in earlier.steps:
            turns += _step(step)
        if earlier.run == run.run:
            break
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
        yield _result(asked.call, asked.tool, calls.get(asked.call))


def _result(call: str, tool: str, state: CallState | None) -> ResultTurn:
    if state is None or state.status != "done":
        return ResultTurn(call, tool, "The call was not carried out: the run ended first.", is_error=True)
    if state.is_error:
        return ResultTurn(call, tool, state.message or f"The call ended as {state.outcome}.", is_error=True)
    content = state.content if isinstance(state.content, str) else msgspec.json.encode(state.content).decode()
    return ResultTurn(call, tool, content)
