"""The config of an image tokenizer's run: a file with a section `vqgan` where a transformer's has `model`.

    vqgan: {resolution: 128, hidden: 64, multipliers: [1, 2, 2, 4, 4], codes: 1024, code_dim: 16, z_channels: 64}
    data: {sources: [{path: data/images/captions.jsonl}, {path: data/videos/captions.jsonl}]}
    losses: {perceptual_weights: vgg16.safetensors, adversarial_start: 2000}
    codebook: {method: ema}
"""

import dataclasses
import math
from dataclasses import field
from typing import Literal

from ringjax.data.pictures import Fit
from ringjax.models.vqgan import VQGANConfig
from ringjax.training.config import CheckpointConfig, DistributedConfig, LoggingConfig, OptimizerConfig
from ringjax.training.image_tokenizer.discriminator import smallest_picture
from ringjax.training.mesh import check_shape

LAYERS = (
    "conv1_1", "conv1_2", "conv2_1", "conv2_2", "conv3_1", "conv3_2", "conv3_3", "conv4_1", "conv4_2", "conv4_3",
)  # fmt: skip
"""Convolutions of VGG16 that the perceptual loss may compare."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _within(name: str, value: float, least: float, most: float) -> None:
    _require(
        math.isfinite(value) and least <= value <= most, f"{name} is {value}; it must lie in {least:g} … {most:g}"
    )


@dataclasses.dataclass(frozen=True)
class PictureSource:
    """Pictures and clips that a captions.jsonl names."""

    path: str
    """A .jsonl file whose lines have `file` (relative to its folder) and `caption`; a clip is one picture a frame."""
    weight: float | None = None
    """How often its pictures are seen, relative to the other sources; null: each picture and frame equally often."""

    def __post_init__(self):
        _require(bool(self.path), "path is empty; name a captions.jsonl")
        _require(
            self.weight is None or 0 < self.weight < math.inf,
            f"weight {self.weight} of {self.path} must be positive; leave the source out instead of 0",
        )


@dataclasses.dataclass(frozen=True)
class PicturesConfig:
    """What is trained on, what is kept aside, and how pictures are varied."""

    sources: tuple[PictureSource, ...]
    """Where the pictures are."""
    heldout_share: float = 0.05
    """Share of the captions whose pictures are kept aside and evaluated on; equal captions are on one side."""
    keep: Literal["memory", "stream"] = "memory"
    """Decode all pictures once at the start, or each one when it is used."""
    memory_gb: float = 8.0
    """The most that decoded pictures may take."""
    fit: Fit = "crop"
    """How other shapes become squares: `crop` the middle, or `pad` with the background."""
    background: str = "white"
    """What lies behind transparency and around what was moved."""
    on_error: Literal["stop", "skip"] = "stop"
    """A picture or clip that cannot be read ends the run, or is left out, counted and named."""
    flip: bool = True
    """Mirror half of the pictures."""
    shift: int = 0
    """Move each picture by up to this many pixels."""
    scale: float = 0.0
    """Make each picture up to this share smaller or larger."""
    prefetch: int = 2
    """Batches made ahead in a background thread, 0: none."""

    def __post_init__(self):
        _require(bool(self.sources), "sources is empty; name at least one captions.jsonl")
        given = [source.weight is not None for source in self.sources]
        _require(all(given) or not any(given), "give all sources a weight, or none")
        paths = [source.path for source in self.sources]
        _require(len(set(paths)) == len(paths), f"sources name {max(paths, key=paths.count)} twice")
        _require(0 <= self.heldout_share < 1, f"heldout_share is {self.heldout_share}; it must lie in [0, 1)")
        _within("memory_gb", self.memory_gb, 1e-3, 1e5)
        _require(self.fit != "centre", "fit 'centre' leaves pictures of different sizes; use crop or pad")
        _within("shift", self.shift, 0, 4096)
        _within("scale", self.scale, 0, 0.9)
        _within("prefetch", self.prefetch, 0, 64)
        _check_colour(self.background)


    def variations(self) -> "PicturesConfig":
        """Only what a compiled step depends on; the rest as it is by default."""
        kept = {name: getattr(self, name) for name in ("background", "flip", "shift", "scale")}
        return PicturesConfig((PictureSource("any"),), **kept)


def _check_colour(name: str) -> None:
    from PIL import ImageColor

    try:
        ImageColor.getrgb(name)
    except ValueError:
        raise ValueError(f"background {name!r} is no colour; use a name or #rrggbb") from None


@dataclasses.dataclass(frozen=True)
class TokenizerTraining:
    """How long, on how many pictures, and when to stop."""

    steps: int = 10_000
    """Optimizer steps."""
    batch_size: int = 64
    """Pictures in a step, over all devices."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What the networks compute in; weights, statistics of norms, losses and latents are float32."""
    average_decay: float = 0.999
    """Of the moving average of the weights that is evaluated and written; 0: the weights themselves."""
    usage_steps: int = 100
    """Codes used in this many steps count as in use."""
    eval_every: int = 0
    """Steps between evaluations on held-out pictures, 0: none."""
    eval_pictures: int = 256
    """Most pictures of each source in an evaluation, evenly spread."""
    spike: float = 4.0
    """Stop when the loss is this far above the median of the last 100 steps, 0: never."""
    debug_nans: bool = False
    """Stop at the first operation that makes a NaN (slow)."""

    def __post_init__(self):
        for name in ("steps", "batch_size", "usage_steps", "eval_pictures"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("eval_every", "spike"):
            _require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; use 0 to switch it off")
        _require(0 <= self.average_decay < 1, f"average_decay is {self.average_decay}; it must lie in [0, 1)")


@dataclasses.dataclass(frozen=True)
class CodebookConfig:
    """How the codes are learned."""

    method: Literal["ema", "plain", "fsq"] = "ema"
    """`ema`: online k-means that moves dead codes onto latents; `plain`: by gradient; `fsq`: nothing to learn, with
    vqgan.levels."""
    commitment: float = 0.25
    """Weight of the loss that pulls latents to their codes."""
    decay: float = 0.99
    """Of the moving averages of `ema`."""
    dead_share: float = 0.05
    """A code of `ema` that is chosen by less than this part of an even share is dead and moves; 0: none moves."""

    def __post_init__(self):
        _within("commitment", self.commitment, 0, 1e3)
        _require(0 <= self.decay < 1, f"decay is {self.decay}; it must lie in [0, 1)")
        _within("dead_share", self.dead_share, 0, 1)


@dataclasses.dataclass(frozen=True)
class LossesConfig:
    """What makes a reconstruction a good one."""

    reconstruction: Literal["l1", "l2"] = "l1"
    """Mean absolute or squared difference of the pixels, which lie in [−1, 1]."""
    perceptual: float = 1.0
    """Weight of the perceptual loss."""
    perceptual_weights: str | None = None
    """A .safetensors of scripts/perceptual_weights.py; null: no perceptual loss."""
    perceptual_layers: tuple[str, ...] = ("conv1_2", "conv2_2", "conv3_3", "conv4_3")
    """Layers of VGG16 whose features are compared."""
    adversarial: float = 0.0
    """Weight of the adversarial loss, 0: none and no discriminator."""
    adversarial_start: int = 0
    """First step of the adversarial loss and of the discriminator's training."""
    adaptive: bool = True
    """Multiply the weight by the ratio of the gradients that both losses send to the decoder's last layer."""
    discriminator_width: int = 64
    """Channels of the discriminator's first convolution."""
    discriminator_layers: int = 3
    """Convolutions of stride 2 in the discriminator."""

    def __post_init__(self):
        for name in ("perceptual", "adversarial"):
            _within(name, getattr(self, name), 0, 1e4)
        _require(self.adversarial_start >= 0, f"adversarial_start is {self.adversarial_start}; it must be 0 or more")
        _within("discriminator_width", self.discriminator_width, 1, 1024)
        _within("discriminator_layers", self.discriminator_layers, 1, 8)
        unknown = [name for name in self.perceptual_layers if name not in LAYERS]
        _require(not unknown, f"perceptual_layers has {unknown}; the layers are {', '.join(LAYERS)}")
        _require(bool(self.perceptual_layers), "perceptual_layers is empty; set perceptual_weights to null instead")


@dataclasses.dataclass(frozen=True)
class TokenizerOptimizer(OptimizerConfig):
    """AdamW for the networks and, with the same values, for the discriminator."""

    b1: float = 0.5
    """Decay of the mean of the gradients."""
    b2: float = 0.9
    """Decay of the mean of their squares."""
    weight_decay: float = 0.0
    """Decay of the weights, norms, biases and codes excluded."""


@dataclasses.dataclass(frozen=True)
class TokenizerMesh:
    """How the devices are arranged: each holds the whole model and a part of the pictures."""

    shape: str = "-1,1,1,1"
    """Devices along dp,fsdp,tp,sp; tp and sp must be 1, and fsdp only cuts the batch, as dp does."""
    simulated_devices: int = 0
    """CPU devices to simulate where there is no accelerator, 0: none."""
    simulated_shape: str | None = None
    """The shape on simulated devices; null: the same as `shape`."""

    def __post_init__(self):
        for name in ("shape", "simulated_shape"):
            if getattr(self, name) is not None:
                numbers = check_shape(getattr(self, name))
                _require(
                    numbers[2:] == (1, 1),
                    f"{name} {getattr(self, name)!r}: an image tokenizer is not cut over tp and sp; set both to 1",
                )
        _require(0 <= self.simulated_devices <= 1024, f"simulated_devices is {self.simulated_devices}; use 0 to 1024")


@dataclasses.dataclass(frozen=True)
class TokenizerStage:
    """What the training loop calls a stage; a tokenizer's run has one."""

    vqgan: VQGANConfig
    data: PicturesConfig
    training: TokenizerTraining
    codebook: CodebookConfig
    losses: LossesConfig
    optimizer: TokenizerOptimizer
    mesh: TokenizerMesh
    name: str = "tokenizer"


@dataclasses.dataclass(frozen=True)
class TokenizerRun:
    """A training run of an image tokenizer."""

    vqgan: VQGANConfig
    data: PicturesConfig
    run_dir: str = "runs/tokenizer"
    """Folder of the run: config.yaml, metrics.jsonl, checkpoints/, loss.png, tokenizer.safetensors."""
    init_from: str | None = None
    """Folder of another tokenizer's run whose last checkpoint gives the first parameters; null: random ones."""
    seed: int = 0
    """Of the parameters, the order of the pictures and their variations."""
    training: TokenizerTraining = field(default_factory=TokenizerTraining)
    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    losses: LossesConfig = field(default_factory=LossesConfig)
    optimizer: TokenizerOptimizer = field(default_factory=TokenizerOptimizer)
    mesh: TokenizerMesh = field(default_factory=TokenizerMesh)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self):
        _require(0 <= self.seed < 2**31, f"seed is {self.seed}; it must lie in [0, 2^31)")
        levels, method = self.vqgan.levels, self.codebook.method
        _require(
            bool(levels) == (method == "fsq"),
            f"codebook.method {method!r} and vqgan.levels {list(levels)} disagree; finite scalar quantization is method"
            " fsq with levels, a codebook is ema or plain without",
        )
        _require(self.vqgan.channels in (1, 3), f"vqgan.channels is {self.vqgan.channels}; pictures have 1 or 3")
        self._check_resolution()
        _require(
            not self.checkpoint.keep_best,
            "checkpoint.keep_best goes by the held-out loss of a model of tokens, and an image tokenizer is measured"
            " otherwise (PSNR, SSIM); set it to false",
        )
        _require(
            not self.training.eval_every or self.data.heldout_share > 0,
            "training.eval_every needs held-out pictures; set data.heldout_share above 0, or eval_every to 0",
        )

    def _check_resolution(self) -> None:
        size, losses = self.vqgan.resolution, self.losses
        least = smallest_picture(losses.discriminator_layers)
        _require(
            not losses.adversarial or size >= least,
            f"losses.discriminator_layers {losses.discriminator_layers} needs pictures of {least} pixels and"
            f" vqgan.resolution is {size}; use fewer layers",
        )
        _require(
            losses.perceptual_weights is None or size >= 8,
            f"vqgan.resolution {size} is too small for VGG16's features; use 8 or more, or perceptual_weights null",
        )

    @property
    def stage_list(self) -> tuple[TokenizerStage, ...]:
        """The one stage."""
        names = [f.name for f in dataclasses.fields(TokenizerStage) if f.name != "name"]
        return (TokenizerStage(**{name: getattr(self, name) for name in names}),)
