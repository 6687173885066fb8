"""Compiles the ring for several H100s and says which rotations are hidden; needs JAX's CUDA plugin, not the GPUs.

    python scripts/gpu_overlap.py [--rings 2 4 8] [--layouts striped zigzag] [--seq-len 65536]

Prints the table of docs/results/gpu_overlap.md: messages of one forward and backward pass, with and without the flag
that `ringjax.accelerator` sets.
"""

import argparse
import importlib.metadata
import itertools
import os

import jax

from ringjax import accelerator
from ringjax.planning import ahead, gpus, hlo

HEADER = """\
| GPUs | layout | collectives at a time | messages | hidden | waited for | temporary | ÷ K, V |
| --- | --- | --- | --- | --- | --- | --- | --- |"""


def measure(ring_size: int, layout: str, limit: int, arguments) -> str:
    jax.clear_caches()  # what was traced for the other limit
    # The ring reads the flag to choose what travels; XLA has read its flags already, so it is told again.
    os.environ["XLA_FLAGS"] = f"{accelerator.OVERLAP}={limit}"
    heads, kv_heads = arguments.heads
    program = ahead.ring_program(
        gpus.gpu_mesh(ring_size), seq_len=arguments.seq_len, heads=heads, kv_heads=kv_heads,
        head_dim=arguments.head_dim, backward=True, layout=layout, backend=arguments.backend,
    )  # fmt: skip
    options = {accelerator.OVERLAP.removeprefix("--"): limit, "xla_gpu_autotune_level": 0}
    compiled = program.compile(compiler_options=options)
    transfers = hlo.Program(compiled.as_text()).transfers()
    hidden = sum(transfer.times for transfer in transfers if transfer.hidden)
    total = sum(transfer.times for transfer in transfers)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    shard = 2 * 2 * arguments.seq_len // ring_size * kv_heads * arguments.head_dim
    return (
        f"| {ring_size} | {layout} | {limit} | {total} | {hidden} | {total - hidden} | {temporary / 2**20:.0f} MiB"
        f" | {temporary / shard:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rings", type=int, nargs="+", default=(2, 4, 8))
    parser.add_argument("--layouts", nargs="+", default=("striped", "zigzag"))
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--seq-len", type=int, default=65536)
    parser.add_argument("--heads", type=int, nargs=2, default=(32, 8), metavar=("N", "K"))
    parser.add_argument("--head-dim", type=int, default=128)
    arguments = parser.parse_args()
    print(f"jax {importlib.metadata.version('jax')}; {vars(arguments)}\n\n{HEADER}")
    try:
        for case in itertools.product(arguments.rings, arguments.layouts, (1, accelerator.IN_FLIGHT)):
            print(measure(*case, arguments), flush=True)
    except (ModuleNotFoundError, NotImplementedError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
