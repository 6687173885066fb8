"""`attention` on one device, `ring_attention` inside `shard_map`, `sharded_attention` on global arrays."""

import functools

import jax
import jax.numpy as jnp
from einops import repeat
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from ringjax.attention import kernels, layouts, strategies, validate
from ringjax.attention.kernels.base import varying_like
from ringjax.attention.reach import Reach
from ringjax.attention.ring import Ring
from ringjax.attention.vjp import attend

Attention = Float[Array, "B T N Hv"] | tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    *,
    causal: bool = True,
    window: int | None = None,
    reach: Reach | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Attention:
    """Exact attention on one device, `softmax(score(q · kᵀ)) v` over the keys that each query sees.

    Without a `reach`, the T queries are the last T of the S positions; `causal` lets each see the keys up to
    its own, and `window` those less than `window` tokens away (its own counts). `reach` (int32 `[B, T]`)
    overrides both; its indices count the same positions.

    K must divide N; each key/value head serves N/K query heads and is never copied. `scale` defaults to
    1/√H; `softcap` bounds the scores by `softcap · tanh(s / softcap)`. Queries that see nothing give 0.

    Returns out `[B, T, N, Hv]` in q's type and, with `return_lse`, the log-sum-exp `[B, N, T]` in float32 (−inf
    for a query that sees nothing). Both are differentiable. Memory is linear in T and S.

    Raises ValueError for arguments that do not fit, NotImplementedError where a named `backend` cannot serve
    the call.
    """
    validate.arrays(q, k, v)
    length, keys = q.shape[1], k.shape[1]
    if reach is None:
        validate.queries_fit(length, keys)
    index = keys - length + jnp.arange(length, dtype=jnp.int32)
    reach, mask = _reach(reach, causal, window, index, keys, q)
    ring = Ring(layouts.get("contiguous"), None, 1, (0,), mask=mask)
    return _attend(ring, backend, scale, softcap, q, k, v, reach, index, return_lse)


def ring_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    *,
    axis_name: str,
    layout: str | layouts.Layout = "striped",
    causal: bool = True,
    window: int | None = None,
    reach: Reach | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    strategy: str = "ring",
    ulysses_size: int | None = None,
    host_size: int | None = None,
    unroll: bool | None = None,
) -> Attention:
    """Exact attention over a sequence sharded along `axis_name`; call it inside `jax.shard_map`.

    q, k and v are this device's shards, in the order of `layout` ('contiguous', 'striped' or 'zigzag'), and
    `reach` is the reach of this device's queries, in global indices. The rest is as in `attention`.

    `strategy` is 'ring', 'two_level' (K and V go around inside a host, and from host to host meanwhile),
    'all_gather', 'ulysses' or 'hybrid' (`ulysses_size` neighbours trade heads, K and V go around between such
    groups). `host_size` says how many neighbours share fast links, for 'two_level' and 'hybrid' (None: the devices of a
    process, on TPUs those of a slice). `unroll` says whether a ring's hops are unrolled or a `lax.scan` (None: unrolled
    up to 4).

    Ring Attention, arXiv:2310.01889; Striped Attention, arXiv:2311.09431.
    """
    validate.arrays(q, k, v)
    order = layouts.get(layout)
    strategies.check_name(strategy)
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"this shard has {q.shape[1]} queries and {k.shape[1]} keys; a ring holds as many of each")
    length, ring_size = q.shape[1], lax.axis_size(axis_name)
    order.validate(length * ring_size, ring_size)
    index = order.slots(lax.axis_index(axis_name), ring_size, length)
    reach, mask = _reach(reach, causal, window, index, length * ring_size, q)
    width = strategies.width(strategy, ulysses_size, q.shape[2], k.shape[2], ring_size, host_size)
    ring = Ring.of(
        order, axis_name, ring_size // width, length=length, width=width, unroll=unroll,
        max_behind=reach.max_behind, max_ahead=reach.max_ahead, mask=mask,
    )  # fmt: skip
    chosen = strategies.get(strategy, ring, host_size, unroll)
    return _attend(chosen, backend, scale, softcap, q, k, v, reach, index, return_lse)


def sharded_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    *,
    mesh: Mesh,
    layout: str | layouts.Layout = "striped",
    strategy: str = "ring",
    causal: bool = True,
    window: int | None = None,
    reach: Reach | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    ulysses_size: int | None = None,
    host_size: int | None = None,
    unroll: bool | None = None,
) -> Attention:
    """Exact attention on global arrays in layout order, sharded over `mesh`.

    Batch is sharded over the mesh axes 'dp' and 'fsdp', the sequence over 'sp', heads over 'tp'; axes that the
    mesh lacks count as 1. `reach` is global too, `[B, T]` in layout order. The rest is as in `ring_attention`.
    """
    validate.arrays(q, k, v)
    order = layouts.get(layout)
    strategies.check_name(strategy)
    sizes = {axis: mesh.shape.get(axis, 1) for axis in ("dp", "fsdp", "tp", "sp")}
    _check_shards(q, k, order, sizes)
    if reach is not None:
        reach.validate(*q.shape[:2])
    if host_size is None and ulysses_size is None and strategy in strategies.BY_HOST:
        host_size = strategies.in_slice(_a_ring(mesh))
    options = dict(causal=causal, window=window, scale=scale, softcap=softcap, backend=backend, return_lse=return_lse)
    return _sharded(
        q, k, v, reach, mesh=mesh, layout=order, strategy=strategy, ulysses_size=ulysses_size, host_size=host_size,
        unroll=unroll, options=tuple(options.items()),
    )  # fmt: skip


def _a_ring(mesh: Mesh) -> list[jax.Device]:
    """The devices along 'sp' that begin with the first."""
    first = tuple(slice(None) if axis == "sp" else 0 for axis in mesh.axis_names)
    return mesh.devices[first].ravel().tolist() if "sp" in mesh.axis_names else [mesh.devices.flat[0]]


@functools.partial(
    jax.jit, static_argnames=("mesh", "layout", "strategy", "ulysses_size", "host_size", "unroll", "options")
)
def _sharded(q, k, v, reach, *, mesh, layout, strategy, ulysses_size, host_size, unroll, options) -> Attention:
    """The `shard_map`, compiled once for each kind of call also where the caller does not use `jax.jit`."""
    options = dict(options)
    batch = tuple(axis for axis in ("dp", "fsdp") if axis in mesh.shape) or None
    heads, sequence = ("tp" if "tp" in mesh.shape else None), ("sp" if "sp" in mesh.shape else None)
    rows, queries, lse = P(batch, sequence), P(batch, sequence, heads, None), P(batch, heads, sequence)
    k, v = (_repeat_heads(x, max(1, mesh.shape.get("tp", 1) // x.shape[2])) for x in (k, v))

    def local(q, k, v, reach):
        if sequence is None:
            return attention(q, k, v, reach=reach, **options)
        return ring_attention(
            q, k, v, reach=reach, axis_name=sequence, layout=layout, strategy=strategy,
            ulysses_size=ulysses_size, host_size=host_size, unroll=unroll, **options,
        )  # fmt: skip

    in_specs = (queries, queries, queries, jax.tree.map(lambda _: rows, reach))
    out_specs = (queries, lse) if options["return_lse"] else queries
    inputs = _placed((q, k, v, reach), mesh, in_specs)
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs)(*inputs)


def _attend(strategy, backend, scale, softcap, q, k, v, reach: Reach, index, return_lse: bool) -> Attention:
    score = validate.score(scale, softcap, q.shape[-1])
    chosen = kernels.choose(backend, q, k, v, score)
    start, stop = reach.interval(index)
    arrays = varying_like((q, k, v, start, stop), q, k, v, start, stop)
    out, lse = _compiled(strategy, chosen, score, return_lse, *arrays)
    return (out, lse) if return_lse else out


_compiled = jax.jit(attend, static_argnums=(0, 1, 2, 3))  # for callers that do not use jax.jit


def _reach(reach: Reach | None, causal: bool, window: int | None, index, keys: int, q) -> tuple[Reach, str | None]:
    """The given reach, or the one that `causal` and `window` describe for queries at global `index` `[T]`; and
    "causal" or "full" where these alone say the mask, "window" where it is known to be neither."""
    batch, length = q.shape[:2]
    if reach is not None:
        reach.validate(batch, length)
        return reach, _narrow(reach, keys)
    behind = jnp.broadcast_to(index, (batch, length))
    ahead = jnp.zeros_like(behind) if causal else keys - 1 - behind
    reach = Reach(behind, ahead, max_ahead=0 if causal else None)
    if window is None:
        return reach, "causal" if causal else "full"
    reach = reach.within(window)
    return reach, _narrow(reach, keys)


def _narrow(reach: Reach, keys: int) -> str | None:
    """ "window" where the last query cannot see the first key."""
    return "window" if reach.max_behind is not None and reach.max_behind < keys - 1 else None


def _check_shards(q, k, order: layouts.Layout, sizes: dict[str, int]) -> None:
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} tokens and k has {k.shape[1]}; sharded attention takes the same for both")
    order.validate(q.shape[1], sizes["sp"])
    replicas, tp, (batch, _, heads, _) = sizes["dp"] * sizes["fsdp"], sizes["tp"], q.shape
    if batch % replicas:
        raise ValueError(f"batch {batch} is not divisible by dp·fsdp = {replicas}; choose a multiple of it")
    if heads % tp or (k.shape[2] % tp and tp % k.shape[2]):
        raise ValueError(
            f"tp = {tp} cannot share {heads} query and {k.shape[2]} key/value heads evenly; "
            "choose a tp that divides the query heads, and divides or is a multiple of the key/value heads"
        )


def _placed(inputs, mesh: Mesh, specs):
    """On a mesh with explicit axes the types say where arrays are, and shard_map does not move them itself."""
    if AxisType.Explicit not in mesh.axis_types:
        return inputs
    return jax.tree.map(lambda x, spec: jax.reshard(x, NamedSharding(mesh, spec)), inputs, specs)


def _repeat_heads(x: Array, copies: int) -> Array:
    """One K/V head for each tensor-parallel device that needs it; their gradients are summed in float32."""
    if copies == 1:
        return x
    wide = repeat(x.astype(jnp.promote_types(x.dtype, jnp.float32)), "b s k h -> b s (k copies) h", copies=copies)
    return wide.astype(x.dtype)
