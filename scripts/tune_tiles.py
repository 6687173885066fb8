"""Times blockwise attention for several tile sizes on this machine, after checking each against the reference.

    python scripts/tune_tiles.py [--length 16384] [--heads 32 8] [--head-dim 128]

Prints TFLOP/s (causal: half of the pairs count; backward 2.5 times forward) beside what the fused kernel of
`jax.nn.dot_product_attention` reaches in the same process, where there is one, and errors against float64.
The sizes in ringjax/attention/kernels/xla.py come from this (docs/results/tiles.md).
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import ringjax as rj
from ringjax.attention import api
from ringjax.attention.kernels import xla


def seconds(function, *inputs, repeats: int = 5) -> float:
    """The median of `repeats` runs after one that compiles."""
    jax.block_until_ready(function(*inputs))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*inputs))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def both_passes(attend):
    return jax.jit(lambda q, k, v: jax.grad(lambda *a: attend(*a).astype(jnp.float32).sum(), (0, 1, 2))(q, k, v))


def errors(heads, head_dim, dtype) -> list[float]:
    """Relative errors of out, dq, dk, dv of the blockwise kernel against the dense formula in float64."""
    draw = np.random.default_rng(0).standard_normal
    shapes = [(1, 1500, n, head_dim) for n in (heads[0], heads[1], heads[1], heads[0])]
    q, k, v, dout = (jnp.asarray(draw(shape), dtype) for shape in shapes)

    def run(backend, *arrays):
        out, pull = jax.vjp(lambda *a: rj.attention(*a, backend=backend), *arrays)
        return out, *pull(dout.astype(out.dtype))

    found = run("xla", q, k, v)
    with jax.enable_x64():
        expected = run("reference", *(x.astype(jnp.float64) for x in (q, k, v)))
        pairs = zip(found, expected)
        return [float(jnp.linalg.norm(a.astype(jnp.float64) - b) / jnp.linalg.norm(b)) for a, b in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--heads", type=int, nargs=2, default=(32, 8), metavar=("N", "K"))
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--tiles", type=int, nargs="+", default=(256, 512, 1024, 2048, 4096))
    arguments = parser.parse_args()
    length, heads, head_dim = arguments.length, arguments.heads, arguments.head_dim
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, T {length}, heads {heads}, head size {head_dim}, bfloat16")
    for dtype in (jnp.float32, jnp.bfloat16):
        listed = zip(("out", "dq", "dk", "dv"), errors(heads, head_dim, dtype))
        print(f"errors, {jnp.dtype(dtype).name}:", "  ".join(f"{name} {error:.1e}" for name, error in listed))
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(1, length, n, head_dim) for n in (heads[0], heads[1], heads[1])]
    inputs = [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes)]
    flops = 2 * length**2 * heads[0] * head_dim

    def report(name, attend):
        forward, both = seconds(jax.jit(attend), *inputs), seconds(both_passes(attend), *inputs)
        rates = flops / forward / 1e12, 3.5 * flops / both / 1e12
        print(f"{name:24s} forward {rates[0]:6.1f}   forward + backward {rates[1]:6.1f} TFLOP/s", flush=True)

    if jax.default_backend() == "gpu":
        fused = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")  # noqa: E731
        report("cudnn (jax.nn)", fused)
    for tile in arguments.tiles:
        for chunk in arguments.tiles:
            if max(tile, chunk) > length:
                continue
            xla.QUERY_TILE, xla.KEY_CHUNK = tile, chunk
            api._compiled.clear_cache()
            report(f"tile {tile:5d} chunk {chunk:5d}", lambda q, k, v: rj.attention(q, k, v, backend="xla"))


if __name__ == "__main__":
    main()
