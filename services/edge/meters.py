"""What this edge measures: of the runs it showed (the article's five), and of its streams."""

from typing import Final

from opentelemetry import metrics
from tapeline import limits
from tapeline.events import Done, Error, ToolResult
from tapeline.record import Record

_meter = metrics.get_meter("tapeline")
_first_token: Final = _meter.create_histogram("tapeline.stream.first_token", "s", "From the message to the first token")
_rate: Final = _meter.create_histogram("tapeline.stream.token_rate", "{token}/s", "Output tokens per second of a run")
_completions: Final = _meter.create_counter(
    "tapeline.stream.completions", "1", "Runs shown to their end: complete, stopped or error"
)
_duration: Final = _meter.create_histogram("tapeline.stream.duration", "s", "From the message to the end of its run")
_tool: Final = _meter.create_histogram("tapeline.tool.duration", "s", "How long a tool call took")
_open: Final = _meter.create_up_down_counter("tapeline.streams.open", "1", "Responses that are streaming")
_ended: Final = _meter.create_counter("tapeline.streams.ended", "1", "Responses ended, by how")
_resumes: Final = _meter.create_counter("tapeline.streams.resumes", "1", "Streams begun from a cursor")

OTHER: Final = "(other)"


class Meters:
    """Where the edge's measurements go. A run that nobody watches here is not measured here."""

    def __init__(self) -> None:
        self._tools: set[str] = set()

    def event(self, record: Record) -> None:
        """A live event passed, once per process."""
        if not record.is_fact:
            return
        match event := record.event():
            case Done():
                outcome = "stopped" if event.reason == "stopped" else "complete"
                self._run(event, outcome)
            case Error():
                self._run(event, "error")
            case ToolResult():
                _tool.record(event.duration_ms / 1000, {"tool": self.tool(event.tool), "outcome": event.outcome})

    def tool(self, tool: str) -> str:
        """The tool as it is measured: its name is its worker's word, and each name is a series for ever."""
        if len(self._tools) < limits.TOOLS_MEASURED_MAX:
            self._tools.add(tool)
        return tool if tool in self._tools else OTHER

    def _run(self, event: Done | Error, outcome: str) -> None:
        _completions.add(1, {"outcome": outcome})
        _duration.record(event.duration_ms / 1000, {"outcome": outcome})
        if event.first_token_ms is None:
            return
        _first_token.record(event.first_token_ms / 1000)
        tokens, spoken_ms = event.usage.get("output_tokens", 0), event.duration_ms - event.first_token_ms
        if tokens and spoken_ms > 0:
            _rate.record(tokens * 1000 / spoken_ms)

    def opened(self, *, resumed: bool) -> None:
        """A response began to stream."""
        _open.add(1)
        if resumed:
            _resumes.add(1)

    def closed(self, how: str) -> None:
        """A response ended: complete, left, drained, slow or failed."""
        _open.add(-1)
        _ended.add(1, {"how": how})
