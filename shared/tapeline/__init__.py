"""Tapeline: AI answers over a durable tape.

`events` says what can be on the tape, `subjects` where; `tape` reads and writes it, `append` adds to one
conversation under a fence, `follow` reads one without gap or duplicate, and `fold` turns events into state.
"""

__version__ = "0.1.0"
