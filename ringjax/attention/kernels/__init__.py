"""One file a backend, behind the contract of `base`."""

import difflib
import functools
import logging

from ringjax.attention.kernels import reference, xla
from ringjax.attention.kernels.base import Kernel

logger = logging.getLogger(__name__)

KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (xla.KERNEL, reference.KERNEL)}


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


def choose(backend: str, q, k, v) -> Kernel:
    """The kernel for these inputs: the named one, or with 'auto' the first of `KERNELS` that serves them.

    Raises ValueError for an unknown name and NotImplementedError, with the reason, where a named backend
    cannot serve the call. What 'auto' chose, and why not an earlier one, is logged at level DEBUG.
    """
    check_name(backend)
    if backend != "auto":
        kernel = KERNELS[backend]
        if reason := kernel.unavailable() or kernel.refuses(q, k, v):
            raise NotImplementedError(f"backend {backend!r} cannot serve this call: {reason}; use backend='auto'")
        return kernel
    refused = {}
    for name, kernel in KERNELS.items():
        reason = kernel.unavailable() or kernel.refuses(q, k, v)
        if reason is None:
            _say(name, tuple(refused.items()), q.shape, k.shape, str(q.dtype))
            return kernel
        refused[name] = reason
    raise NotImplementedError(f"no backend serves q {q.shape} {q.dtype}: {refused}")


@functools.cache  # once for each kind of call, not once for each layer
def _say(name: str, refused: tuple, q_shape: tuple, k_shape: tuple, dtype: str) -> None:
    why = "; ".join(f"not {other}: {reason}" for other, reason in refused) or "the fastest here"
    logger.debug("attention backend %r for q %s, k %s, %s (%s)", name, q_shape, k_shape, dtype, why)
