"""What each stage of a run will need and take on a machine: fits or not, how long a step, what bounds it."""

import dataclasses

from ringjax.planning import communication, memory, step_time
from ringjax.planning.communication import Hop
from ringjax.planning.compiled import Compiled
from ringjax.planning.devices import GIB, Target
from ringjax.planning.memory import Memory
from ringjax.planning.step_time import StepTime
from ringjax.training.config import RunConfig, StageConfig
from ringjax.training.load import check_devices
from ringjax.training.mesh import across_slices, resolve_shape
from ringjax.training.yaml_tree import ConfigError

DAY = 86400


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """A stage on a target: the arithmetic, and what the compiler said if it was asked."""

    stage: StageConfig
    target: Target
    sizes: tuple[int, int, int, int]
    parameters: int
    memory: Memory
    time: StepTime
    hop: Hop | None
    compiled: Compiled | None = None

    @property
    def fits(self) -> bool:
        """The compiler's word, or the arithmetic's where the compiler was not asked."""
        return self.memory.total <= self.target.device.usable if self.compiled is None else self.compiled.fits

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.stage.training.batch_size * self.stage.training.seq_len

    @property
    def days(self) -> float:
        """The whole stage, without evaluations and checkpoints."""
        return self.stage.training.steps * self.time.seconds / DAY

    @property
    def bound(self) -> str:
        """What takes most of the step, and its share."""
        return f"{self.time.bound} {self.time.parts()[self.time.bound] / self.time.seconds:.0%}"

    def why_not(self) -> str | None:
        """Where it does not fit: by how much, of what, and the way out. None where it fits."""
        if self.fits:
            return None
        if self.compiled is not None:
            return f"{self.compiled.problem}; {self._way_out()}"
        over, parts = self.memory.total - self.target.device.usable, self.memory.parts()
        largest = max(parts, key=parts.get)
        return (
            f"needs {self.memory.total / GIB:.1f} GiB of {self.target.device.usable / GIB:.1f}, {over / GIB:.1f} too"
            f" many; most is {largest}, {parts[largest] / GIB:.1f} GiB; {self._way_out()}"
        )

    def _way_out(self) -> str:
        parts = self.memory.parts()
        return {
            "kept": "keep less (model.remat save_attention, full or offload) or cut rows over more devices (mesh sp)",
            "work": "cut rows over more devices (mesh sp), or set model.ffn_chunk",
            "K, V": "cut rows over more devices (mesh sp) or heads (tp)",
            "logits": "lower model.loss_chunk, or cut the vocabulary over tp",
            "batch": "cut rows over more devices (mesh sp)",
        }.get(max(parts, key=parts.get), "cut parameters over more devices (mesh fsdp, tp or sp)")


def plan_stage(run: RunConfig, stage: StageConfig, target: Target) -> StagePlan:
    """The arithmetic of one stage. Raises ConfigError where the stage cannot be cut over the target."""
    check_devices(dataclasses.replace(run, stages=(stage,)), target.count)
    _check_planned(run, stage)
    sizes = resolve_shape(stage.mesh.shape, target.count)
    try:
        across_slices(sizes, target.slices)
    except ValueError as error:
        raise ConfigError(f"stage {stage.name!r}: {error}") from None
    _check_strategy(stage, sizes, target)
    parameters = stage.model.parameter_count()
    return StagePlan(
        stage, target, sizes, parameters, memory.of_stage(stage, sizes, target.device.platform),
        step_time.of_stage(stage, sizes, target, parameters), communication.hop_of(stage, sizes, target),
    )  # fmt: skip


def _check_planned(run: RunConfig, stage: StageConfig) -> None:
    """The arithmetic is of full training with full attention: less would be said to cost as much."""
    if run.lora is not None:
        raise ConfigError("lora: a plan is of full training, and adapters take less; plan that with --lora null")
    if stage.model.shifted_group is not None:
        raise ConfigError(
            f"stage {stage.name!r}: model.shifted_group {stage.model.shifted_group}: a plan is of full attention, and"
            " groups take less; plan that with null in its place"
        )


def _check_strategy(stage: StageConfig, sizes: tuple[int, int, int, int], target: Target) -> None:
    """Refuse what training would refuse, and what the arithmetic does not know."""
    strategy, (_, _, tp, sp), model = stage.mesh.strategy, sizes, stage.model
    heads, kv_heads = model.heads // tp, max(1, model.key_heads // tp)
    if strategy == "ulysses" and (heads % sp or (kv_heads % sp and sp % kv_heads)):
        raise ConfigError(
            f"stage {stage.name!r}: ulysses over sp {sp} cannot split {heads} query and {kv_heads} key/value heads a"
            " device evenly; use strategy 'ring', or a smaller sp"
        )
    near = communication.inside(stage, sizes, target)
    if strategy == "two_level" and sp % near:
        raise ConfigError(
            f"stage {stage.name!r}: a ring of sp {sp} cannot be cut into hosts of {near}; set mesh.host_size to a"
            " divisor of it, or use strategy 'ring'"
        )
