"""Times blockwise attention for several tile sizes on this machine; each is checked against float64 first.

    python scripts/tune_tiles.py [--length 16384] [--heads 32/8] [--tiles 512 1024 2048]

Prints, as `ringjax bench attention` does, useful TFLOP/s and the share of the one-device kernel of the same process.
The sizes in ringjax/attention/kernels/xla.py come from this (docs/results/tiles.md).
"""

import argparse
import functools

from ringjax.attention import api
from ringjax.attention.kernels import xla
from ringjax.benchmarks import environment, table
from ringjax.benchmarks.attention import run_attention
from ringjax.benchmarks.config import AttentionBench
from ringjax.benchmarks.rows import Row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--heads", default="32/8")
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiles", type=int, nargs="+", default=(256, 512, 1024, 2048, 4096))
    given = parser.parse_args()
    config = AttentionBench(
        lengths=(given.length,), heads=(given.heads,), head_dim=given.head_dim, dtype=given.dtype,
        repeats=given.repeats, strategies=("one_device",), backends=("xla",),
    )  # fmt: skip
    print("\n".join(environment.header(environment.describe([]))))
    sizes = [(tile, chunk) for tile in given.tiles for chunk in given.tiles if max(tile, chunk) <= given.length]
    for tile, chunk in sizes:
        xla.QUERY_TILE, xla.KEY_CHUNK = tile, chunk
        api._compiled.clear_cache()
        show = functools.partial(report, f"tile {tile:5d} chunk {chunk:5d}")
        run_attention(config, print, show)


def report(sizes: str, row: Row) -> None:
    print(f"{sizes}  {table.line(row)}", flush=True)


if __name__ == "__main__":
    main()
