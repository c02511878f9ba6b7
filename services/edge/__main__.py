"""`python -m services.edge`. Settings: `TAPELINE_NATS_URL`, `TAPELINE_HOST`, `TAPELINE_PORT`, `TAPELINE_API_KEYS`,
`TAPELINE_HEARTBEAT_S`.
"""

from tapeline.settings import run

from .app import main

run("edge", main)
