"""Some inputs of every target, in one process: python -m tests.fuzz.smoke FOLDER INPUTS SECONDS

Prints a line a target: name, inputs, accepted, refused, findings.
"""

import collections
import os
import sys
import time
from pathlib import Path

from tests.fuzz.guard import Guard
from tests.fuzz.targets import TARGETS
from tests.fuzz.worker import judge, warmed


def main() -> None:
    folder, most, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    work = folder / "work"
    work.mkdir()
    os.chdir(work)
    guard = Guard(work)
    for target in TARGETS.values():
        cases = warmed(target, folder / "seeds", work)
        found, start, number = collections.Counter(), time.process_time(), len(cases)
        while number < len(cases) + most and (time.process_time() - start < seconds or number < len(cases) + 3):
            verdict = judge(guard, target, cases, 7, number, work)
            found[verdict.kind if verdict.passed else f"{verdict.kind}: {verdict.signature}"] += 1
            number += 1
        accepted, refused = found.pop("accepted", 0), found.pop("refused", 0)
        print(f"{target.name}\t{number - len(cases)}\t{accepted}\t{refused}\t{dict(found)}", flush=True)


if __name__ == "__main__":
    main()
