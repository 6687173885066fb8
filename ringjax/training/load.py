"""Reading configs: file, `model.size`, overrides and stages become one checked `RunConfig`; and back to YAML."""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from ringjax.attention.strategies import check_hosts
from ringjax.models.sizes import get_size
from ringjax.training.config import STAGE_SECTIONS, RunConfig, StageConfig
from ringjax.training.image_tokenizer.config import TokenizerRun
from ringjax.training.mesh import resolve_shape
from ringjax.training.start import OpenStart, Start
from ringjax.training.typed import build
from ringjax.training.yaml_tree import ConfigError, Item, merge, parse_value, parse_yaml, set_path, to_item

MAX_BYTES = 1 << 20


Overrides = Iterable[tuple[str, str]]


def load_config(path: str | Path, overrides: Overrides = (), open_start: OpenStart | None = None) -> RunConfig:
    """The transformer's run of a YAML file with `(dotted key, value)` overrides laid over it.

    `open_start` reads a published model that `init_from` names: what the config leaves out is taken from it.
    Raises ConfigError with one line for each problem; FileNotFoundError says which configs are near.
    """
    return _transformers(load_run(path, overrides, open_start), str(path))


def load_run(
    path: str | Path, overrides: Overrides = (), open_start: OpenStart | None = None
) -> RunConfig | TokenizerRun:
    """`load_config` of any run: a transformer's (section `model`) or an image tokenizer's (section `vqgan`)."""
    path = Path(path)
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f"; there are {', '.join(near[:8])}" if near else ""
        raise ConfigError(f"config {path} does not exist{hint}")
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(f"config {path} has {path.stat().st_size} bytes; a config has at most {MAX_BYTES}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"config {path} is not UTF-8 text (byte {error.start})") from None
    return parse_run(text, str(path), overrides, open_start)


def parse_config(
    text: str, origin: str = "config", overrides: Overrides = (), open_start: OpenStart | None = None
) -> RunConfig:
    """`load_config` of a text."""
    return _transformers(parse_run(text, origin, overrides, open_start), origin)


def _transformers(run: RunConfig | TokenizerRun, origin: str) -> RunConfig:
    if isinstance(run, TokenizerRun):
        raise ConfigError(
            f"{origin}: the run of an image tokenizer (section vqgan) has no transformer; what it leaves is its"
            " tokenizer.safetensors"
        )
    return run


def parse_run(
    text: str, origin: str = "config", overrides: Overrides = (), open_start: OpenStart | None = None
) -> RunConfig | TokenizerRun:
    """`load_run` of a text."""
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{origin} has {len(text)} characters; a config has at most {MAX_BYTES}")
    tree = parse_yaml(text, origin)
    for key, value in overrides:
        tree = set_path(tree, key.split("."), parse_value(value, f"--{key}"))
    start = None if open_start is None else _open_start(tree, open_start)
    try:
        if "vqgan" in tree.value:
            return _image_tokenizer(tree)
        config = build(RunConfig, _expand(tree if start is None else _inherit(tree, start)))
    except ConfigError as error:
        raise ConfigError(_without_repeats(error.problems)) from None
    if start is not None and (problems := start.check(config.stage_list[0].model)):
        raise ConfigError([f"{problem}, which init_from names" for problem in problems])
    return config


def _image_tokenizer(tree: Item) -> TokenizerRun:
    if "model" in tree.value:
        raise ConfigError(
            f"{tree.value['vqgan'].where}: sections model and vqgan in one config; a run trains a transformer (model)"
            " or an image tokenizer (vqgan): write two configs"
        )
    return build(TokenizerRun, tree)


def _open_start(tree: Item, open_start: OpenStart) -> Start | None:
    """The published model that `init_from` names; None for a run's folder, and for what is not there (yet)."""
    section = tree.value if isinstance(tree.value, dict) else {}
    init_from, model = section.get("init_from"), section.get("model", Item({}, ""))
    if init_from is None or not isinstance(init_from.value, str) or not Path(init_from.value).exists():
        return None
    heads = model.value.get("heads") if isinstance(model.value, dict) else None
    try:
        return open_start(init_from.value, heads.value if heads is not None else None)
    except (ValueError, NotImplementedError, OSError, ImportError) as error:
        raise ConfigError(f"{init_from.where}: init_from: {error}") from None


def _inherit(tree: Item, start: Start) -> Item:
    """The tree with what its sections `model` and `data` leave out taken from a published model."""
    where = tree.value["init_from"].where
    model, data = (tree.value.get(name, Item({}, where)) for name in ("model", "data"))
    model = merge(to_item(start.inherited, where), _expand_size(model))
    if isinstance(data.value, dict) and start.has_tokenizer and "tokenizer" not in data.value:
        data = Item({**data.value, "tokenizer": to_item(str(start.path), where)}, data.where)
    return Item({**tree.value, "model": model, "data": data}, tree.where)


def _without_repeats(problems: list[str]) -> list[str]:
    """A mistake in a section of the run shows again in every stage that takes it over: said once is enough."""
    seen: dict[str, str] = {}
    for problem in problems:
        seen.setdefault(re.sub(r"stages\.\d+\.", "", problem), problem)
    return list(seen.values())


def _expand(tree: Item) -> Item:
    """The tree with named model sizes written out and every stage completed from the sections of the run."""
    stages = tree.value.get("stages", Item([], tree.where))
    base = {name: tree.value[name] for name in STAGE_SECTIONS if name in tree.value}
    if isinstance(stages.value, list):
        full = [_expand_stage(Item(base, tree.where), stage) for stage in stages.value]
        tree = Item({**tree.value, "stages": Item(full, stages.where)}, tree.where)
    if "model" in base:
        tree = Item({**tree.value, "model": _expand_size(base["model"])}, tree.where)
    return tree


def _expand_stage(base: Item, stage: Item) -> Item:
    merged = merge(base, stage)
    if not isinstance(merged.value, dict):
        return merged
    children = dict(merged.value)
    for section in STAGE_SECTIONS:
        children.setdefault(section, Item({}, stage.where))
    children["model"] = _expand_size(children["model"])
    return Item(children, merged.where)


def _expand_size(model: Item) -> Item:
    """`{size: 7b, rope_theta: 1e6}` -> every value of the named size, with the other keys laid over it."""
    if not isinstance(model.value, dict) or "size" not in model.value:
        return model
    size = model.value["size"]
    try:
        named = get_size(size.value)
    except ValueError as error:
        raise ConfigError(f"{size.where}: model.size: {error}") from None
    rest = {key: child for key, child in model.value.items() if key != "size"}
    return merge(to_item(dataclasses.asdict(named), size.where), Item(rest, model.where))


def to_yaml(config: Any) -> str:
    """The resolved config as YAML that reads back as the same config."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True, width=110)


def to_plain(value: Any) -> Any:
    """A config as mappings, lists and scalars, ready for YAML or JSON."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, dict):
        return {key: to_plain(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(child) for child in value]
    return str(value) if isinstance(value, Path) else value


def check_devices(config: RunConfig, device_count: int, simulated: bool = False) -> None:
    """Check every stage against a number of devices, before anything runs; needs no device itself.

    Raises ConfigError with one line for each problem.
    """
    problems = []
    for stage in config.stage_list:
        try:
            check_stage_devices(stage, device_count, simulated)
        except ValueError as error:
            problems.append(f"stage {stage.name!r}: {error}" if config.stages else str(error))
    if problems:
        raise ConfigError(problems)


def mesh_shape(stage: StageConfig, simulated: bool) -> str:
    """The mesh string that a stage uses on simulated or on real devices."""
    return stage.mesh.simulated_shape if simulated and stage.mesh.simulated_shape else stage.mesh.shape


def check_stage_devices(stage: StageConfig, device_count: int, simulated: bool = False) -> None:
    """`check_devices` of one stage; raises ValueError."""
    dp, fsdp, tp, sp = resolve_shape(mesh_shape(stage, simulated), device_count)
    training = stage.training
    micro = training.batch_size // training.accumulation
    if micro % (dp * fsdp):
        raise ValueError(
            f"training.batch_size {training.batch_size} / accumulation {training.accumulation} = {micro} rows cannot"
            f" be divided over dp {dp} · fsdp {fsdp} = {dp * fsdp} groups of devices"
        )
    sizes = {"dp": dp, "fsdp": fsdp, "tp": tp, "sp": sp}
    stage.model.validate_mesh(sizes, seq_len=training.seq_len, layout=stage.mesh.layout)
    check_hosts(stage.mesh.strategy, stage.mesh.host_size, sp)
    if stage.model.vision_vocab_size and stage.data.vision_codes != stage.model.vision_codes:
        raise ValueError(
            f"data.vision_codes {stage.data.vision_codes} and model.vision_codes {stage.model.vision_codes} differ;"
            " they are the number of codes of the same image tokenizer"
        )
