"""Compiles the ring for several H100s and says which rotations are hidden; needs JAX's CUDA plugin, not the GPUs.

    python scripts/gpu_overlap.py [--rings 2 4 8] [--layouts striped zigzag] [--seq-len 65536]

Prints the table of docs/results/gpu_overlap.md: messages of one forward and backward pass, with and without the flags
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
| GPUs | layout | collectives at a time | combined | messages | hidden | waited for | temporary | ÷ K, V |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""
OVERLAP, COMBINE = accelerator.OVERLAP, accelerator.COMBINE
# XLA's defaults (1 at a time; combined up to 30 MiB), the limit alone, and both as `ringjax.accelerator` sets them.
SETTINGS = {OVERLAP: 1}, {OVERLAP: accelerator.FLAGS[OVERLAP]}, accelerator.FLAGS


def measure(ring_size: int, layout: str, setting: dict[str, int], arguments) -> str:
    jax.clear_caches()  # what was traced for another setting
    # The ring reads the flags to choose what travels; XLA has read its own already, so it is told again.
    os.environ["XLA_FLAGS"] = " ".join(f"{name}={value}" for name, value in setting.items())
    heads, kv_heads = arguments.heads
    program = ahead.ring_program(
        gpus.gpu_mesh(ring_size), seq_len=arguments.seq_len, heads=heads, kv_heads=kv_heads,
        head_dim=arguments.head_dim, backward=True, layout=layout, backend=arguments.backend,
    )  # fmt: skip
    options = {name.removeprefix("--"): value for name, value in setting.items()}
    compiled = program.compile(compiler_options={**options, "xla_gpu_autotune_level": 0})
    transfers = hlo.Program(compiled.as_text()).transfers()
    hidden = sum(transfer.times for transfer in transfers if transfer.hidden)
    total = sum(transfer.times for transfer in transfers)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    shard = 2 * 2 * arguments.seq_len // ring_size * kv_heads * arguments.head_dim
    return (
        f"| {ring_size} | {layout} | {setting[OVERLAP]} | {'yes' if COMBINE in setting else 'no'} | {total} | {hidden}"
        f" | {total - hidden} | {temporary / 2**20:.0f} MiB | {temporary / shard:.1f} |"
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
        for case in itertools.product(arguments.rings, arguments.layouts, SETTINGS):
            print(measure(*case, arguments), flush=True)
    except (ModuleNotFoundError, NotImplementedError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
