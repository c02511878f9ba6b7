"""`python -m services.provision`: makes or upgrades what this deployment needs in NATS. Safe to run again.

Settings: `TAPELINE_NATS_URL`, `TAPELINE_SHARDS` (4, for ever), `TAPELINE_REPLICAS` (1), `TAPELINE_DELTA_TTL_S`
(30 days; 0 keeps deltas for ever).
"""

from tapeline import limits, provision
from tapeline.connection import Refused, connect
from tapeline.settings import Settings, run
from tapeline.tape import Deployment


async def main(settings: Settings) -> None:
    """Makes it so, says what it changed, and checks."""
    deployment = Deployment(
        shards=settings.number("TAPELINE_SHARDS", limits.SHARDS_DEFAULT, least=1, most=limits.SHARDS_MAX),
        replicas=settings.number("TAPELINE_REPLICAS", 1, least=1, most=5),
        delta_ttl_s=settings.number("TAPELINE_DELTA_TTL_S", limits.DELTA_TTL_S_DEFAULT, least=0),
    )
    nc = await connect(settings.nats_url, "tapeline-provision")
    try:
        changes = await provision.apply(nc, deployment)
        left = await provision.drift(nc, deployment)
    finally:
        await nc.close()
    for line in changes or ["everything was there"]:
        print(line)
    if left:
        raise Refused("; ".join(left))


if __name__ == "__main__":
    run("provision", main)
