"""One training step: the exact weighted loss of a whole batch, its gradient, and AdamW, in one compiled program."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from ringjax.attention import Reach
from ringjax.models.config import ModelConfig
from ringjax.models.dropout import Dropout
from ringjax.models.lora import LoraConfig, new_trained, split_trained
from ringjax.models.lora import abstract as adapted_abstract
from ringjax.models.parallel import Parallel
from ringjax.models.transformer import Transformer
from ringjax.training.config import OptimizerConfig
from ringjax.training.loss import LossSums, cross_entropy
from ringjax.training.optimizer import learning_rate, make_optimizer
from ringjax.training.task import Metrics, TrainState

Batch = dict[str, Array]


class Trainer(NamedTuple):
    """The compiled functions of a stage and the shardings of its state."""

    graph: Any
    abstract: TrainState
    base: Any
    """The parameters of the model without adapters, abstract."""
    init: Callable[[int], TrainState]
    begin: Callable[[Any, int], TrainState]
    """From such parameters, and the seed of the adapters."""
    fresh_optimizer: Callable[[Any], Any]
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    evaluate: Callable[[Any, Batch], LossSums]


@functools.lru_cache(maxsize=8)  # a run that goes on in the same process (a notebook) compiles nothing again
def make_trainer(
    model: ModelConfig,
    config: OptimizerConfig,
    parallel: Parallel,
    *,
    steps: int,
    start: int,
    donate: bool = True,
    lora: LoraConfig | None = None,
    seed: int = 0,
) -> Trainer:
    """The functions of a stage of `steps` steps that begins at step `start` of the run.

    `abstract` holds shapes, dtypes and shardings of the whole state: what a checkpoint is restored to. `donate`: a step
    overwrites the state it is given. With `lora` only adapters (and what it trains beside them) have gradients and
    moments; they are float32, the frozen parameters of the model's type. `seed`: of what `dropout` drops.
    """
    optimizer = make_optimizer(config)
    plain = Transformer.abstract(model)
    graph = nnx.graphdef(plain if lora is None else adapted_abstract(model, lora))

    def init(seed) -> TrainState:
        params, frozen = nnx.state(Transformer(model, nnx.Rngs(params=jax.random.key(seed)))), None
        if lora is not None:
            kept, frozen = split_trained(params, lora)
            params = new_trained(model, lora, dict(nnx.to_flat_state(kept)), seed)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), frozen)

    def begin(params, seed: int) -> TrainState:
        step, frozen = jax.device_put(np.int32(0), shardings.step), None
        if lora is not None:
            kept, frozen = split_trained(params, lora)
            params = trained(dict(nnx.to_flat_state(kept)), seed)
        return TrainState(step, params, fresh_optimizer(params), frozen)

    abstract = jax.eval_shape(init, 0)
    shardings = parallel.param_shardings(abstract)
    everywhere = jax.sharding.NamedSharding(parallel.mesh, jax.sharding.PartitionSpec())

    trained = jax.jit(functools.partial(new_trained, model, lora), out_shardings=shardings.params)
    fresh_optimizer = jax.jit(optimizer.init, out_shardings=shardings.optimizer)

    whole_attention = dataclasses.replace(model, shifted_group=None)
    full = Transformer.abstract(whole_attention) if lora is None else adapted_abstract(whole_attention, lora)
    full_graph = nnx.graphdef(full)

    def loss_sums(whole, batch: Batch, graph=graph, dropout=None) -> tuple[Float[Array, ""], LossSums]:
        sums = batch_loss(nnx.merge(graph, whole), batch, parallel, model.loss_chunk, dropout)
        return sums.text_loss_sum + sums.vision_loss_sum, sums

    def drops(step, micro: Batch) -> Dropout | None:
        if not model.dropout:
            return None
        key = jax.random.fold_in(jax.random.key(seed), step)
        return Dropout.of(model.dropout, key, micro["first_row"], *micro["tokens"].shape, parallel)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        def loss(params, micro: Batch):
            return loss_sums(state._replace(params=params).whole, micro, dropout=drops(state.step, micro))

        gradient = jax.grad(loss, has_aux=True)
        if model.dropout:
            micros, rows, _ = batch["tokens"].shape
            batch = {**batch, "first_row": rows * jnp.arange(micros, dtype=jnp.int32)}
        grads, sums = accumulate(gradient, state.params, batch, shardings.params)
        weight = jnp.maximum(sums.weight, jnp.finfo(jnp.float32).tiny)
        grads = jax.tree.map(lambda g: g / weight, grads)
        with jax.named_scope("optimizer"):
            rate = learning_rate(config, state.step - start, steps)
            direction, opt_state = optimizer.update(grads, state.optimizer, state.params)
            params = jax.tree.map(lambda w, d: (w - rate * d).astype(w.dtype), state.params, direction)
        metrics = {**loss_metrics(sums), "grad_norm": optax.tree.norm(grads), "learning_rate": rate}
        return TrainState(state.step + 1, params, opt_state, state.frozen), metrics

    def evaluate(whole, batch: Batch) -> LossSums:
        return jax.lax.map(lambda micro: loss_sums(whole, micro, full_graph)[1], batch)

    return Trainer(
        graph=graph,
        abstract=_placed(abstract, shardings),
        base=_placed(nnx.state(plain), parallel.param_shardings(nnx.state(plain))),
        init=jax.jit(init, out_shardings=shardings),
        begin=begin,
        fresh_optimizer=fresh_optimizer,
        step=jax.jit(step, donate_argnums=(0,) if donate else (), out_shardings=(shardings, everywhere)),
        evaluate=jax.jit(evaluate, out_shardings=everywhere),
    )


def _placed(abstract: Any, shardings: Any) -> Any:
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(place, abstract, shardings)


def batch_loss(
    model: Transformer, batch: Batch, parallel: Parallel, chunk: int, dropout: Dropout | None = None
) -> LossSums:
    """Sums of weighted losses and of weights of one micro-batch `[B, T]`, by modality."""
    reach = Reach(batch["behind"], batch["ahead"])
    hidden = model.hidden(
        batch["tokens"], batch["modality"], batch["positions"], reach, parallel=parallel, dropout=dropout
    )
    return cross_entropy(model, hidden, batch, parallel=parallel, chunk=chunk)


def accumulate(gradient: Callable, params: Any, batch: Batch, shardings: Any) -> tuple[Any, LossSums]:
    """Sums over the micro-batches `[A, B, T]` of what `gradient` gives for each `[B, T]`.

    Sums of weighted losses are added, and divided once by the weight of the whole batch: a mean of means would weigh
    tokens by the micro-batch they happen to be in.
    """

    def one(micro: Batch):
        grads, sums = gradient(params, micro)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        # Gradients are summed where their parameters lie: a reduce-scatter, not an all-reduce, over fsdp.
        return jax.lax.with_sharding_constraint(grads, shardings), sums

    if batch["tokens"].shape[0] == 1:
        return one(jax.tree.map(lambda x: x[0], batch))
    shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], batch))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(lambda carry, micro: (jax.tree.map(jnp.add, carry, one(micro)), None), zeros, batch)
    return total


def loss_metrics(sums: LossSums) -> Metrics:
    """Mean losses, over all tokens and by modality, and what the modalities weigh: `readable` needs that."""
    return {
        "loss": sums.loss,
        "text_loss": sums.text_loss,
        "vision_loss": sums.vision_loss,
        "text_weight": sums.text_weight,
        "vision_weight": sums.vision_weight,
    }


def readable(metrics: dict[str, float]) -> dict[str, float | None]:
    """Metrics for people: without the weights, the loss of a modality that has no token being None."""
    found = dict(metrics)
    for modality in ("text", "vision"):
        if found.pop(f"{modality}_weight") == 0:
            found[f"{modality}_loss"] = None
    return found
