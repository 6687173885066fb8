"""One step of the image tokenizer, in one compiled program: both networks, the codebook, and the moving average.

    params      model, average (what is evaluated and written), discriminator
    optimizer   moments of both networks, averages of the codebook, when each code was used
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt8

from ringjax.models.vqgan import VQGAN, CodebookAverages, update_codebook
from ringjax.training.image_tokenizer.augment import augment
from ringjax.training.image_tokenizer.config import TokenizerStage
from ringjax.training.image_tokenizer.discriminator import PatchDiscriminator
from ringjax.training.image_tokenizer.losses import (
    adaptive_weight,
    discriminator_hinge,
    generator_hinge,
    reconstruction_loss,
)
from ringjax.training.image_tokenizer.perceptual import Features, perceptual_distance
from ringjax.training.image_tokenizer.quality import RADIUS, psnr, ssim
from ringjax.training.optimizer import learning_rate, make_optimizer
from ringjax.training.task import Metrics, TrainState

Pictures = UInt8[Array, "B H W C"]
BATCH = PartitionSpec(("dp", "fsdp"))
"""Pictures lie over these axes; every device holds the whole model."""


class Quality(NamedTuple):
    """What evaluation needs of each picture."""

    psnr: Float[Array, "B"]
    ssim: Float[Array, "B"]
    """NaN for pictures smaller than its window."""
    codes: Int[Array, "B h w"]
    shown: Pictures


class CodeUse(NamedTuple):
    """When each code was last used, and a moving count of how often."""

    last: Int[Array, "N"]
    counts: Float[Array, "N"]


class TokenizerTrainer(NamedTuple):
    """The compiled functions of the stage. `step` and `evaluate` take the VGG features as the last argument."""

    graph: Any
    abstract: TrainState
    init: Callable[[int], TrainState]
    fresh_optimizer: Callable[[Any], Any]
    step: Callable[[TrainState, Pictures], tuple[TrainState, Metrics]]
    evaluate: Callable[[Any, Pictures], Quality]


@functools.lru_cache(maxsize=4)  # a run that goes on in the same process compiles nothing again
def compile_trainer(stage: TokenizerStage, mesh: Mesh, seed: int, start: int) -> TokenizerTrainer:
    """The functions of a stage that begins at step `start` of the run; `step` still wants the features.

    Which files the pictures come from makes no other program: give `stage` with `data.variations()`.
    """
    parts = _Parts(stage, seed, start)
    everywhere = NamedSharding(mesh, PartitionSpec())
    abstract = jax.eval_shape(parts.init, 0)
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)  # noqa: E731
    donate = () if stage.training.debug_nans else (0,)
    return TokenizerTrainer(
        graph=nnx.graphdef(VQGAN.abstract(stage.vqgan)),
        abstract=jax.tree.map(place, abstract),
        init=jax.jit(parts.init, out_shardings=everywhere),
        fresh_optimizer=jax.jit(parts.fresh_optimizer, out_shardings=everywhere),
        step=jax.jit(parts.step, donate_argnums=donate, out_shardings=(everywhere, everywhere)),
        evaluate=jax.jit(parts.evaluate, out_shardings=everywhere),
    )


class Played(NamedTuple):
    """What one round with the discriminator gives."""

    gradient: Float[Array, "B H W C"]
    """For the reconstruction's pixels, weighted."""
    discriminator: Any
    moments: Any
    metrics: Metrics


class _Parts:
    """The functions of a step, each readable for itself."""

    def __init__(self, stage: TokenizerStage, seed: int, start: int):
        self.stage, self.seed, self.start = stage, seed, start
        self.optimizer = make_optimizer(stage.optimizer)
        self.dtype = jnp.dtype(stage.training.dtype)
        self.graph = nnx.graphdef(VQGAN.abstract(stage.vqgan, self.dtype))
        self.exact_graph = nnx.graphdef(VQGAN.abstract(stage.vqgan))
        self.plays = stage.losses.adversarial > 0
        if self.plays:
            self.judge = nnx.graphdef(nnx.eval_shape(lambda: self._discriminator(nnx.Rngs(0))))

    def _discriminator(self, rngs: nnx.Rngs) -> PatchDiscriminator:
        losses = self.stage.losses
        width, layers = losses.discriminator_width, losses.discriminator_layers
        return PatchDiscriminator(self.stage.vqgan.channels, width, layers, rngs, self.dtype)

    # ------------------------------------------------------------------ state

    def init(self, seed) -> TrainState:
        keys = jax.random.split(jax.random.key(seed))
        model = nnx.state(VQGAN(self.stage.vqgan, nnx.Rngs(params=keys[0]), self.dtype))
        judge = nnx.state(self._discriminator(nnx.Rngs(params=keys[1]))) if self.plays else {}
        params = {"model": model, "average": jax.tree.map(jnp.copy, model), "discriminator": judge}
        return TrainState(jnp.zeros((), jnp.int32), params, self.fresh_optimizer(params))

    def fresh_optimizer(self, params: Any) -> Any:
        codes = self.stage.vqgan.codes
        fresh = {
            "model": self.optimizer.init(params["model"]),
            "discriminator": self.optimizer.init(params["discriminator"]) if self.plays else (),
            "use": CodeUse(jnp.full(codes, -(2**30), jnp.int32), jnp.zeros(codes, jnp.float32)),
            "codebook": (),
        }
        if self.stage.codebook.method == "ema":
            fresh["codebook"] = CodebookAverages.start(params["model"]["codebook"].get_value())
        return fresh

    # ------------------------------------------------------------------ step

    def step(self, state: TrainState, pictures: Pictures, features: Features | None) -> tuple[TrainState, Metrics]:
        """A step on pictures `[B, H, W, C]`; `features` are the weights of the perceptual loss."""
        params, moments = state.params, state.optimizer
        augment_key, code_key = jax.random.split(jax.random.fold_in(jax.random.key(self.seed), state.step))
        real = self.pixels(augment_key, pictures)
        rate = learning_rate(self.stage.optimizer, state.step - self.start, self.stage.training.steps)
        (fake, commitment), back, (out, codebook_loss) = jax.vjp(
            functools.partial(self.reconstruct, real), params["model"], has_aux=True
        )
        compare = functools.partial(self.compare, real, features)
        (loss, parts), gradient = jax.value_and_grad(compare, has_aux=True)(fake)
        played = self.play(state, real, fake, out.features, gradient, rate)
        (grads,) = back((gradient + played.gradient, jnp.ones_like(commitment)))
        model, model_moments = self.descend(params["model"], grads, moments["model"], rate)
        model, averages = self.move_codes(model, moments["codebook"], out.latents, out.codes, code_key)
        use, use_metrics = self.note_use(moments["use"], out.codes, state.step)
        average = self.average(params["average"], model, state.step - self.start)
        # The loss that is watched is that of the pictures alone: it means the same with every codebook, early and late.
        metrics = {
            "loss": loss, **parts, **played.metrics, "commitment_loss": out.commitment_loss,
            "codebook_loss": codebook_loss, **use_metrics, "grad_norm": optax.tree.norm(grads), "learning_rate": rate,
        }  # fmt: skip
        params = {"model": model, "average": average, "discriminator": played.discriminator}
        moments = {"model": model_moments, "discriminator": played.moments, "use": use, "codebook": averages}
        return TrainState(state.step + 1, params, moments), metrics

    def pixels(self, key, pictures: Pictures) -> Float[Array, "B H W C"]:
        data = self.stage.data
        with jax.named_scope("augment"):
            return augment(
                key, _to_pixels(pictures), background(data.background, self.stage.vqgan.channels), flip=data.flip,
                shift=data.shift, scale=data.scale,
            )  # fmt: skip

    def reconstruct(self, real, model):
        """What is differentiated, and beside it what is only looked at."""
        out = nnx.merge(self.graph, model)(real)
        weighted = self.stage.codebook.commitment * out.commitment_loss
        if self.stage.codebook.method == "plain":
            weighted = weighted + out.codebook_loss
        return (out.pixels, weighted), (out, out.codebook_loss)

    def compare(self, real, features: Features | None, fake) -> tuple[Float[Array, ""], Metrics]:
        """The losses without an opponent, as a function of the reconstruction."""
        losses = self.stage.losses
        loss = reconstruction_loss(fake, real, losses.reconstruction)
        parts = {"reconstruction_loss": loss}
        if features is not None:
            far = perceptual_distance(features, fake, real, losses.perceptual_layers)
            loss, parts["perceptual_loss"] = loss + losses.perceptual * far, far
        return loss, parts

    def play(self, state: TrainState, real, fake, features, gradient, rate) -> Played:
        """The round with the discriminator, from `adversarial_start` on."""
        judge, moments = state.params["discriminator"], state.optimizer["discriminator"]
        if not self.plays:
            return Played(jnp.zeros_like(fake), judge, moments, {})
        names = ("adversarial_loss", "discriminator_loss", "adversarial_weight")
        still = lambda: Played(jnp.zeros_like(fake), judge, moments, dict.fromkeys(names, jnp.float32(0)))  # noqa: E731
        kernel = state.params["model"]["decoder"]["conv_out"]["kernel"].get_value()
        round_ = functools.partial(self.round, judge, moments, real, fake, features, kernel, gradient, rate)
        return jax.lax.cond(state.step - self.start >= self.stage.losses.adversarial_start, round_, still)

    def round(self, judge, moments, real, fake, features, kernel, gradient, rate) -> Played:
        losses = self.stage.losses
        score = lambda judge, x: nnx.merge(self.judge, judge)(x)  # noqa: E731
        adversarial, push = jax.value_and_grad(lambda x: generator_hinge(score(judge, x)))(fake)
        weight = jnp.float32(losses.adversarial)
        if losses.adaptive:
            weight = weight * adaptive_weight(features, kernel, gradient, push)
        hinge, grads = jax.value_and_grad(lambda j: discriminator_hinge(score(j, real), score(j, fake)))(judge)
        judge, moments = self.descend(judge, grads, moments, rate)
        metrics = {"adversarial_loss": adversarial, "discriminator_loss": hinge, "adversarial_weight": weight}
        return Played(weight * push, judge, moments, metrics)

    def descend(self, params, grads, moments, rate):
        with jax.named_scope("optimizer"):
            direction, moments = self.optimizer.update(grads, moments, params)
            return jax.tree.map(lambda w, d: (w - rate * d).astype(w.dtype), params, direction), moments

    def move_codes(self, model, averages, latents, codes, key):
        config = self.stage.codebook
        if config.method != "ema":
            return model, averages
        with jax.named_scope("codebook"):
            averages, codebook = update_codebook(
                averages, latents.reshape(-1, latents.shape[-1]), codes.reshape(-1), key, decay=config.decay,
                dead_share=config.dead_share,
            )  # fmt: skip
        model["codebook"] = model["codebook"].replace(codebook)
        return model, averages

    def note_use(self, use: CodeUse, codes, step) -> tuple[CodeUse, Metrics]:
        """Share of the codes used in the last `usage_steps` steps, and the perplexity of a moving count."""
        window = self.stage.training.usage_steps
        now = jnp.zeros_like(use.counts).at[codes.reshape(-1)].add(1.0)
        use = CodeUse(jnp.where(now > 0, step, use.last), (1 - 1 / window) * use.counts + now)
        share = use.counts / jnp.sum(use.counts)
        perplexity = jnp.exp(-jnp.sum(jax.scipy.special.xlogy(share, share)))
        return use, {"usage": jnp.mean(step - use.last < window, dtype=jnp.float32), "perplexity": perplexity}

    def average(self, average, model, done):
        """The moving average of the weights, shorter in the first steps, when there is little to average."""
        decay = jnp.minimum(self.stage.training.average_decay, (1 + done) / (10 + done))
        return jax.tree.map(lambda a, w: a + (1 - decay) * (w - a), average, model)

    # ------------------------------------------------------------------ evaluation

    def evaluate(self, average, pictures: Pictures) -> Quality:
        """Pictures through the averaged weights in float32, as the written file will do it."""
        model = nnx.merge(self.exact_graph, average)
        codes = model.encode(_to_pixels(pictures))
        shown = jnp.clip(jnp.round((model.decode(codes) + 1) * 127.5), 0, 255)
        small = self.stage.vqgan.resolution < 2 * RADIUS + 1
        similarity = jnp.full(len(pictures), jnp.nan) if small else ssim(shown, pictures)
        return Quality(psnr(shown, pictures), similarity, codes, shown.astype(jnp.uint8))


def _to_pixels(pictures: Pictures) -> Float[Array, "B H W C"]:
    return pictures.astype(jnp.float32) / 127.5 - 1


def background(name: str, channels: int) -> Float[Array, "C"]:
    """A colour as pixels in [−1, 1], of 1 channel its grey."""
    from PIL import ImageColor

    values = ImageColor.getcolor(name, "RGB" if channels == 3 else "L")
    return jnp.asarray(values, jnp.float32).reshape(channels) / 127.5 - 1
