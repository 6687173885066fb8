"""The best way to run a stage on a machine: every mesh, strategy, layout and remat policy, by the arithmetic.

A choice that fits, with some room, comes before one that does not, and then the faster. What a choice is worth is said
by its neighbours: the best plan that differs in that one choice.
"""

import dataclasses
import itertools
from collections.abc import Iterator

from ringjax.planning.communication import near
from ringjax.planning.devices import GIB, Target
from ringjax.planning.plan import StagePlan, plan_stage
from ringjax.training.config import RunConfig, StageConfig
from ringjax.training.mesh import lies_over
from ringjax.training.yaml_tree import ConfigError

STRATEGIES = ("ring", "all_gather", "ulysses")
# Where a ring leaves its host or slice; inside one they are a ring, or Ulysses.
ACROSS_HOSTS = ("two_level", "hybrid")
# Where two cost the same by the arithmetic the first is taken: zigzag's hops are plain rectangles, which cuDNN does 2
# to 15 % faster than striped's (docs/results/attention.md); on a TPU one kernel takes either.
LAYOUTS = {"gpu": ("zigzag", "striped", "contiguous"), "tpu": ("striped", "zigzag", "contiguous")}
BLOCKWISE = 2048
# The arithmetic is within 9 % of the compiler's (docs/results/planning.md), so a plan may take so much of the memory.
MARGIN = 0.92
# 'none' is left out: what it keeps beside the products is XLA's choice, and save_products takes as long.
REMATS = "save_products", "save_feed_forward", "save_attention", "offload", "full"


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a search decides about a stage."""

    mesh: str
    strategy: str
    layout: str
    remat: str
    ffn_chunk: int | None
    accumulation: int
    near: int = dataclasses.field(compare=False)
    """Neighbours of the ring that share fast links, which follow from the mesh."""

    def apply(self, stage: StageConfig, target: Target) -> StageConfig:
        """`stage` with the choice made."""
        host_size = stage.mesh.host_size or self.near if self.strategy in ACROSS_HOSTS else None
        unroll = 1 if self.remat == "offload" else stage.model.unroll
        return dataclasses.replace(
            stage,
            model=dataclasses.replace(stage.model, remat=self.remat, ffn_chunk=self.ffn_chunk, unroll=unroll),
            mesh=dataclasses.replace(
                stage.mesh, shape=self.mesh, strategy=self.strategy, layout=self.layout, host_size=host_size
            ),
            training=dataclasses.replace(stage.training, accumulation=self.accumulation),
        )


@dataclasses.dataclass(frozen=True)
class Found:
    """The best plan, the choice that makes it, and what other choices cost."""

    choice: Choice
    plan: StagePlan
    tried: int
    reasons: tuple[str, ...]


def search(run: RunConfig, stage: StageConfig, target: Target) -> Found:
    """The best plan of a stage. Raises ConfigError where no mesh at all can hold it."""
    plans: dict[Choice, StagePlan] = {}
    refused = None
    for choice in choices(stage, target):
        try:
            plans[choice] = plan_stage(run, choice.apply(stage, target), target)
        except (ConfigError, NotImplementedError, ValueError) as error:
            refused = refused or str(error)
    if not plans:
        raise ConfigError(f"stage {stage.name!r} runs on no mesh of {target}: {refused}")
    best = min(plans, key=lambda choice: _order(plans[choice]))
    return Found(best, plans[best], len(plans), tuple(_reasons(best, plans)))


def choices(stage: StageConfig, target: Target) -> Iterator[Choice]:
    """Every choice; what cannot be is refused by `plan_stage`. The stage's own accumulation, and enough for one row a
    group of devices. Copies of the model are as many as slices, or one."""
    training, model = stage.training, stage.model
    chunks = dict.fromkeys((model.ffn_chunk, None, BLOCKWISE))
    for dp, fsdp, tp, sp in _meshes(stage, target):
        fast = near((dp, fsdp, tp, sp), target)
        strategies = STRATEGIES if sp > 1 else STRATEGIES[:1]
        if sp > fast:
            strategies = (*STRATEGIES, *ACROSS_HOSTS)
        layouts = LAYOUTS[target.device.platform] if sp > 1 else (stage.mesh.layout,)
        remats = dict.fromkeys((stage.model.remat, *REMATS))
        micro = sorted({training.accumulation, training.batch_size // (dp * fsdp)})
        for one in itertools.product(strategies, layouts, remats, chunks, micro):
            yield Choice(f"{dp},{fsdp},{tp},{sp}", *one, fast)


def _meshes(stage: StageConfig, target: Target) -> Iterator[tuple[int, int, int, int]]:
    model, rows = stage.model, stage.training.batch_size
    for dp in dict.fromkeys((1, target.slices)):
        for fsdp in _divisors(target.count // dp):
            for tp in _divisors(target.count // dp // fsdp):
                sizes = dp, fsdp, tp, target.count // dp // fsdp // tp
                cut = all(size % tp == 0 for size in (model.heads, model.ffn_width, model.vocab_size))
                if cut and rows % (dp * fsdp) == 0 and lies_over(sizes, target.slices):
                    yield sizes


def _order(plan: StagePlan) -> tuple[bool, float]:
    """Fitting first, then fast; of those that do not fit, the smallest."""
    return (False, plan.time.seconds) if _safe(plan) else (True, plan.memory.total)


def _safe(plan: StagePlan) -> bool:
    return plan.memory.total <= MARGIN * plan.target.device.usable


def _reasons(best: Choice, plans: dict[Choice, StagePlan]) -> Iterator[str]:
    """For each thing decided, what the best plans that decide it otherwise need or take."""
    for field in filter(lambda field: field.compare, dataclasses.fields(Choice)):
        mine = getattr(best, field.name)
        others: dict[object, StagePlan] = {}
        for choice, plan in plans.items():
            value = getattr(choice, field.name)
            alike = dataclasses.replace(choice, **{field.name: mine}) == best
            if value != mine and alike and (value not in others or _order(plan) < _order(others[value])):
                others[value] = plan
        if others:
            ranked = sorted(others.items(), key=lambda item: _order(item[1]))[:3]
            words = "; ".join(f"{_named(value)} {_against(plan, plans[best])}" for value, plan in ranked)
            yield f"{field.name} {_named(mine)}: {words}"


def _against(plan: StagePlan, best: StagePlan) -> str:
    if not _safe(plan):
        return f"needs {plan.memory.total / GIB:.1f} of {plan.target.device.usable / GIB:.1f} GiB"
    change = plan.time.seconds / best.time.seconds - 1
    if not _safe(best):
        return "fits"
    return "takes as long" if abs(change) < 5e-4 else f"takes {change:+.1%}"


def _named(value: object) -> str:
    return "none" if value is None else str(value)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
