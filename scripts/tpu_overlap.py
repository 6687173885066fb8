"""Compiles the ring for TPU slices and says what each rotation is hidden behind; needs libtpu, not a TPU.

    python scripts/tpu_overlap.py [--slices v5e:2x4 v5p:2x2x2 v6e:2x4] [--backends splash xla] [--seq-len 65536]
    python scripts/tpu_overlap.py --slices v5e:4x4:2 --strategies ring two_level --backends splash --seq-len 262144

Prints the tables of docs/results/tpu_overlap.md. 'fwd' is the forward pass, 'fwd+bwd' that and the gradients; 'between
slices' are messages by the data-center network (v5e:4x4:2 are two slices), beside those of the same rotation inside.
"""

import argparse
import importlib.metadata
import itertools
import time

from ringjax.planning import ahead, hlo

MESSAGES = 2  # K and V, dK and dV
HEADER = """\
| slice | strategy | backend | pass | form | K, V rotate | dK, dV | exposed | between slices | exposed | copies a hop \
| temporary | ÷ K, V | compile |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def measure(topology: str, strategy: str, backend: str, backward: bool, unroll: bool, arguments) -> str:
    mesh = ahead.slice_mesh(topology)
    heads, kv_heads = arguments.heads
    slots, ring_size = arguments.seq_len // mesh.size, mesh.size
    program = ahead.ring_program(
        mesh, seq_len=arguments.seq_len, heads=heads, kv_heads=kv_heads, head_dim=arguments.head_dim, backward=backward,
        backend=backend, unroll=unroll, layout=arguments.layout, strategy=strategy,
    )  # fmt: skip
    start = time.perf_counter()
    compiled = program.compile()
    seconds = time.perf_counter() - start
    read = hlo.Program(compiled.as_text())
    inside, across = [[x for x in read.transfers() if x.across == far] for far in (False, True)]
    sums = sum(x.times for x in inside if x.dtype == "f32") / MESSAGES
    rotations = sum(x.times for x in inside) / MESSAGES - sums
    exposed, network, waits = (sum(x.times for x in some) for some in (_waits(inside), across, _waits(across)))
    hops = (2 if backward else 1) * ring_size
    temporary = compiled.memory_analysis().temp_size_in_bytes
    elements = slots * kv_heads * arguments.head_dim
    shard = 2 * 2 * elements
    copies = read.copied("bf16", (elements, 2 * elements)) / shard
    return (
        f"| {topology} | {strategy} | {backend} | {'fwd+bwd' if backward else 'fwd'} "
        f"| {'unrolled' if unroll else 'scan'} | {rotations:g} | {sums:g} | {exposed} | {network} | {waits} "
        f"| {copies / hops:.1f} | {temporary / 2**20:.0f} MiB | {temporary / shard:.1f} | {seconds:.0f} s |"
    )


def _waits(transfers: list[hlo.Transfer]) -> list[hlo.Transfer]:
    return [transfer for transfer in transfers if not transfer.hidden]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", nargs="+", default=("v5e:2x4", "v5p:2x2x2", "v6e:2x4"))
    parser.add_argument("--backends", nargs="+", default=("splash", "xla"))
    parser.add_argument("--layout", default="striped")
    parser.add_argument("--strategies", nargs="+", choices=("ring", "two_level"), default=("ring",))
    parser.add_argument("--seq-len", type=int, default=65536)
    parser.add_argument("--heads", type=int, nargs=2, default=(32, 8), metavar=("N", "K"))
    parser.add_argument("--head-dim", type=int, default=128)
    arguments = parser.parse_args()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
    print(f"{versions}; {vars(arguments)}\n\n{HEADER}")
    try:
        ways = arguments.slices, arguments.strategies, arguments.backends
        for case in itertools.product(*ways, (False, True), (False, True)):
            print(measure(*case, arguments), flush=True)
    except (ModuleNotFoundError, NotImplementedError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
