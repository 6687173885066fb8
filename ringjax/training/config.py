"""The config of a run: what `ringjax train` reads, as frozen dataclasses.

A file has one section a part (`model`, `data`, `training`, `optimizer`, `mesh`, …) and, for context extension, a list
`stages`, each of which repeats only what it changes:

    model: {size: 7b, rope_theta: 1.0e6}
    training: {seq_len: 32768, steps: 1200, batch_size: 128}
    stages:
      - {name: 32k}
      - {name: 128k, model: {rope_theta: 1.0e7}, training: {seq_len: 131072, steps: 3000, batch_size: 32}}

`model.size` takes every value of a named model (`ringjax.models.sizes`); other keys of the section change it.
"""

import dataclasses
import math
from dataclasses import field
from typing import Literal

from ringjax.attention.kernels import check_name
from ringjax.attention.strategies import check_host_size
from ringjax.data.config import DataConfig
from ringjax.models.config import ModelConfig
from ringjax.models.lora import LoraConfig
from ringjax.training.mesh import check_shape

# What a stage may set; everything else belongs to the whole run.
STAGE_SECTIONS = ("model", "data", "training", "optimizer", "mesh")
# The model's fields that change no parameter's shape, so that a stage may set them.
STAGE_MODEL_FIELDS = (
    "rope_theta", "rope_scaling", "window", "shifted_group", "dtype", "remat", "unroll", "ffn_chunk", "loss_chunk",
)  # fmt: skip


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How long, on how many tokens, and when to stop."""

    steps: int = 1000
    """Optimizer steps (of this stage)."""
    seq_len: int = 1024
    """Tokens in a row."""
    batch_size: int = 8
    """Rows in a step, over all devices and micro-batches."""
    accumulation: int = 1
    """Micro-batches that a step is cut into, one after the other, to save memory."""
    eval_every: int = 0
    """Steps between evaluations on held-out data, 0: none."""
    eval_batches: int = 4
    """Batches of each source in an evaluation."""
    spike: float = 4.0
    """Stop when the loss is this many nats above the median of the last 100 steps, 0: never."""
    debug_nans: bool = False
    """Stop at the first operation that makes a NaN (slow: runs without jit where it finds one)."""

    def __post_init__(self):
        for name in ("steps", "seq_len", "batch_size", "accumulation", "eval_batches"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("eval_every", "spike"):
            _require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; use 0 to switch it off")
        _require(
            self.batch_size % self.accumulation == 0,
            f"batch_size {self.batch_size} cannot be cut into accumulation {self.accumulation} equal micro-batches",
        )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with clipping, warm-up and a schedule. Loshchilov & Hutter 2017, arXiv:1711.05101."""

    learning_rate: float = 3e-4
    """The highest learning rate."""
    min_learning_rate: float = 0.0
    """Where the cosine ends."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """How the learning rate goes on after the warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    b1: float = 0.9
    """Decay of the mean of the gradients."""
    b2: float = 0.95
    """Decay of the mean of their squares."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decay of the weights, norms and biases excluded."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient, 0: no clipping."""
    vision_rate: float = 1.0
    """Learning rate of the tables of pictures (vte, vision_head) over that of everything else: above 1 where they are
    new and the rest was trained before."""
    carry: bool = True
    """Whether a stage keeps the moments of the stage before it."""

    def __post_init__(self):
        _require(self.learning_rate > 0, f"learning_rate is {self.learning_rate}; it must be above 0")
        _require(
            0 <= self.min_learning_rate <= self.learning_rate,
            f"min_learning_rate {self.min_learning_rate} must lie between 0 and learning_rate {self.learning_rate}",
        )
        _require(0 < self.vision_rate < math.inf, f"vision_rate is {self.vision_rate}; it must be above 0")
        for name in ("b1", "b2"):
            _require(0 <= getattr(self, name) < 1, f"{name} is {getattr(self, name)}; it must lie in [0, 1)")
        for name in ("warmup_steps", "weight_decay", "clip_norm", "eps"):
            value = getattr(self, name)
            _require(value >= 0 and math.isfinite(value), f"{name} is {value}; it must be 0 or more")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices are arranged, and how attention uses the ring."""

    shape: str = "-1,1,1,1"
    """Devices along dp,fsdp,tp,sp; one may be -1 and takes what is left."""
    layout: Literal["contiguous", "striped", "zigzag"] = "striped"
    """Which token sits on which device of the ring."""
    strategy: Literal["ring", "two_level", "all_gather", "ulysses", "hybrid"] = "ring"
    """How attention crosses the devices of the ring."""
    host_size: int | None = None
    """Devices of the ring that share fast links, for two_level and hybrid; null: those of a process, or TPU slice."""
    backend: str = "auto"
    """The attention kernel."""
    simulated_devices: int = 0
    """CPU devices to simulate where there is no accelerator, 0: none."""
    simulated_shape: str | None = None
    """The shape on simulated devices; null: the same as `shape`."""

    def __post_init__(self):
        check_shape(self.shape)
        check_name(self.backend)
        check_host_size(self.strategy, self.host_size)
        if self.simulated_shape is not None:
            check_shape(self.simulated_shape)
        _require(0 <= self.simulated_devices <= 1024, f"simulated_devices is {self.simulated_devices}; use 0 to 1024")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what to keep."""

    every: int = 500
    """Steps between checkpoints; the end of a stage and SIGTERM save too."""
    keep_last: int = 2
    """How many of the newest to keep."""
    keep_every: int = 0
    """Also keep each checkpoint whose step is a multiple of this, 0: none."""
    keep_stages: bool = False
    """Also keep the last one of each stage."""
    keep_best: bool = False
    """Save after each evaluation with a lower held-out loss (mean over the sources) than any before in its stage, and
    keep the last of these of each stage. What reads the run takes it; training goes on from the newest."""
    asynchronous: bool = True
    """Write while training goes on."""
    verify: bool = True
    """Check every file against its checksum before a restore."""

    def __post_init__(self):
        _require(self.every >= 1, f"every is {self.every}; it must be at least 1")
        _require(self.keep_last >= 1, f"keep_last is {self.keep_last}; at least one checkpoint must stay")
        _require(self.keep_every >= 0, f"keep_every is {self.keep_every}; use 0 for none")


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """What a person sees; metrics.jsonl is always written, one line a step."""

    every: int = 10
    """Steps between printed lines (where there is no terminal)."""
    progress: Literal["auto", "rich", "plain", "none"] = "auto"
    """The display: rich on a terminal, plain lines elsewhere."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the extra `tensorboard`)."""
    plot: bool = True
    """Draw loss.png at the end."""

    def __post_init__(self):
        _require(self.every >= 1, f"every is {self.every}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Several processes. Slurm, GKE, MPI and Cloud TPU are detected; these are for anything else."""

    coordinator: str | None = None
    """host:port of process 0 (or the variable JAX_COORDINATOR_ADDRESS)."""
    processes: int | None = None
    """Number of processes (or JAX_NUM_PROCESSES)."""
    process_index: int | None = None
    """Which one this is (or JAX_PROCESS_ID)."""
    detect: bool = True
    """Whether to look for a cluster."""
    heartbeat_seconds: int = 60
    """A process that is silent for so long is given up: the others name it and end with exit code 69."""
    start_seconds: int = 300
    """How long to wait at the start until all processes are there."""

    def __post_init__(self):
        for name in ("heartbeat_seconds", "start_seconds"):
            _require(getattr(self, name) >= 3, f"{name} is {getattr(self, name)}; it must be at least 3")


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage of context extension, complete."""

    name: str
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A training run."""

    model: ModelConfig
    data: DataConfig
    run_dir: str = "runs/default"
    """Folder of the run: config.yaml, metrics.jsonl, checkpoints/, loss.png."""
    init_from: str | None = None
    """What gives the first parameters: the folder of another run (its last checkpoint, or best), or a published model
    (a Hugging Face folder, a .gguf file, an LWM stream), which also says what `model` and data.tokenizer leave out;
    null: random ones."""
    lora: LoraConfig | None = None
    """Low-rank adapters in place of all parameters (needs init_from); null: everything is trained."""
    seed: int = 0
    """Of the parameters and the order of the data."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    stages: tuple[StageConfig, ...] = ()

    def __post_init__(self):
        _require(0 <= self.seed < 2**31, f"seed is {self.seed}; it must lie in [0, 2^31)")
        _require(
            self.lora is None or self.init_from is not None,
            "lora without init_from: adapters change a model that is there; name a published model or a run",
        )
        names = [stage.name for stage in self.stages]
        _require(len(set(names)) == len(names), f"stages must have different names, not {', '.join(names)}")
        for stage in self.stage_list:
            _require(
                not stage.model.sinks,
                f"model.sinks is {stage.model.sinks}; sinks are for inference, for the rows of training are packed and"
                " sinks are the first tokens of a row: train with the window alone",
            )
        for stage in self.stages:
            _check_same_parameters(self.stages[0], stage)
        for stage in self.stage_list if self.checkpoint.keep_best else ():
            held_out = stage.data.heldout or any(s.path.startswith("sample:") for s in stage.data.sources)
            _require(
                stage.training.eval_every > 0 and bool(held_out),
                "checkpoint.keep_best goes by the held-out loss; set training.eval_every and data.heldout in every"
                " stage, or keep_best to false",
            )

    @property
    def stage_list(self) -> tuple[StageConfig, ...]:
        """The stages; a config without `stages` is one stage called "train"."""
        sections = {name: getattr(self, name) for name in STAGE_SECTIONS}
        return self.stages or (StageConfig(name="train", **sections),)


def _check_same_parameters(first: StageConfig, stage: StageConfig) -> None:
    for f in dataclasses.fields(ModelConfig):
        a, b = getattr(first.model, f.name), getattr(stage.model, f.name)
        _require(
            a == b or f.name in STAGE_MODEL_FIELDS,
            f"stage {stage.name!r} changes model.{f.name} from {a!r} to {b!r}; a stage continues from the one before"
            f" it and may change only {', '.join(STAGE_MODEL_FIELDS)}",
        )
