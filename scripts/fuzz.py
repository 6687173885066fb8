"""Feeds broken and hostile files to the readers of the library, and says what they did with them.

    python scripts/fuzz.py --target safetensors --inputs 20000 --seed 0
    python scripts/fuzz.py --target all --inputs 20000 --minutes 10 --findings findings

An input passes where its reader gives a result, or raises the error that its docstring names, with the file's name.
Anything else is a finding: another error, a crash, more than 8 s or 1 GiB, a file outside the folder, code that is run.
Findings are kept in --findings, each input with what became of it. docs/security.md tells what is fuzzed and why.
Exits with 1 where there was one.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> int:
    from tests.fuzz.targets import TARGETS
    from tests.fuzz.worker import run

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="+", default=["all"], choices=["all", *TARGETS], help="what is read")
    parser.add_argument("--inputs", type=int, default=20_000, help="of each target")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="at most, of each target")
    parser.add_argument("--seed", type=int, default=0, help="the same seed, the same inputs")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument(
        "--findings", type=Path, default=Path("fuzz-findings"), help="folder for inputs that are findings"
    )
    given = parser.parse_args()
    if given.inputs < 1 or not given.minutes > 0:
        parser.error(f"--inputs {given.inputs} and --minutes {given.minutes:g} must be above 0: nothing would be read")
    outcomes = []
    for name in TARGETS if "all" in given.target else given.target:
        outcome = run(
            name,
            inputs=given.inputs,
            seconds=60 * given.minutes,
            seed=given.seed,
            first=given.first,
            findings=given.findings.absolute(),
            say=lambda line: print(line, flush=True),
        )
        print(outcome.line, flush=True)
        outcomes.append(outcome)
        if outcome.findings:
            given.findings.mkdir(parents=True, exist_ok=True)
            summary = {"findings": outcome.findings, "first": outcome.examples}
            (given.findings / f"{name}.json").write_text(json.dumps(summary, indent=1) + "\n")
    return int(any(outcome.findings for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
