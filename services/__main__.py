"""`python -m services`: the whole system on this machine, until Ctrl-C. `scripts/up` installs and runs this.

Settings: `TAPELINE_PORT` (8080), `TAPELINE_HOST` (127.0.0.1), `TAPELINE_DATA` (.tapeline) and
`TAPELINE_NATS_URL` (unset: an embedded NATS). Every other setting reaches the services as it is.
"""

import sys

from tapeline.settings import run

from .child import NotReady
from .supervisor import supervise

if __name__ == "__main__":
    try:
        run("tapeline", supervise)
    except NotReady as error:
        sys.exit(f"tapeline: {error}")
