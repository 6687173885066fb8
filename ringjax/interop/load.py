"""From a source of tensors to a model whose parameters lie where they live on a mesh."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ringjax.interop.names import Path, Recipe
from ringjax.interop.tensors import Index, TensorSource, listed
from ringjax.models.config import ModelConfig
from ringjax.models.parallel import Parallel
from ringjax.models.transformer import Transformer

_ONE_DEVICE = Parallel()
Module = TypeVar("Module", bound=nnx.Module)


def load_params(
    config: ModelConfig,
    source: TensorSource,
    recipes: Mapping[Path, Recipe],
    parallel: Parallel = _ONE_DEVICE,
    *,
    ignored: Callable[[str], bool] = lambda name: False,
) -> Transformer:
    """The model of `config` with the parameters that `recipes` make of the source; see `load_module`."""
    return load_module(Transformer.abstract(config), source, recipes, parallel, ignored=ignored)


def load_module(
    abstract: Module,
    source: TensorSource,
    recipes: Mapping[Path, Recipe],
    parallel: Parallel = _ONE_DEVICE,
    *,
    ignored: Callable[[str], bool] = lambda name: False,
) -> Module:
    """`abstract` with the parameters that `recipes` make of the source, in the types that it has.

    Each device's part is read by itself: no parameter is whole in host memory unless it is on a device. Tensors for
    which `ignored(name)` holds are left aside. Raises ValueError that lists what is missing, unknown or misshapen.
    """
    graph, state = nnx.split(abstract)
    flat = dict(nnx.to_flat_state(state))
    check_tensors(source, recipes, ignored)
    shardings = None if parallel.mesh is None else dict(nnx.to_flat_state(parallel.param_shardings(state)))
    loaded = []
    for path, leaf in flat.items():
        recipe, dtype = recipes[path], leaf.get_value().dtype
        if recipe.our_shape != leaf.get_value().shape:
            raise ValueError(f"{'/'.join(path)} is {leaf.get_value().shape}, and its recipe gives {recipe.our_shape}")
        sharding = None if shardings is None else shardings[path].get_value()
        loaded.append((path, leaf.replace(_array(recipe, source, dtype, sharding))))
    return nnx.merge(graph, nnx.from_flat_state(loaded))


def check_tensors(source: TensorSource, recipes: Mapping[Path, Recipe], ignored: Callable[[str], bool]) -> None:
    """Raises ValueError unless the source has exactly the tensors that the recipes take, in their shapes."""
    wanted = {name: recipe.shape for recipe in recipes.values() for name in recipe.names}
    faults = [f"missing {name}" for name in wanted if name not in source.shapes]
    faults += [f"unknown {name}" for name in source.shapes if name not in wanted and not ignored(name)]
    faults += [
        f"{name} is {tuple(source.shapes[name])}, not {shape}"
        for name, shape in wanted.items()
        if name in source.shapes and tuple(source.shapes[name]) != shape
    ]
    if faults:
        raise ValueError(f"{source.path} does not fit its config: {listed(faults)}")


def _array(recipe: Recipe, source: TensorSource, dtype, sharding) -> jax.Array:
    def part(index: Index) -> np.ndarray:
        index = tuple(slice(*axis.indices(size)) for axis, size in zip(index, recipe.our_shape))
        key = tuple((axis.start, axis.stop) for axis in index)
        if key not in parts:  # devices that hold the same part share what was read
            parts[key] = recipe.read(source, index).astype(dtype)
        return parts[key]

    parts: dict[tuple, np.ndarray] = {}
    if sharding is None:
        return jnp.asarray(part(tuple(slice(None) for _ in recipe.our_shape)))
    return jax.make_array_from_callback(recipe.our_shape, sharding, part)
