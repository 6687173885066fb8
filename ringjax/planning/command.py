"""`ringjax plan`: what a config needs and takes on a machine, printed, written as a page, or searched for."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ringjax.planning.compiled import compile_stage
from ringjax.planning.devices import GIB, Target
from ringjax.planning.plan import StagePlan, plan_stage
from ringjax.planning.search import Found, search
from ringjax.training.config import RunConfig
from ringjax.training.load import to_yaml
from ringjax.training.progress import format_count
from ringjax.training.yaml_tree import ConfigError

WIDTH = 118


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """Options of `ringjax plan CONFIG`; `--section.key value` changes the config as in `ringjax train`."""

    target: str = "h100:8"
    """The machine: a GPU and how many (h100:8), or a TPU slice in chips (tpu:v5p:4x8x8; v4, v5e, v5p, v6e, tpu7x),
    or several such slices (tpu:v5p:4x8x8:2)."""
    stage: str | None = None
    """One stage; null: all."""
    compile: bool = False
    """Also ask the compiler, about a minute a stage (TPU slices; needs the extra `tpu`, not a TPU)."""
    search: bool = False
    """Try meshes, strategies, layouts and remat policies, and take the best for each stage."""
    output: str | None = None
    """Where --search writes the config that it found, a YAML file."""
    html: str | None = None
    """Where to write a page with the pictures."""

    def __post_init__(self):
        Target.parse(self.target)
        if self.output is not None and not self.search:
            raise ValueError(f"output {self.output!r} is where --search writes its config; give --search too")
        for name in ("output", "html"):
            path = getattr(self, name)
            if path is not None and Path(path).exists():
                raise ValueError(f"{name} {path!r} is there already and nothing is overwritten; name another file")


def run_plan(run: RunConfig, config: PlanConfig, say: Callable[[str], None] = print) -> list[StagePlan]:
    """Plans the stages of `run`, prints them and writes what was asked for. Raises ConfigError for what cannot be."""
    target = Target.parse(config.target)
    run = _only(run, config.stage)
    found = [search(run, stage, target) for stage in run.stage_list] if config.search else []
    plans = [f.plan for f in found] or [plan_stage(run, stage, target) for stage in run.stage_list]
    if config.compile:
        plans = [dataclasses.replace(plan, compiled=compile_stage(plan.stage, target)) for plan in plans]
    say(_text(table(plans)))
    for line in [*_notes(plans, config), *_found(found)]:
        say(line)
    if config.output is not None:
        Path(config.output).write_text(_written(run, plans, config), encoding="utf-8")
        say(f"wrote {config.output}: a config to start from; ringjax train {config.output}")
    if config.html is not None:
        from ringjax.planning.page import page

        Path(config.html).write_text(page(plans, run.run_dir), encoding="utf-8")
        say(f"wrote {config.html}")
    return plans


def _only(run: RunConfig, name: str | None) -> RunConfig:
    if name is None:
        return run
    stages = tuple(stage for stage in run.stage_list if stage.name == name)
    if not stages:
        names = ", ".join(stage.name for stage in run.stage_list)
        raise ConfigError(f"--stage: there is no stage {name!r}; the stages are {names}")
    return dataclasses.replace(run, stages=stages)


def table(plans: list[StagePlan]) -> Table:
    """One row a stage."""
    first = plans[0]
    device = first.target.device
    title = (
        f"{format_count(first.parameters)} parameters on {first.target}: {first.target.count} ×"
        f" {device.kind}, {device.flops / 1e12:.0f} TFLOP/s, {device.usable / GIB:.1f} GiB"
    )
    made = Table(title=title, title_justify="left", title_style="bold")
    for name in ("stage", "dp,fsdp,tp,sp", "a step", "keeps"):
        made.add_column(name)
    for name in ("GiB", "fits", "step", "tokens/s", "MFU"):
        made.add_column(name, justify="right")
    made.add_column("most of it")
    for plan in plans:
        made.add_row(*_row(plan))
    return made


def _row(plan: StagePlan) -> Iterable[str]:
    training = plan.stage.training
    yield plan.stage.name
    yield ",".join(map(str, plan.sizes)) + (f" {plan.stage.mesh.layout}" if plan.sizes[3] > 1 else "")
    yield f"{training.batch_size} × {length(training.seq_len)}"
    yield plan.stage.model.remat
    yield f"{plan.memory.total / GIB:.1f}"
    yield "[green]yes[/]" if plan.fits else "[red]no[/]"
    yield seconds(plan.time.seconds)
    yield f"{plan.tokens / plan.time.seconds:,.0f}"
    yield f"{plan.time.mfu:.1%}"
    yield plan.bound


def _notes(plans: list[StagePlan], config: PlanConfig) -> Iterable[str]:
    for plan in plans:
        if why := plan.why_not():
            yield f"{plan.stage.name} does not fit: {why}"
        if plan.compiled is not None and plan.compiled.fits:
            said = plan.compiled
            most = "at most " if said.at_most else ""
            words = (
                f"{most}{said.used / GIB:.2f} of {said.limit / GIB:.2f} GiB on each device; rotations: {said.rotations}"
            )
            yield f"{plan.stage.name}: the compiler says {words}; compiled in {seconds(said.seconds)}"
        if plan.memory.host:
            yield f"{plan.stage.name} keeps {plan.memory.host / GIB:.1f} GiB a device in the host's memory"
        if plan.hop is not None:
            hop = plan.hop
            word = "hides behind" if hop.hidden else "is longer than"
            across = plan.stage.mesh.strategy == "two_level"
            groups = "slices" if plan.target.slices > 1 else "hosts"
            what, beside = (f"transfer across {groups}", "its turn's") if across else ("rotation", "its hop's")
            yield (
                f"{plan.stage.name}: a {what} of {hop.bytes / 2**20:.0f} MiB {word} {beside} attention:"
                f" {hop.tokens:,.0f} tokens a {'group' if plan.stage.mesh.strategy == 'hybrid' else 'device'},"
                f" {hop.needed_tokens:,.0f} needed"
            )
    days = sum(plan.days for plan in plans)
    if days:
        steps = sum(plan.stage.training.steps for plan in plans)
        yield f"{steps:,} steps take {days:.1f} days" if days >= 1 else f"{steps:,} steps take {days * 24:.1f} hours"
    rates = plans[0].target.device.rates
    if not rates.measured:
        yield "times are estimates: the shares of the peak behind them are assumed, not measured on this device"
    if not config.compile and plans[0].target.libtpu is not None:
        yield "memory is arithmetic; --compile asks the compiler, about a minute a stage"


def _found(found: list[Found]) -> Iterable[str]:
    for one in found:
        yield f"{one.plan.stage.name}: the best of {one.tried:,} plans; others against it:"
        yield from (f"  {reason}" for reason in one.reasons)


def _written(run: RunConfig, plans: list[StagePlan], config: PlanConfig) -> str:
    """The run with what was found in place of what was given."""
    stages = tuple(plan.stage for plan in plans)
    if run.stages:
        run = dataclasses.replace(run, stages=stages)
    else:
        (stage,) = stages
        run = dataclasses.replace(run, model=stage.model, training=stage.training, mesh=stage.mesh)
    return f"# Found by `ringjax plan --search` for {config.target}.\n{to_yaml(run)}"


def _text(made: Table) -> str:
    console = Console(width=None if Console().is_terminal else WIDTH)
    with console.capture() as captured:
        console.print(made)
    return captured.get().rstrip()


def length(tokens: int) -> str:
    """Tokens as people say them.

    >>> length(32768), length(2**20), length(1000)
    ('32K', '1M', '1000')
    """
    for size, unit in ((2**20, "M"), (2**10, "K")):
        if tokens % size == 0:
            return f"{tokens // size}{unit}"
    return str(tokens)


def seconds(value: float) -> str:
    """A time, short."""
    if value >= 3600:
        return f"{value / 3600:.1f} h"
    if value >= 100:
        return f"{value:.0f} s"
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.0f} ms"
