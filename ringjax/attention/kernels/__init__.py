"""One file a backend, behind the contract of `base`."""

import difflib
import functools
import logging

from ringjax.attention.kernels import cudnn, mosaic, reference, splash, xla
from ringjax.attention.kernels.base import Kernel, Kernels, Score, target

logger = logging.getLogger(__name__)

# The fastest first.
_ALL = cudnn.KERNEL, mosaic.KERNEL, splash.KERNEL, xla.KERNEL, reference.KERNEL
KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in _ALL}
# The fused kernel of each kind of accelerator that serves any mask: without it `auto` takes a slower path, and says so.
FOR_ANY_MASK = {"gpu": mosaic.KERNEL.name, "tpu": splash.KERNEL.name}


def available() -> dict[str, str | None]:
    """Each backend, with the reason why this machine cannot use it (None: it can), the fastest first."""
    return {name: kernel.unavailable() for name, kernel in KERNELS.items()}


def check_name(backend: str) -> None:
    """Raises ValueError for a backend that does not exist."""
    if backend == "auto" or backend in KERNELS:
        return
    near = difflib.get_close_matches(str(backend), ["auto", *KERNELS], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown backend {backend!r}; the backends are 'auto', {', '.join(map(repr, KERNELS))}{hint}")


def choose(backend: str, q, k, v, score: Score) -> Kernels:
    """The kernels for these inputs: the named one, or with 'auto' the first of `KERNELS` that serve them.

    Raises ValueError for an unknown name and NotImplementedError, with the reason, where a named backend
    cannot serve the call. What 'auto' chose, and why not an earlier one, is logged at level DEBUG; that it chose a
    slower one than the accelerator's fused kernel, once as a warning.
    """
    check_name(backend)
    if backend != "auto":
        kernel = KERNELS[backend]
        if reason := kernel.unavailable() or kernel.refuses(q, k, v, score):
            raise NotImplementedError(f"backend {backend!r} cannot serve this call: {reason}; use backend='auto'")
        return Kernels(kernel if kernel.forward else None, kernel if kernel.dense else None)
    serving, refused = [], {}
    for name, kernel in KERNELS.items():
        reason = kernel.unavailable() or kernel.refuses(q, k, v, score)
        if reason is None:
            serving.append(kernel)
        else:
            refused[name] = reason
    interval = next(kernel for kernel in serving if kernel.forward)
    faster = serving[: serving.index(interval) + 1]
    chosen = Kernels(interval, next((kernel for kernel in faster if kernel.dense), None))
    fused = FOR_ANY_MASK.get(target().platform)
    if fused in refused:
        _warn(fused, refused[fused], interval.name, None if chosen.dense is None else chosen.dense.name)
    _say(chosen, tuple(refused.items()), q.shape, k.shape, str(q.dtype))
    return chosen


@functools.cache  # once for each reason
def _warn(fused: str, reason: str, interval: str, dense: str | None) -> None:
    where = "attention" if dense in (None, interval) else f"attention that {dense!r} cannot serve (not full or causal)"
    logger.warning("%s falls back from %r to the slower %r: %s", where, fused, interval, reason)


@functools.cache  # once for each kind of call, not once for each layer
def _say(chosen: Kernels, refused: tuple, q_shape: tuple, k_shape: tuple, dtype: str) -> None:
    dense = f"{chosen.dense.name!r} for full and causal hops, " if chosen.either else ""
    why = "; ".join(f"not {other}: {reason}" for other, reason in refused) or "the fastest here"
    name = chosen.interval.name
    logger.debug("attention backend %s%r for q %s, k %s, %s (%s)", dense, name, q_shape, k_shape, dtype, why)
