"""An edge with other limits, which a test need not wait for: `python -m tests.edge_with WRITE_TIMEOUT_S=2`."""

import sys

from tapeline import limits
from tapeline.settings import run

if __name__ == "__main__":
    for setting in sys.argv[1:]:
        name, _, value = setting.partition("=")
        assert hasattr(limits, name)
        setattr(limits, name, float(value))

    from services.edge.app import main

    run("edge", main)
