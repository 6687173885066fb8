"""Kernels for Hopper on a CPU: Pallas's simulation of a GPU, with the two things that it lacks.

It runs the threads of a block, their copies and barriers, and looks for races between them. Matrix products are done
at once, so what it cannot see is shared memory that is given back before an asynchronous product has read it.
"""

import contextlib
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
from jax._src import callback
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret import shared_memory as memory
from jax._src.pallas.mosaic_gpu.interpret.jaxpr_interpret import JaxprInterpreter
from jax._src.state.types import AbstractRef


@contextlib.contextmanager
def simulated(**options):
    """Kernels traced inside run on the CPU; options as of `InterpretGPUParams` (detect_races=True)."""
    product, state = JaxprInterpreter._interpret_wgmma_ref_p, pl.run_state
    JaxprInterpreter._interpret_wgmma_ref_p = functools.partialmethod(_product, product)
    pl.run_state = _run_state
    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(**options)):
            yield
    finally:
        JaxprInterpreter._interpret_wgmma_ref_p, pl.run_state = product, state


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
