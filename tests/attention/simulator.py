"""Kernels for Hopper on a CPU: Pallas's simulation of a GPU, with the three things that it lacks.

It runs the threads of a block, their copies and barriers, and looks for races between them. Matrix products are done
at once, so what it cannot see is shared memory that is given back before an asynchronous product has read it.
"""

import contextlib
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
import pytest
from jax._src import callback
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret import shared_memory as memory
from jax._src.pallas.mosaic_gpu.interpret.jaxpr_interpret import JaxprInterpreter
from jax._src.state.types import AbstractRef


@contextlib.contextmanager
def simulated(**options):
    """Kernels traced inside run on the CPU; options as of `InterpretGPUParams` (detect_races=True)."""
    with pytest.MonkeyPatch.context() as patch:
        product = JaxprInterpreter._interpret_wgmma_ref_p
        patch.setattr(JaxprInterpreter, "_interpret_wgmma_ref_p", functools.partialmethod(_product, product))
        patch.setattr(gpu_callbacks, "copy_smem_to_gmem", functools.partial(_copy_out, gpu_callbacks.copy_smem_to_gmem))
        patch.setattr(pl, "run_state", _run_state)
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(**options)):
            yield


def _run_state(function):
    """`pl.run_state` for accumulators that `function` only adds products to."""

    def run(accumulators):
        leaves, tree = jax.tree.flatten(accumulators, is_leaf=lambda x: hasattr(x, "_init"))

        def body(*refs):
            function(jax.tree.unflatten(tree, refs))
            return [leaf._init + ref[...] for leaf, ref in zip(leaves, refs)]

        return jax.tree.unflatten(tree, pl.run_scoped(body, *(plgpu.ACC(leaf.shape, leaf.dtype) for leaf in leaves)))

    return run


def _product(self, original, eqn, token, get_invals):
    """The product whose left side may be in registers, not only in shared memory."""
    if isinstance(eqn.invars[1].aval, AbstractRef):
        return original(self, eqn, token, get_invals)
    acc, a, b, *leaves = get_invals()
    tree = eqn.params["b_transforms_tree"]
    transforms = () if tree is None else jax.tree.unflatten(tree, leaves)
    token = callback.io_callback(
        functools.partial(_add_product, source=eqn.source_info), gpu_callbacks.TOKEN_SHAPE_DTYPE,
        token, acc, a, b, transforms, location=self.mesh_location, thread=self.thread,
    )  # fmt: skip
    return token, []


@gpu_callbacks.fail_on_exception
def _add_product(token, acc, a, b, transforms, *, location, thread, source):
    shared, info = gpu_callbacks._get_shared_memory(), memory.GPULoggingInfo(location, thread, source)
    acc, b = (gpu_callbacks.HostAllocationKey.from_array(key) for key in (acc, b))
    transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))
    right, _, _ = shared.get_buffer_content(b, shared.access(b, transforms), thread, logging_info=info)
    place = shared.access(acc, ())
    summed, _, _ = shared.get_buffer_content(acc, place, thread, logging_info=info)
    summed = summed + np.matmul(np.asarray(a, np.float32), np.asarray(right, np.float32), dtype=summed.dtype)
    shared.store_buffer_content(acc, place, summed, thread, logging_info=info)
    return token


def _copy_out(original, *, reduction_op, **arguments):
    """A copy to global memory that may add to what is there."""
    if reduction_op is None:
        return original(reduction_op=None, **arguments)
    return _add_out(operation=reduction_op, **arguments)


@gpu_callbacks.fail_on_exception
def _add_out(*, operation, token, mesh_location, thread, source_info, **arguments):
    assert operation == "add", operation
    shared, info = gpu_callbacks._get_shared_memory(), memory.GPULoggingInfo(mesh_location, thread, source_info)
    places = []
    for side in ("src", "dst"):
        key = gpu_callbacks.HostAllocationKey.from_array(arguments[f"{side}_allocation_key_as_array"])
        transforms = gpu_callbacks._remove_noop_transforms(arguments[f"{side}_transforms"])
        places.append((key, shared.access(key, jax.tree.map(int, transforms))))
    (source, from_), (target, to) = places
    added, _, _ = shared.get_buffer_content(source, from_, thread, logging_info=info)
    within = gpu_callbacks._clip_store_to_shape(to, added, tuple(shared.buffer_shape_and_dtype(target).shape))
    if within is not None:
        to, added = within
        found, _, _ = shared.get_buffer_content(target, to, thread, logging_info=info)
        shared.store_buffer_content(target, to, found + added, thread, logging_info=info)
    return token
