"""Where everything lives on a mesh: one table from logical axes to mesh axes, and what follows from it."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from ringjax.attention import Reach, attention, kernels, layouts, sharded_attention, strategies
from ringjax.attention.api import Attention

MESH_AXES = ("dp", "fsdp", "tp", "sp")

# The table. Parameters are cut along `embed`, activations never are: their width is whole on every device.
LOGICAL_AXES: dict[str, tuple[str, ...]] = {
    "batch": ("dp", "fsdp"),
    "images": ("dp", "fsdp", "sp"),
    "sequence": ("sp",),
    "heads": ("tp",),
    "kv_heads": ("tp",),
    "ffn": ("tp",),
    "vocab": ("tp",),
    "embed": ("fsdp", "sp"),
    "layers": (),
    "rank": (),
    "norm": (),
}
# A parameter axis that tensor parallelism cannot cut evenly is an error; other axes that do not divide stay whole.
_MUST_DIVIDE = ("heads", "ffn", "vocab")


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How a model runs on a mesh (None: one device): layout, attention strategy and backend. Hashable and static."""

    mesh: Mesh | None = None
    layout: str = "striped"
    strategy: str = "ring"
    backend: str = "auto"
    cut_weights: bool = True
    """Whether parameters are cut over the ring too, and gathered where they are used; else over fsdp and tp alone."""
    host_size: int | None = None
    """Devices of the ring that share fast links, for strategies two_level and hybrid; None: a process's or slice's."""

    def __post_init__(self):
        layouts.get(self.layout)
        strategies.check_name(self.strategy)
        strategies.check_host_size(self.strategy, self.host_size)
        kernels.check_name(self.backend)
        if self.mesh is None:
            return
        unknown = [axis for axis in self.mesh.axis_names if axis not in MESH_AXES]
        if unknown:
            raise ValueError(f"mesh axis {unknown[0]!r} has no meaning here; the axes are {', '.join(MESH_AXES)}")
        if any(kind != AxisType.Auto for kind in self.mesh.axis_types):
            raise ValueError(
                f"mesh axes have types {self.mesh.axis_types}; the model needs Auto axes: make the mesh with"
                " axis_types=(jax.sharding.AxisType.Auto,) * number of axes"
            )

    def size(self, *mesh_axes: str) -> int:
        """Devices along these mesh axes together; an axis that the mesh lacks counts as 1."""
        return math.prod(self.mesh.shape.get(axis, 1) for axis in mesh_axes) if self.mesh is not None else 1

    @property
    def ring_size(self) -> int:
        """R, the devices that share a sequence."""
        return self.size("sp")

    def present(self, *mesh_axes: str) -> tuple[str, ...]:
        """Those of the axes that the mesh has."""
        return tuple(axis for axis in mesh_axes if self.mesh is not None and axis in self.mesh.shape)

    def spec(self, *logical_axes: str | None) -> P:
        """The partition of an array with these logical axes, None for an axis that is whole."""
        return P(*(self._entry(self._mesh_axes(axis)) for axis in logical_axes))

    def spec_for(self, shape: tuple[int, ...], *logical_axes: str | None) -> P:
        """`spec`, where mesh axes that do not divide the dimension are left out."""
        if len(shape) != len(logical_axes):
            raise ValueError(f"shape {shape} has {len(shape)} axes and {logical_axes} names {len(logical_axes)}")
        return P(*(self._entry(self._dividing(size, axis)) for size, axis in zip(shape, logical_axes)))

    def sharding(self, *logical_axes: str | None) -> NamedSharding:
        """`spec` as a sharding on the mesh, which must be there."""
        return NamedSharding(self._required_mesh(), self.spec(*logical_axes))

    def constrain(self, x: Array, *logical_axes: str | None) -> Array:
        """`x`, kept where the table puts its axes; without a mesh, `x`."""
        if self.mesh is None:
            return x
        return lax.with_sharding_constraint(x, NamedSharding(self.mesh, self.spec_for(x.shape, *logical_axes)))

    def param_spec(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> P:
        """The partition of a parameter; raises ValueError where tensor parallelism does not divide it."""
        for size, axis in zip(shape, axes):
            if axis in _MUST_DIVIDE and size % self.size(*LOGICAL_AXES[axis]):
                raise ValueError(
                    f"tp {self.size('tp')} does not divide the {axis} axis of a parameter of shape {shape}; use a tp"
                    f" that divides {size}"
                )
        return self.spec_for(shape, *axes)

    def param_shardings(self, tree: Any) -> Any:
        """`tree` with a NamedSharding in place of each array; it may be abstract.

        The arrays of `nnx.Param`s lie as their `axes` say; every other array (a step count) is on all devices.
        Works for a model's state and for optimizer states made from it.
        """
        mesh = self._required_mesh()

        def place(leaf):
            if not isinstance(leaf, nnx.Variable):
                return NamedSharding(mesh, P())
            axes = leaf.get_metadata().get("axes")
            spec = P() if axes is None else self.param_spec(leaf.get_value().shape, axes)
            return leaf.replace(NamedSharding(mesh, spec))

        return jax.tree.map(place, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        reach: Reach | None,
        *,
        window: int | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        return_lse: bool = False,
    ) -> Attention:
        """Attention within `reach` (None: causal), cut to `window`; sequences are in layout order."""
        if reach is not None and window is not None:
            reach, window = reach.within(window), None
        options = dict(reach=reach, window=window, softcap=softcap, scale=scale, backend=self.backend)
        options["return_lse"] = return_lse
        if self.mesh is None:
            return attention(q, k, v, **options)
        return sharded_attention(
            q, k, v, mesh=self.mesh, layout=self.layout, strategy=self.strategy, host_size=self.host_size, **options
        )

    def local(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """`function` on each device's shards; without a mesh, `function`. For code that has its own gradient rule."""
        if self.mesh is None:
            return function
        # The functions say themselves what is summed where, forward and backward, so nothing is left to check.
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def sum_over(self, x: Array, *mesh_axes: str) -> Array:
        """Inside `local`: the sum over these mesh axes."""
        axes = tuple(axis for axis in self.present(*mesh_axes) if self.size(axis) > 1)
        return lax.psum(x, axes) if axes else x

    def own_heads(self, kv_heads: int, *arrays: Array) -> tuple[Array, ...]:
        """Inside `local`: of arrays `[…, K, H]` whose `kv_heads` are too few for tp to cut, the head that this device's
        queries belong to; others as they are."""
        devices = self.size("tp")
        if devices <= kv_heads:
            return arrays
        own = lax.axis_index("tp") // (devices // kv_heads)
        return tuple(lax.dynamic_slice_in_dim(x, own, 1, axis=-2) for x in arrays)

    def gather_weight(self, weight: Array, spec: P, dtype: jnp.dtype) -> Array:
        """Inside `local`: a parameter in the compute type, whole but for its cut over tp."""
        weight = jnp.asarray(weight, dtype)
        for dimension, axes in self._gathered(spec):
            weight = lax.all_gather(weight, axes, axis=dimension, tiled=True)
        return weight

    def reduce_weight(self, gradient: Array, spec: P) -> Array:
        """Inside `local`: the inverse of `gather_weight` for gradients, summed over all devices with other tokens."""
        scattered = set()
        for dimension, axes in self._gathered(spec):
            gradient = lax.psum_scatter(gradient, axes, scatter_dimension=dimension, tiled=True)
            scattered.update(axes)
        return self.sum_over(gradient, *(axis for axis in ("dp", "fsdp", "sp") if axis not in scattered))

    def _gathered(self, spec: P):
        for dimension, entry in enumerate(spec):
            axes = (entry,) if isinstance(entry, str) else (entry or ())
            axes = tuple(axis for axis in axes if axis != "tp" and self.size(axis) > 1)
            if axes:
                yield dimension, axes

    def _mesh_axes(self, logical: str | None) -> tuple[str, ...]:
        if logical is None:
            return ()
        if logical not in LOGICAL_AXES:
            raise ValueError(f"unknown logical axis {logical!r}; the axes are {', '.join(LOGICAL_AXES)}")
        axes = LOGICAL_AXES[logical]
        if logical == "embed" and not self.cut_weights:
            axes = tuple(axis for axis in axes if axis != "sp")
        return self.present(*axes)

    def _dividing(self, size: int, logical: str | None) -> tuple[str, ...]:
        kept: tuple[str, ...] = ()
        for axis in self._mesh_axes(logical):
            if size % self.size(*kept, axis) == 0:
                kept = (*kept, axis)
        return kept

    @staticmethod
    def _entry(axes: tuple[str, ...]):
        return axes[0] if len(axes) == 1 else (axes or None)

    def _required_mesh(self) -> Mesh:
        if self.mesh is None:
            raise ValueError("this Parallel has no mesh, so there are no shardings; pass Parallel(mesh=…)")
        return self.mesh
