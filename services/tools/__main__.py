"""`python -m services.tools`: the pool of built-in tools, on the same worker that everybody else's run on.

Settings: `TAPELINE_NATS_URL` and, optionally, `TAPELINE_POOL` (builtin).
"""

from tapeline.tools.worker import serve

from .builtin import calculate, clock, collatz, draw_lots, fail, search_notes

if __name__ == "__main__":
    serve([clock, calculate, search_notes, collatz, draw_lots, fail], pool="builtin")
