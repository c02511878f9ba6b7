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

# Coalescing: what a model produces while an append is under way waits in one bounded buffer
DELTA_CHARS_MAX: Final = 16_000  # characters in one delta event: at most 96 kB as JSON
PENDING_CHARS_MAX: Final = 64_000  # waiting to be appended; beyond it the provider is not read

# The connection
CONNECT_TIMEOUT_S: Final = 2  # one server
MOVE_AFTER_S: Final = 5.0  # a leader has not answered for this long: look whether the server is cut off, and move
MOVE_AGAIN_S: Final = 3.0  # until the next look
LEADER_LEASE_S: Final = 3.0  # a replica heard of more recently has elected no other leader: nats-server takes 4 s

# Provisioning
PROVISION_PATIENCE_S: Final = 60.0  # a cluster that has just been started elects leaders first
PROVISION_RETRY_S: Final = 0.5

# Reading
HISTORY_BATCH: Final = 512  # events per direct get
HISTORY_BATCH_BYTES: Final = 2_000_000
READ_TIMEOUT_S: Final = 2.0
READ_PATIENCE_S: Final = 20.0  # all tries of one read together, while NATS is away
READ_RETRY_S: Final = 0.05
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
DRAIN_S: Final = 8.0
WAKE_TTL_S: Final = 3_600  # how long a timer that fired stays in the stream

# Tools
TOOL_TIMEOUT_S_DEFAULT: Final = 60.0
TOOL_TIMEOUT_S_MAX: Final = 24 * 3600.0
TOOL_GRACE_S: Final = 5.0  # after a call's own timeout, how long inference waits for its worker to say so
TOOL_CANCEL_S: Final = 1.0  # how long a cancelled tool may clean up
TOOL_CALLS_PER_WORKER: Final = 32  # of one tool at once, over all shards
TOOL_ATTEMPTS_MAX: Final = 3  # workers an idempotent call may lose; then it ends `unknown`
TOOL_DELIVERIES_MAX: Final = 20  # then the call is poison: dead letter, and its deadline ends it
TOOL_PENDING_MAX: Final = 10_000  # calls with workers, per tool and shard
TOOL_WORKERS_MAX: Final = 2_000  # waiting for calls, per tool and shard
TOOL_CONSUMER_IDLE_S: Final = 7 * 24 * 3600.0  # a tool without workers for this long leaves nothing behind
TOOL_RESULT_BYTES_MAX: Final = 512_000
TOOL_RESULT_DEPTH_MAX: Final = 64  # nested arrays and objects
TOOL_MESSAGE_CHARS_MAX: Final = 4_000
PROGRESS_INTERVAL_S: Final = 0.2  # progress said more often is coalesced to the newest
REGISTRY_TTL_S: Final = 30.0
REGISTRY_REFRESH_S: Final = 10.0  # also how often a worker looks whether its consumers are still there
REGISTRY_CACHE_S: Final = 1.0

# The edge
BODY_BYTES_MAX: Final = 1_000_000
BODY_DROPPED_BYTES_MAX: Final = 16_000_000  # read and dropped, so that who sends too much sees the 413
CONTENT_CHARS_MAX: Final = 200_000
TITLE_CHARS_MAX: Final = 500
SYSTEM_CHARS_MAX: Final = 100_000
METADATA_BYTES_MAX: Final = 16_000
IDEMPOTENCY_KEY_CHARS_MAX: Final = 255
READINESS_CACHE_S: Final = 2.0
HEARTBEAT_S: Final = 15.0
RETRY_MS: Final = 1_000  # what a client is told to wait before it reconnects
DRAIN_JITTER_S: Final = 2.0  # over which a drained edge ends its streams
DRAIN_END_S: Final = 4.0  # then a reader that has not taken the end of its drained stream is cut off
WRITE_TIMEOUT_S: Final = 60.0  # a reader that takes nothing for this long is gone
RING_FRAMES_MAX: Final = 1_024  # recent frames kept per watched conversation
RING_BYTES_MAX: Final = 1_000_000
WRITE_BYTES_MAX: Final = 64_000  # frames joined into one write, before back-pressure is asked again
FEED_LINGER_S: Final = 5.0  # how long a feed nobody reads is kept, for the reader who comes right back
