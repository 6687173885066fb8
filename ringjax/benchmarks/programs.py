"""What is timed: attention in its ways, the one-device kernel beside it, and a ring's transfers alone."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

import ringjax as rj
from ringjax.benchmarks.choices import backend_choices
from ringjax.benchmarks.memory import compiled_memory
from ringjax.benchmarks.workload import Workload
from ringjax.planning.traffic import Traffic

SEQUENCE = P(None, "sp")
# Rotations of the transfer-only program are written out up to here; a longer ring is a loop.
MOST_UNROLLED = 16


@dataclasses.dataclass(frozen=True)
class Way:
    """How attention is computed: strategy and layout over a ring, and the kernel's name."""

    strategy: str
    layout: str | None
    backend: str
    ring_size: int
    ulysses_size: int | None = None
    share: bool = False
    host_size: int | None = None


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled function and what it is called with."""

    call: Callable[[], Any]
    compile_seconds: float
    memory: dict[str, int]
    text: str
    choices: tuple[str, ...]


def compiled(function: Callable, *arguments) -> Program:
    """`function(*arguments)`, compiled.

    Raises NotImplementedError where the library refuses, and JAX's error where the device has too little memory.
    """
    # A function of its own each time: JAX keeps what it traced of a function, and a ring's stand-in (`still`) is seen
    # only while tracing.
    fresh = lambda *arguments: function(*arguments)  # noqa: E731
    with backend_choices() as choices:
        start = time.perf_counter()
        executable = jax.jit(fresh).lower(*arguments).compile()
        seconds = time.perf_counter() - start
    call = functools.partial(executable, *arguments)
    return Program(call, seconds, compiled_memory(executable), executable.as_text() or "", tuple(choices))


def ring_mesh(ring_size: int) -> Mesh:
    """The first devices, as a ring along 'sp'."""
    return Mesh(np.array(jax.devices()[:ring_size]), ("sp",))


def attend(work: Workload, way: Way, mesh: Mesh | None) -> Callable[..., Array]:
    """`attend(q, k, v, reach)` -> out; arrays are global and in layout order (on one device: ascending)."""
    options = dict(backend=way.backend, **work.arguments())
    if way.strategy == "one_device":
        return lambda q, k, v, reach: rj.attention(q, k, v, reach=reach, **options)
    local = functools.partial(
        rj.ring_attention, axis_name="sp", layout=way.layout, strategy=way.strategy, ulysses_size=way.ulysses_size,
        host_size=way.host_size, **options,
    )  # fmt: skip
    if way.share:
        return lambda q, k, v, reach: local(q, k, v, reach=reach)

    def over_ring(q, k, v, reach):
        inside = lambda q, k, v, reach: local(q, k, v, reach=reach)  # noqa: E731
        return jax.shard_map(inside, mesh=mesh, in_specs=SEQUENCE, out_specs=SEQUENCE)(q, k, v, reach)

    return over_ring


def of_pass(attend: Callable, kind: str) -> Callable:
    """`(q, k, v, dout, reach)` -> `(out,)` forward; with both, `(out, dq, dk, dv)` of Σ out · dout."""

    def forward(q, k, v, dout, reach):
        return (attend(q, k, v, reach),)

    def both(q, k, v, dout, reach):
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, reach), q, k, v)
        return (out, *pull(dout.astype(out.dtype)))

    return both if kind == "both" else forward


def fused(causal: bool) -> Callable[..., Array]:
    """cuDNN's attention as JAX gives it, with the signature of `attend`."""

    def attend(q, k, v, reach):
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")

    return attend


def transfers(work: Workload, way: Way, kind: str, mesh: Mesh) -> Program | None:
    """The rotations of a ring with nothing to hide behind; None where there are none."""
    traffic = Traffic.of(
        way.layout, way.ring_size, work.length, kv_heads=work.kv_heads, head_dim=work.head_dim, batch=work.batch,
        dtype=work.dtype, window=work.window,
    )  # fmt: skip
    if not traffic.rotations:
        return None
    rotate = functools.partial(
        lax.ppermute, axis_name="sp", perm=[(i, (i + 1) % way.ring_size) for i in range(way.ring_size)]
    )
    step = lambda xs: lax.optimization_barrier(jax.tree.map(rotate, xs))  # noqa: E731

    def repeated(xs, times: int):
        if times > MOST_UNROLLED:
            return lax.fori_loop(0, times, lambda _, xs: step(xs), xs)
        for _ in range(times):
            xs = step(xs)
        return xs

    def forward(kv, sums):
        return repeated(kv, traffic.rotations)

    def both(kv, sums):  # K and V go around twice, the second time beside dK and dV
        homeward = traffic.returned // traffic.sums
        together = min(traffic.rotations, homeward)
        kv, sums = repeated((repeated(kv, traffic.rotations), sums), together)
        return repeated(kv, traffic.rotations - together), repeated(sums, homeward - together)

    arrays = _sharded_bytes(traffic.kv, mesh), _sharded_bytes(traffic.sums, mesh)
    function = both if kind == "both" else forward
    return compiled(jax.shard_map(function, mesh=mesh, in_specs=P("sp"), out_specs=P("sp")), *arrays)


def _sharded_bytes(count: int, mesh: Mesh) -> Array:
    """`count` bytes on each device, as float32."""
    zeros = functools.partial(jnp.zeros, (mesh.size * (count // 4),), jnp.float32)
    return jax.jit(zeros, out_shardings=NamedSharding(mesh, P("sp")))()


def on_first_device(arrays: Sequence[Array]) -> tuple[Array, ...]:
    """The arrays, whole, on one device."""
    return tuple(jax.device_put(x, jax.devices()[0]) for x in arrays)
