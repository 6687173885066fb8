"""Train the same image tokenizer with each kind of codebook, and print what the held-out pictures say.

    python scripts/compare_codebooks.py configs/vqgan_128.yaml --steps 1500 --run_dir runs/codebooks

Every run has the same number of steps on the same pictures in the same order; `--section.key value` lays anything over
all of them, as for `ringjax train`. The table lies in RUN_DIR/codebooks.md, each run in a folder beside it; a run that
is there already goes on or is only read.
"""

import argparse
import math
import statistics
from pathlib import Path

from ringjax.cli_options import split_overrides
from ringjax.training.load import load_run
from ringjax.training.loop import train
from ringjax.training.metrics import read_metrics

# Mentzer et al. 2023, table 1: levels for about as many codes. 8,192 is not in it.
LEVELS = {
    64: (8, 8), 256: (8, 6, 5), 1024: (8, 5, 5, 5), 4096: (7, 5, 5, 5, 5), 8192: (8, 8, 8, 4, 4),
    16384: (8, 8, 8, 6, 5), 65536: (8, 8, 8, 5, 5, 5),
}  # fmt: skip
METHODS = ("ema", "plain", "fsq")
COLUMNS = ("codebook", "codes", "PSNR", "SSIM", "codes used", "perplexity", "used in training", "pictures/s")


def overrides_for(method: str, codes: int) -> list[tuple[str, str]]:
    """What makes a run one with this codebook of about `codes` codes."""
    if method != "fsq":
        return [("codebook.method", method), ("vqgan.levels", "[]")]
    if codes not in LEVELS:
        raise ValueError(f"no levels are known for {codes} codes; there are some for {', '.join(map(str, LEVELS))}")
    levels = LEVELS[codes]
    return [
        ("codebook.method", "fsq"), ("vqgan.levels", str(list(levels))), ("vqgan.codes", str(math.prod(levels))),
        ("vqgan.code_dim", str(len(levels))),
    ]  # fmt: skip


def row(method: str, codes: int, folder: Path) -> list[str]:
    """What a finished run says: means over all held-out pictures of its last evaluation."""
    records = read_metrics(folder / "metrics.jsonl")
    results = [record["eval"] for record in records if "eval" in record][-1].values()
    steps = [record for record in records if "loss" in record]
    count = sum(found["pictures"] for found in results)
    mean = lambda key: sum(found[key] * found["pictures"] for found in results) / count  # noqa: E731
    speeds = [record["pictures_per_second"] for record in steps if "pictures_per_second" in record]
    similar = "" if any(found["ssim"] is None for found in results) else f"{mean('ssim'):.4f}"
    return [
        method, f"{codes:,}", f"{mean('psnr'):.2f} dB", similar, f"{mean('usage'):.1%}", f"{mean('perplexity'):.0f}",
        f"{steps[-1]['usage']:.1%}", f"{statistics.median(speeds):.0f}",
    ]  # fmt: skip


def table(rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def compare(config: str, steps: int, run_dir: Path, given: list[tuple[str, str]], methods=METHODS) -> str:
    """Train with each of `methods`, write and return the table."""
    codes = load_run(config, given).vqgan.codes
    rows = []
    for method in methods:
        fixed = [("training.steps", str(steps)), ("training.eval_every", str(steps))]
        fixed.append(("run_dir", str(run_dir / method)))
        run = load_run(config, [*given, *fixed, *overrides_for(method, codes)])
        rows.append(row(method, run.vqgan.codes, train(run)))
        print(table(rows), flush=True)
    (run_dir / "codebooks.md").write_text(table(rows), encoding="utf-8")
    return table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.allow_abbrev = False
    parser.add_argument("config")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--run_dir", type=Path, default=Path("runs/codebooks"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    args, rest = parser.parse_known_args()
    positional, given = split_overrides(rest)
    if positional:
        parser.error(f"unknown: {' '.join(positional)}")
    compare(args.config, args.steps, args.run_dir, given, args.methods)


if __name__ == "__main__":
    main()
