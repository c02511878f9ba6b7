"""`python -m services.inference`. Settings: `TAPELINE_NATS_URL`, `TAPELINE_MODEL`, and the provider's own."""

from tapeline.settings import run

from .app import main

run("inference", main)
