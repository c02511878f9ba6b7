"""A few notes about Tapeline, for `search_notes` to search. Text only: a title, then its lines, then a blank one."""

from typing import Final

_TEXT: Final = """
Durable before visible
No reader is shown an event that JetStream has not acknowledged. What is on the screen is in the
log.

The fence
Every append names the conversation's last event. If another writer came first the server rejects
it, so a worker that was paused or presumed dead cannot add to a run that another has taken over.

Resume
The id of an SSE event is its JetStream sequence. A client that reconnects sends Last-Event-ID and
gets what it missed, from any edge, each event exactly once.

Stop
A stop is an event in the log. It works from any device and after a reconnect, and no model event
follows the terminal event.

Takeover
When an inference worker is lost in mid-answer another continues within seconds. The live view shows
one answer, the log keeps both attempts.

Tool results
A tool call has exactly one result, whatever is redelivered. A call whose worker died half-way
through a tool that is not idempotent ends as unknown; it is never silently run twice.

Tool workers
A worker pool is deployed and scaled by itself, often from another repository. It announces its
tools in a registry, and the model is offered what is alive.

Shards
Conversations are spread over a fixed number of streams, chosen when the deployment is provisioned.
Each stream has a leader, so a cluster shares the load.

Coalescing
A run has one append in flight. What arrives from the model meanwhile is joined into the next event:
at low load every chunk is its own event, under pressure events grow.

Retention
Facts are kept for ever by default, token deltas for thirty days. An answer holds its full text, so
history reads well after its deltas expire.

Audit
Each stored event names its predecessor, so the log proves its own completeness, and any
conversation can be replayed token by token with its recorded timing.

Back-pressure
A slow reader costs a bounded buffer. It leaves the live ring, catches up from the log at its own
pace, and is never dropped for being slow.
"""

NOTES: Final = tuple((title, " ".join(lines)) for title, *lines in map(str.splitlines, _TEXT.strip().split("\n\n")))
