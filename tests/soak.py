"""`scripts/soak`: people use the whole system for a long time while its processes are killed, stopped and frozen.

Prints what happened every minute, and at the end; exits with 1 if a promise was broken. The seed chooses everything.
"""

import argparse
import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos import SAYINGS, World, world


async def soak(minutes: float, people: int, seed: int) -> bool:
    """Runs for so long; whether no promise was broken."""
    ends = time.monotonic() + minutes * 60

    def over() -> bool:
        return time.monotonic() > ends

    with tempfile.TemporaryDirectory() as folder:
        async with world(Path(folder), seed) as one:

            async def person(number: int) -> None:
                visit = 0
                while not over():
                    visit += 1
                    sayings = one.chance.choices(SAYINGS, k=one.chance.randint(1, 4))
                    await one.use(f"p{number}-{visit}", sayings)

            async with asyncio.TaskGroup() as group:
                telling = asyncio.create_task(_tell(one))
                group.create_task(one.disturb(over))
                for number in range(people):
                    group.create_task(person(number))
            telling.cancel()
            await one.judge_effects()
            print(one.report)
            print(f"phases at a fault: {dict(one.report.phases)}")
            for violation in one.report.violations:
                print(violation)
            if one.report.violations:
                print(one.stack.logs()[-20_000:])
            return not one.report.violations


async def _tell(one: World) -> None:
    while True:
        await asyncio.sleep(60)
        print(one.report, flush=True)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--people", type=int, default=8)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    options = parser.parse_args()
    print(f"seed {options.seed}, {options.minutes:g} minutes, {options.people} people", flush=True)
    sys.exit(not asyncio.run(soak(options.minutes, options.people, options.seed)))


if __name__ == "__main__":
    main()
