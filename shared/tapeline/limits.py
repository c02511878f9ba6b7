"""Every number that limits something, with its unit in its name. One home; nothing here is computed."""

from typing import Final

# The tape
SHARDS_DEFAULT: Final = 4
SHARDS_MAX: Final = 1024
DELTA_TTL_S_DEFAULT: Final = 30 * 24 * 3600
CONVERSATION_ID_CHARS_MAX: Final = 64
EVENT_BYTES_MAX: Final = 1_000_000  # NATS max_payload is 1 MiB; the rest is room for headers
ANSWER_BYTES_MAX: Final = 900_000  # text, thinking and arguments of one step, as JSON; then it ends as `length`
BATCH_EVENTS_MAX: Final = 1_000  # nats-server: messages in one atomic batch

# Appending
APPEND_TIMEOUT_S: Final = 2.0  # one try; a try that timed out may have been stored
APPEND_PATIENCE_S: Final = 60.0  # all tries of one append together, while NATS is away
APPEND_RETRY_S: Final = 0.1  # between tries while NATS is away
APPEND_RACE_S: Final = 0.02  # between tries while another append to the conversation is under way
APPEND_CONFLICTS_MAX: Final = 1_000  # lost races in a row before an append gives up

# What others wrote: metadata, arguments, results
JSON_DEPTH_MAX: Final = 64  # nested arrays and objects; decoders give up at some hundreds

# Coalescing: what a model produces while an append is under way waits in one bounded buffer
DELTA_CHARS_MAX: Final = 16_000  # characters in one delta event: at most 96 kB as JSON
PENDING_CHARS_MAX: Final = 64_000  # waiting to be appended; beyond it the provider is not read

# The connection
CONNECT_TIMEOUT_S: Final = 2  # one server
CANCEL_AGAIN_S: Final = 0.1  # after a cancellation that nothing came of
MOVE_AFTER_S: Final = 5.0  # a leader has not answered for this long: look whether the server is cut off, and move
MOVE_AGAIN_S: Final = 3.0  # until the next look
LEADER_LEASE_S: Final = 3.0  # a replica heard of more recently has elected no other leader: nats-server takes 4 s

# Provisioning
PROVISION_PATIENCE_S: Final = 60.0  # a cluster that has just been started elects leaders first
PROVISION_RETRY_S: Final = 0.5

# Reading
HISTORY_BATCH: Final = 512  # events per direct get
HISTORY_BATCH_BYTES: Final = 250_000  # what a reader who has stopped reading holds of the log
READ_TIMEOUT_S: Final = 2.0
READS_MAX: Final = 16  # pages of history asked for at a time on one connection
READ_PATIENCE_S: Final = 20.0  # all tries of one read together, while NATS is away
READ_RETRY_S: Final = 0.05
EXPIRY_MARGIN_S: Final = 60.0  # by which a clock of ours and that of NATS, by which deltas expire, may differ
FOLLOW_PENDING_MAX: Final = 1_024  # live copies waiting in one follower; beyond it they are dropped and healed
RECONCILE_FIRST_S: Final = 1.0  # silence after which a follower asks the log whether it missed the tail; doubled
RECONCILE_S: Final = 15.0  # at each asking, up to this

# Runs
RUN_DEADLINE_S: Final = 600.0
STEPS_MAX: Final = 16
STEP_ATTEMPTS_MAX: Final = 4
PROVIDER_RETRY_S: Final = (0.5, 1.0, 2.0, 4.0)  # back-off before a further try while nothing is visible
CALLS_PER_STEP_MAX: Final = 128

# Triggers
PULL_S: Final = 2.0  # how long one request for a delivery waits; also until they flow after NATS was away
PULL_RETRY_S: Final = 0.1  # between requests while a consumer has no leader
TAKE_CANCEL_S: Final = 0.5  # how long what was cancelled may take to say so
ACK_WAIT_S: Final = 10.0  # a worker silent for this long is presumed dead
IN_PROGRESS_S: Final = 3.0  # how often a busy worker says so
TRIGGER_DELIVERIES_MAX: Final = 8  # then the trigger is poison: dead letter, and its run ends with `error`
TRIGGERS_PENDING_MAX: Final = 10_000  # unacknowledged triggers per shard, over all workers
RUNS_PER_WORKER_MAX: Final = 256  # triggers that one process handles at a time
TRIGGER_AGAIN_S: Final = 1.0  # after a failure of ours
DRIFT_CHECK_S: Final = 5.0
DRAIN_S: Final = 8.0  # for what is under way to end by itself
EXIT_S: Final = 20.0  # from SIGTERM to the end of a service, at most: what a deployment gives it before SIGKILL
WAKE_TTL_S: Final = 7 * 24 * 3_600  # how long a timer that fired waits for inference to be back

# Tools
APPROVAL_S: Final = 7 * 24 * 3600.0  # how long a call waits for a person
ARGUMENTS_BYTES_MAX: Final = 512_000  # as a person edits them, as JSON
POOL_CHARS_MAX: Final = 64  # of a pool's name
TOOL_TIMEOUT_S_DEFAULT: Final = 60.0
TOOL_TIMEOUT_S_MAX: Final = 24 * 3600.0
TOOL_GRACE_S: Final = 5.0  # after a call's own timeout, how long inference waits for its worker to say so
TOOL_CANCEL_S: Final = 1.0  # how long a cancelled tool may clean up
TOOL_CALLS_PER_WORKER: Final = 32  # of one tool at once, over all shards, unless the tool says otherwise
TOOL_LOOP_LATE_S: Final = 2.0  # a turn of the async tools' loop that takes longer is told; also between looks
TOOL_LOOP_BLOCKED_S: Final = 30.0  # then the worker drains and ends, for a fresh one to take its place
TOOL_STUCK_S: Final = 60.0  # all of a tool's calls at once have been left behind for this long: then as well
TOOL_ATTEMPTS_MAX: Final = 3  # workers an idempotent call may lose; then it ends `unknown`
TOOL_ABSENT_S: Final = 30.0  # no worker offers a tool for this long: its calls that nobody took are given up
TOOL_HOLD_S: Final = 1.0  # how long a worker keeps a call for which it has no slot
TOOL_DELIVERIES_MAX: Final = 200  # then the call is poison: dead letter, and its deadline ends it
TOOL_PENDING_MAX: Final = 10_000  # calls with workers, per tool and shard
TOOL_WORKERS_MAX: Final = 2_000  # waiting for calls, per tool and shard
TOOL_CONSUMER_IDLE_S: Final = 7 * 24 * 3600.0  # a tool without workers for this long leaves nothing behind
TOOL_RESULT_BYTES_MAX: Final = 512_000  # as JSON, in an event; what is larger is stored beside the tape
TOOL_STORED_BYTES_MAX: Final = 32_000_000  # as JSON; what is larger is an error
TOOL_PREVIEW_CHARS_MAX: Final = 20_000  # of a stored result: what the model is told of it
TOOL_ENCODERS_MAX: Final = 2  # results of one tool that one worker makes into JSON at a time
RESULTS_STORING_MAX: Final = 4  # that one process stores at a time
RESULT_CHUNK_BYTES: Final = 250_000  # as large as a page of history, so a reader who has stopped holds no more
RESULT_CHUNKS_MAX: Final = 128  # of one attempt; changing it needs `provision`
RESULTS_SWEEP_S: Final = 600.0  # after a conversation was deleted: by then nobody is storing a result of it
TOOL_MESSAGE_CHARS_MAX: Final = 4_000
PROGRESS_INTERVAL_S: Final = 0.2  # progress said more often is coalesced to the newest, output is joined
TOOL_OUTPUT_CHARS_MAX: Final = 200_000  # of one attempt, shown while it runs; the rest is not shown
OUTPUT_ROOM_S: Final = 0.02  # how often a tool on an event loop looks whether its output has room again
REGISTRY_TTL_S: Final = 30.0
REGISTRY_REFRESH_S: Final = 10.0  # also how often a worker looks whether its consumers are still there
REGISTRY_CACHE_S: Final = 1.0
CONSUMERS_ASKED_MAX: Final = 16  # by one worker at a time
STAND_BY_LOOK_S: Final = 0.5  # how often a worker that stands by looks whether the others have gone

# MCP servers
MCP_START_S: Final = 30.0  # until a server has answered what it is and which tools it has: it may be installed first
MCP_CHECK_S: Final = 10.0  # how often an idle server is asked for its tools, also to see that it is alive
MCP_ANSWER_S: Final = 10.0  # for the answer; a server that runs a call may take longer
MCP_RETRY_S: Final = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)  # back-off before a further start; the last again and again
MCP_STEADY_S: Final = 60.0  # a server that has been up for this long begins with the first of them again
MCP_CLOSE_S: Final = 5.0  # for all servers to end; half way their processes are sent SIGTERM, then SIGKILL
MCP_CONNECT_S: Final = 10.0  # one connection to a server over HTTP
MCP_LISTED_MAX: Final = 2_000  # tools that are looked at of one server
MCP_TOOLS_MAX: Final = 128  # that are offered of them; more are left out
MCP_TOOL_BYTES_MAX: Final = 100_000  # a tool's description and schema, as JSON; a larger one is left out
MCP_MESSAGE_BYTES_MAX: Final = 64_000_000  # one answer over HTTP; a program of ours may write what it likes
MCP_LOG_BYTES_MAX: Final = 4_000  # of one line in the log that a server wrote to its standard error
MCP_LAST_WORDS_S: Final = 1.0  # how long what an ended process said, and answers in a lost session, are waited for

# The edge
BODY_BYTES_MAX: Final = 1_000_000
BODY_DROPPED_BYTES_MAX: Final = 16_000_000  # read and dropped, so that who sends too much sees the 413
HEAD_BYTES_MAX: Final = 32_000  # of a request: its line and its headers
HEADERS_MAX: Final = 100
URL_BYTES_MAX: Final = 16_000  # with a ticket in it
REQUESTS_WAITING_MAX: Final = 16  # on one connection, while an earlier one is answered
REQUEST_S: Final = 30.0  # from a request's first byte to its last; also until a new connection's first request
LINGER_S: Final = 2.0  # how long what a refused client still sends is read and dropped, so that it sees the answer
DETAIL_CHARS_MAX: Final = 300  # of what a problem says about a body: it may quote it
CONTENT_CHARS_MAX: Final = 200_000
TITLE_CHARS_MAX: Final = 500
TITLE_DERIVED_CHARS_MAX: Final = 80  # of a title made from the first message
SYSTEM_CHARS_MAX: Final = 100_000
MODEL_CHARS_MAX: Final = 200  # of a model's name
METADATA_BYTES_MAX: Final = 16_000
IDEMPOTENCY_KEY_CHARS_MAX: Final = 255
AWAY_S: Final = 5.0  # how long a request waits for NATS to be back before it is a 503
READINESS_CACHE_S: Final = 2.0
TOOLS_MEASURED_MAX: Final = 256  # by name, in one process
DOCUMENT_CACHE_S: Final = 300  # how long a client need not ask for /openapi.json again
HEARTBEAT_S: Final = 15.0
RETRY_MS: Final = 1_000  # what a client is told to wait before it reconnects
DRAIN_JITTER_S: Final = 2.0  # over which a drained edge ends its streams
DRAIN_END_S: Final = 4.0  # then whoever has not taken the end of what a drained edge sends is cut off
STREAM_TICK_S: Final = 1.0  # how often it is looked which streams need a heartbeat, or have to end
WRITE_TIMEOUT_S: Final = 60.0  # a reader that takes nothing for this long is gone
WRITE_TICK_S: Final = 1.0  # how often it is looked whether readers take anything
UNSENT_BYTES: Final = 64_000  # with the kernel, of what was written to a connection; the rest waits with us
PACE_MIN: Final = 0.01  # times as fast as recorded
PACE_MAX: Final = 1_000.0
PACE_SILENCE_S_MAX: Final = 10.0  # a replay at a pace waits no longer for the next event: nights are cut short
RING_FRAMES_MAX: Final = 1_024  # recent frames kept per watched conversation
RING_BYTES_MAX: Final = 1_000_000
SPANS_MAX: Final = 64  # runs of which is known where they begin and end, per watched conversation
CUTS_MAX: Final = 8  # writes kept ready per watched conversation, for readers at the same place with the same view
WRITE_BYTES_MAX: Final = 64_000  # frames joined into one write, before back-pressure is asked again
FEED_LINGER_S: Final = 5.0  # how long a feed nobody reads is kept, for the reader who comes right back
NOT_FOUND_GRID_S: Final = 0.010  # a `not_found` leaves at a multiple of it: far longer than finding that out takes
REFUSALS_LOGGED_PER_S: Final = 5  # refused requests said one by one; of the others only how many
REFUSAL_CHARS_MAX: Final = 200  # of a refused request's path in the log
NOT_FOUND_SPIN_S: Final = 0.002  # the end of that wait, which timers of whole milliseconds cannot measure

# Who is asking
SECRET_BYTES_MIN: Final = 32  # of what signs tokens: as many as HMAC-SHA-256 makes
TOKEN_CHARS_MAX: Final = 8_192
TOKEN_LEEWAY_S: Final = 10.0  # by which the clocks of whoever signs tokens and of an edge may differ
USER_CHARS_MAX: Final = 255
RSA_BITS_MIN: Final = 2_048
JWKS_REFRESH_S: Final = 300.0  # a key that was withdrawn is refused after this long
JWKS_AGAIN_S: Final = 5.0  # between fetches, however many unknown keys are named
JWKS_TIMEOUT_S: Final = 5.0  # one fetch
JWKS_BYTES_MAX: Final = 256_000
TICKET_S: Final = 300.0  # within which a stream is opened, or resumed, by a ticket

# Per user, over all edges
STREAMS_PER_USER: Final = 100  # open at a time
STREAMS_RETRY_S: Final = 5  # what whoever has too many open is told to wait
MESSAGES_PER_MINUTE: Final = 60
TOKENS_PER_MINUTE: Final = 1_000_000  # read and written by models
TOKEN_BYTES: Final = 4  # of text, on average: an estimate, where a provider has not counted
COUNTER_TTL_S: Final = 180.0  # what was used longer ago counts nowhere
LEASE_TTL_S: Final = 30.0  # a killed edge's streams count until then
LEASE_REFRESH_S: Final = 10.0  # on average
LEASE_CLOSE_S: Final = 2.0  # how long an edge that ends waits for its leases to be given back
LEASE_CLOSE_TICK_S: Final = 0.02
LIST_PAGE_ENTRIES: Final = 50  # of a user's conversations, read in one request; changing it needs a new stream
LIST_PAGES_MAX: Final = 6  # read for one answer, most of it deleted perhaps
LIST_ENTRIES_DEFAULT: Final = 50  # in one answer
LIST_ENTRIES_MAX: Final = 100
LIST_DELETED_TTL_S: Final = 60  # how long the place of a deleted conversation is kept, empty
