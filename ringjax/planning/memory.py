"""Bytes on each device at the fullest moment of a training step, by what they are for.

    always there            parameters, optimizer (two moments), the batch
    backward, first block   + gradients + what all blocks have kept + the block's own work
    loss                    + what all blocks have kept + logits, heads and their gradients

The total is the first line and the larger of the other two. What is stored follows from shapes and from the table of
logical axes (`ringjax.models.parallel`); what a block works with, XLA decides: `WORK` counts it in arrays, as found in
compiled programs (docs/results/planning.md says how near that comes).
"""

import dataclasses
import functools
import math

import jax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from ringjax.models.config import ModelConfig
from ringjax.models.parallel import Parallel
from ringjax.models.transformer import Transformer
from ringjax.training.config import StageConfig
from ringjax.training.mesh import AXES

FLOAT32 = 4
# tokens, targets, positions, behind, ahead, loss weights: 4 bytes each; two modalities: 1 each.
BATCH_BYTES = 6 * 4 + 2


@dataclasses.dataclass(frozen=True)
class Work:
    """Arrays that exist at once while a block's backward pass attends, or goes through the feed-forward.

    `stream` are of width D, `queries` of N·H, `keys` of K·H, `inner` of F; `…_wide` are float32 whatever the model's
    type is. `ring` counts those of `keys` (own, visiting, arriving) and `ring_wide` their gradients (sums, arriving,
    the hop's own) that only a ring has. `inner_late` are of those of the feed-forward that stay while attention runs
    (none with `ffn_chunk`), `weights` bytes a parameter of the block: gathered, and its gradient before the scatter.
    """

    stream: float
    queries: float
    keys: float
    queries_wide: float
    ring: float
    ring_wide: float
    feed_stream: float
    inner: float
    inner_late: float
    weights: float


WORK = {
    # Splash takes heads first and returns float32.
    "tpu": Work(
        stream=2,
        queries=4,
        keys=2,
        queries_wide=5,
        ring=4,
        ring_wide=4,
        feed_stream=8,
        inner=7,
        inner_late=3,
        weights=5,
    ),
    "gpu": Work(
        stream=4,
        queries=5,
        keys=4,
        queries_wide=0,
        ring=4,
        ring_wide=4,
        feed_stream=8,
        inner=7,
        inner_late=0,
        weights=0,
    ),
}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device. `kv` is K and V on their way and the sums of their gradients; `work` the rest of a block."""

    parameters: float
    optimizer: float
    batch: float
    gradients: float
    kept: float
    kv: float
    work: float
    logits: float
    host: float = 0.0

    @property
    def total(self) -> float:
        """Bytes of device memory at the fullest moment."""
        state = self.parameters + self.optimizer + self.batch
        return state + self.kept + max(self.gradients + self.kv + self.work, self.logits)

    def parts(self) -> dict[str, float]:
        """What the total consists of, by kind; the logits only where their moment is the fullest."""
        always = dict(parameters=self.parameters, optimizer=self.optimizer, batch=self.batch, kept=self.kept)
        if self.logits > self.gradients + self.kv + self.work:
            return {**always, "logits": self.logits}
        return {**always, "gradients": self.gradients, "K, V": self.kv, "work": self.work}


def of_stage(stage: StageConfig, sizes: tuple[int, int, int, int], platform: str) -> Memory:
    """The memory of a stage's step on a mesh of `sizes` dp, fsdp, tp, sp; `platform` is 'gpu' or 'tpu'."""
    model, training = stage.model, stage.training
    parallel = Parallel(AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES)))
    dp, fsdp, tp, sp = sizes
    rows = training.batch_size // training.accumulation // (dp * fsdp)
    tokens = rows * (training.seq_len // sp)
    count, count_bytes = _stored(model, parallel)
    kept = model.layers * tokens * kept_bytes(model, tp)
    # Two micro-batches' gradients: the sum so far and the one that is added.
    gradients = FLOAT32 * count * (2 if training.accumulation > 1 else 1)
    kv, work = _block(model, tokens, tp, sp, platform, stage.mesh.strategy, gathered=fsdp * sp > 1)
    offload = model.remat == "offload"
    return Memory(
        parameters=count_bytes,
        optimizer=2 * count_bytes,
        batch=BATCH_BYTES * tokens * training.accumulation,
        gradients=gradients,
        kept=0.0 if offload else kept,
        kv=kv,
        work=work,
        logits=_logits(model, tokens, tp, platform),
        host=kept if offload else 0.0,
    )


def kept_bytes(model: ModelConfig, tp: int = 1) -> float:
    """What a block keeps of each token for its backward pass on one device (`ringjax.models.remat` has the names).

    | remat | values kept, in the model's type |
    | --- | --- |
    | full | D: the block's input |
    | save_attention, offload | D + N·H, and N float32: attention's output and lse |
    | save_feed_forward | + D + 2·F: the stream after attention, gate and up (these not with `ffn_chunk`) |
    | save_products | + N·H + 2·K·H: q, k, v |
    | none | + 2·D + N·H + K·H + F: norms, q and k before RoPE, gated |

    Heads and F are cut over tp; D is not.
    """
    width, inner, heads = model.width, model.ffn_width / tp, model.heads / tp
    queries, keys = heads * model.head_size, max(model.key_heads / tp, 1) * model.head_size
    order = ["full", "save_attention", "save_feed_forward", "save_products", "none"]
    depth = order.index("save_attention" if model.remat == "offload" else model.remat)
    feed = width + (0 if model.ffn_chunk else 2 * inner)
    more = [width, queries, feed, queries + 2 * keys, 2 * width + queries + keys + (0 if model.ffn_chunk else inner)]
    lse = FLOAT32 * heads if depth else 0
    return sum(more[: depth + 1]) * model.compute_dtype.itemsize + lse


@functools.lru_cache(maxsize=64)
def _abstract(model: ModelConfig) -> tuple[tuple[tuple[int, ...], tuple[str | None, ...], int], ...]:
    """Shape, logical axes and item size of every parameter."""
    state = nnx.state(Transformer.abstract(model))
    leaves = jax.tree.leaves(state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return tuple(
        (leaf.get_value().shape, tuple(leaf.get_metadata()["axes"]), leaf.get_value().dtype.itemsize) for leaf in leaves
    )


def _stored(model: ModelConfig, parallel: Parallel) -> tuple[float, float]:
    """How many parameters one device stores, and their bytes."""
    # What no plan changes is left at its default, so that a search asks for the same shapes once.
    count = total = 0.0
    for shape, axes, itemsize in _abstract(_only_shapes(model)):
        pieces = 1
        for entry in parallel.param_spec(shape, axes):
            pieces *= parallel.size(*((entry,) if isinstance(entry, str) else entry or ()))
        count += math.prod(shape) / pieces
        total += math.prod(shape) / pieces * itemsize
    return count, total


def _only_shapes(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(
        model, remat="none", unroll=1, ffn_chunk=None, loss_chunk=1024, window=None, rope_theta=1e4, rope_scaling=None,
        dtype="bfloat16",
    )  # fmt: skip


def _block(model: ModelConfig, tokens: float, tp: int, sp: int, platform: str, strategy: str, gathered: bool):
    """Bytes of K and V, and of everything else, while a block's backward pass runs."""
    work, itemsize = WORK[platform], model.compute_dtype.itemsize
    queries = tokens * model.heads / tp * model.head_size
    keys = tokens * max(model.key_heads / tp, 1) * model.head_size
    own = work.keys * keys * itemsize
    if sp > 1 and strategy == "all_gather":
        ring = keys * sp * (2 * itemsize + 2 * FLOAT32)
    else:
        ring = keys * (work.ring * itemsize + work.ring_wide * FLOAT32) if sp > 1 else 0.0
    if sp > 1 and strategy == "two_level":  # the shard that a turn began with, the next one, and sums from afar
        ring += keys * (4 * itemsize + 2 * FLOAT32)
    attend = work.stream * tokens * model.width * itemsize
    attend += queries * (work.queries * itemsize + work.queries_wide * FLOAT32)
    if not model.ffn_chunk:
        attend += work.inner_late * tokens * model.ffn_width / tp * itemsize
    inner = min(tokens, model.ffn_chunk or tokens) * model.ffn_width / tp
    feed = (work.feed_stream * tokens * model.width + work.inner * inner) * itemsize
    block = 2 * model.width * (model.heads + model.key_heads) * model.head_size + 3 * model.width * model.ffn_width
    weights = block / tp * work.weights if gathered else 0.0
    kv = own + ring
    return kv, max(attend, feed - kv) + weights


def _logits(model: ModelConfig, tokens: float, tp: int, platform: str) -> float:
    """The loss: logits and their gradients for a chunk, heads, gathered, and theirs, hidden states and theirs.

    Compiled for TPUs, gradients take the logits' place (of the second head they do not), and those of the heads are
    made when the chunks are over: two moments, of which the larger counts.
    """
    itemsize, words = model.compute_dtype.itemsize, model.vocab_size + model.vision_vocab_size
    chunk, heads = min(model.loss_chunk, tokens) * FLOAT32 / tp, model.width * words / tp
    stream = tokens * model.width
    if platform == "tpu":
        chunk *= words + model.vision_vocab_size
        return max(chunk + heads * itemsize + stream * 2 * FLOAT32, heads * 2 * (itemsize + FLOAT32))
    chunk *= 3 * max(model.vocab_size, model.vision_vocab_size)
    return chunk + heads * (itemsize + FLOAT32) + stream * 2 * (itemsize + FLOAT32)
