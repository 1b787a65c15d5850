"""`python -m tests.simulation SEED`: run one seed again, and print what happened."""

from __future__ import annotations

import argparse
import sys

from .scenario import simulate
from .world import Violation


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("seed", type=int, help="as a failing test printed it")
    log: list[str] = []
    try:
        result = simulate(parser.parse_args().seed, log=log)
    except Violation as violation:
        print(*log, sep="\n")
        print(f"violated: {violation}")
        return 1
    print(*log, sep="\n")
    print(f"owner: {result.owner}" + "".join(f"; {one}" for one in sorted(result.excuses)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
