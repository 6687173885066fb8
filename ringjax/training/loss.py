"""Cross-entropy over two vocabularies without ever holding the logits of more than a few tokens.

    loss = Σ w_i · nll_i / Σ w_i        over all tokens of the global batch, text and vision together
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from ringjax.models.parallel import Parallel
from ringjax.models.transformer import Transformer

_AXES = ("embed", "vocab")


class LossSums(NamedTuple):
    """Weighted sums over a global batch, float32; they add over batches."""

    text_loss_sum: Float[Array, ""]
    text_weight: Float[Array, ""]
    vision_loss_sum: Float[Array, ""]
    vision_weight: Float[Array, ""]

    @property
    def loss(self) -> Float[Array, ""]:
        """`Σ w·nll / Σ w` over both modalities; 0 where nothing has weight."""
        return _mean(self.text_loss_sum + self.vision_loss_sum, self.text_weight + self.vision_weight)

    @property
    def text_loss(self) -> Float[Array, ""]:
        """The same over text targets."""
        return _mean(self.text_loss_sum, self.text_weight)

    @property
    def vision_loss(self) -> Float[Array, ""]:
        """The same over vision targets."""
        return _mean(self.vision_loss_sum, self.vision_weight)

    @property
    def weight(self) -> Float[Array, ""]:
        """`Σ w` over both modalities."""
        return self.text_weight + self.vision_weight

    def plus(self, other: "LossSums") -> "LossSums":
        """The sums over two batches."""
        return LossSums(*(a + b for a, b in zip(self, other)))


def cross_entropy(
    model: Transformer,
    hidden: Float[Array, "B T D"],
    batch: Mapping[str, Array],
    *,
    parallel: Parallel,
    chunk: int | None = None,
) -> LossSums:
    """The loss of `hidden` against the batch's `targets`, `target_modality` and `loss_weights`, all `[B, T]`.

    `chunk` tokens of a device have logits at a time (None: the model's `loss_chunk`). The sums can be differentiated
    with respect to the model's parameters and `hidden`, not the weights.
    """
    heads = (model.head_kernel("text"), None if model.vte is None else model.head_kernel("vision"))
    targets, vision, weights = (jnp.asarray(batch[name]) for name in ("targets", "target_modality", "loss_weights"))
    weights = lax.stop_gradient(weights.astype(jnp.float32))
    chunk = model.config.loss_chunk if chunk is None else chunk
    nll = token_nll(heads, hidden, targets, vision, weights != 0, parallel=parallel, chunk=chunk)
    return LossSums(
        text_loss_sum=jnp.sum(nll * weights, where=~vision),
        text_weight=jnp.sum(weights, where=~vision),
        vision_loss_sum=jnp.sum(nll * weights, where=vision),
        vision_weight=jnp.sum(weights, where=vision),
    )


def token_nll(
    heads: tuple[Float[Array, "D V"], Float[Array, "D W"] | None],
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    vision: Bool[Array, "B T"],
    active: Bool[Array, "B T"],
    *,
    parallel: Parallel,
    chunk: int,
) -> Float[Array, "B T"]:
    """`logsumexp(h · W) − (h · W)[target]` of each token under the head of its target, float32; 0 where not `active`.

    Each device sorts its tokens by head and computes, for each head, only the chunks that hold one of its tokens. The
    vocabulary may be cut over tp. The backward pass makes the logits again, chunk by chunk. An active target outside
    its vocabulary gives NaN: better a run that stops than one that learns nonsense.
    """
    if chunk < 1:
        raise ValueError(f"chunk {chunk} must be at least 1: it is the number of tokens whose logits exist at a time")
    if heads[1] is None:
        heads, vision = heads[:1], jnp.zeros_like(vision)
    head_of = jnp.where(active, vision.astype(jnp.int32), len(heads))
    sizes = jnp.asarray([*(kernel.shape[1] for kernel in heads), jnp.iinfo(jnp.int32).max])[head_of]
    impossible = active & ((targets < 0) | (targets >= sizes))
    return jnp.where(impossible, jnp.nan, _nll(heads, hidden, targets, head_of, chunk, parallel))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _nll(heads, hidden, targets, head_of, chunk: int, parallel: Parallel):
    return _nll_forward(heads, hidden, targets, head_of, chunk, parallel)[0]


def _nll_forward(heads, hidden, targets, head_of, chunk: int, parallel: Parallel):
    head_specs, stream, rows = _specs(heads, hidden, parallel)

    def local(heads, hidden, targets, head_of):
        tokens = _Tokens.of(hidden, targets, head_of, len(heads), chunk)
        dtype = _wide(hidden.dtype)
        lse, hit = jnp.full(tokens.count, -jnp.inf, dtype), jnp.zeros(tokens.count, dtype)
        for head, (kernel, spec) in enumerate(zip(heads, head_specs)):
            kernel = parallel.gather_weight(kernel, spec, hidden.dtype)
            lse, hit = _score_tokens(tokens, head, kernel, (lse, hit), parallel)
        lse, hit = _lse_over_tp(lse, parallel), parallel.sum_over(hit, "tp")
        nll = jnp.where(tokens.head_of < len(heads), lse - hit, 0.0)
        return nll.reshape(head_of.shape), lse.reshape(head_of.shape)

    call = parallel.local(local, (head_specs, stream, rows, rows), (rows, rows))
    nll, lse = call(heads, hidden, targets, head_of)
    return nll, (heads, hidden, targets, head_of, lse)


def _nll_backward(chunk: int, parallel: Parallel, residuals, dnll):
    heads, hidden, targets, head_of, lse = residuals
    head_specs, stream, rows = _specs(heads, hidden, parallel)

    def local(heads, hidden, targets, head_of, lse, dnll):
        tokens = _Tokens.of(hidden, targets, head_of, len(heads), chunk)
        dhidden, dheads = jnp.zeros(tokens.hidden.shape, _wide(hidden.dtype)), []
        for head, (kernel, spec) in enumerate(zip(heads, head_specs)):
            kernel = parallel.gather_weight(kernel, spec, hidden.dtype)
            dhidden, dkernel = _token_gradients(tokens, head, kernel, lse.ravel(), dnll.ravel(), dhidden, parallel)
            dheads.append(parallel.reduce_weight(dkernel, spec))
        return tuple(dheads), parallel.sum_over(dhidden, "tp").reshape(hidden.shape).astype(hidden.dtype)

    call = parallel.local(local, (head_specs, stream, rows, rows, rows, rows), (head_specs, stream))
    dheads, dhidden = call(heads, hidden, targets, head_of, lse, dnll)
    return tuple(d.astype(w.dtype) for d, w in zip(dheads, heads)), dhidden, None, None


_nll.defvjp(_nll_forward, _nll_backward)


class _Tokens(NamedTuple):
    """The tokens of a device, flat, and the order in which every head's are next to each other.

        order | text targets … | vision targets … | the rest (no loss) | padding to whole chunks
                ^ starts[0]      ^ starts[1]        ^ starts[2]
    """

    hidden: Float[Array, "n D"]
    targets: Int[Array, " n"]
    head_of: Int[Array, " n"]
    order: Int[Array, " padded"]
    starts: Int[Array, " heads_and_end"]
    chunk: int

    @classmethod
    def of(cls, hidden, targets, head_of, heads: int, chunk: int) -> "_Tokens":
        hidden, targets = jnp.asarray(hidden), jnp.asarray(targets)
        flat = head_of.ravel()
        count = flat.shape[0]
        chunk = min(chunk, count)
        padding = jnp.full((-count % chunk,), count, jnp.int32)
        order = jnp.concatenate([jnp.argsort(flat, stable=True).astype(jnp.int32), padding])
        starts = jnp.stack([jnp.sum(flat < head, dtype=jnp.int32) for head in range(heads + 1)])
        return cls(hidden.reshape(count, -1), targets.ravel(), flat, order, starts, chunk)

    @property
    def count(self) -> int:
        return self.head_of.shape[0]

    def chunks(self, head: int):
        """First and last + 1 of the chunks that hold a token of `head`; the same where there is none."""
        start, stop = self.starts[head], self.starts[head + 1]
        first = start // self.chunk
        return first, jnp.where(stop > start, -(-stop // self.chunk), first)

    def rows(self, index, head: int) -> Int[Array, " chunk"]:
        """The tokens of chunk `index`, with an index out of range in place of those of another head."""
        rows = lax.dynamic_slice_in_dim(self.order, index * self.chunk, self.chunk)
        here = self.head_of.at[rows].get(mode="fill", fill_value=-1) == head
        return jnp.where(here, rows, self.count)


def _logits(tokens: _Tokens, rows, kernel, parallel: Parallel):
    """The rows' hidden states, their logits over this device's part of the vocabulary, and where their targets are."""
    hidden = tokens.hidden.at[rows].get(mode="fill", fill_value=0)
    logits = jnp.einsum("td,dv->tv", hidden, kernel, preferred_element_type=_wide(hidden.dtype))
    size = kernel.shape[1]
    first = lax.axis_index("tp") * size if parallel.present("tp") else 0
    target = tokens.targets.at[rows].get(mode="fill", fill_value=-1) - first
    return hidden, logits, jnp.where((target >= 0) & (target < size), target, size)


def _score_tokens(tokens: _Tokens, head: int, kernel, scores, parallel: Parallel):
    """Writes the lse and the target's logit of every token of `head`, over this device's vocabulary, into `scores`."""

    def body(index, scores):
        lse, hit = scores
        rows = tokens.rows(index, head)
        _, logits, target = _logits(tokens, rows, kernel, parallel)
        hits = jnp.take_along_axis(logits, target[:, None], axis=1, mode="fill", fill_value=0)[:, 0]
        lse = lse.at[rows].set(jax.nn.logsumexp(logits, axis=1), mode="drop")
        return lse, hit.at[rows].set(hits, mode="drop")

    with jax.named_scope("loss"):
        return lax.fori_loop(*tokens.chunks(head), body, scores)


def _token_gradients(tokens: _Tokens, head: int, kernel, lse, dnll, dhidden, parallel: Parallel):
    """`dlogits = (softmax − onehot(target)) · dnll`, and what follows from it for the hidden states and the kernel."""

    def body(index, gradients):
        dhidden, dkernel = gradients
        rows = tokens.rows(index, head)
        hidden, logits, target = _logits(tokens, rows, kernel, parallel)
        scale = dnll.at[rows].get(mode="fill", fill_value=0)[:, None]
        softmax = jnp.exp(logits - lse.at[rows].get(mode="fill", fill_value=jnp.inf)[:, None])
        onehot = target[:, None] == jnp.arange(kernel.shape[1])
        dlogits = ((softmax - onehot) * scale).astype(hidden.dtype)
        wide = dict(preferred_element_type=dhidden.dtype)
        dhidden = dhidden.at[rows].set(jnp.einsum("tv,dv->td", dlogits, kernel, **wide), mode="drop")
        return dhidden, dkernel + jnp.einsum("td,tv->dv", hidden, dlogits, **wide)

    with jax.named_scope("loss"):
        return lax.fori_loop(*tokens.chunks(head), body, (dhidden, jnp.zeros(kernel.shape, dhidden.dtype)))


def _lse_over_tp(lse, parallel: Parallel):
    """The lse over the whole vocabulary from those over its parts."""
    if parallel.size("tp") == 1:
        return lse
    most = lax.stop_gradient(lax.pmax(lse, "tp"))
    safe = jnp.where(jnp.isfinite(most), most, 0.0)
    return safe + jnp.log(parallel.sum_over(jnp.exp(lse - safe), "tp"))


def _specs(heads, hidden, parallel: Parallel) -> tuple[tuple[P, ...], P, P]:
    stream = parallel.spec_for(hidden.shape, "batch", "sequence", None)
    return tuple(parallel.param_spec(kernel.shape, _AXES) for kernel in heads), stream, P(*stream[:2])


def _wide(dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def _mean(total, weight):
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1.0), 0.0)
