"""LoRA adapters in PEFT's form, in and out.

    folder/adapter_config.json          peft_type LORA, r, lora_alpha, use_rslora, target_modules, modules_to_save
           adapter_model.safetensors    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight   [r, in]
                                        base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight   [out, r]
                                        base_model.model.model.layers.0.input_layernorm.weight           trained whole
           ringjax.json                 the model's fields that were other in training (rope_theta, …), and its context

The outputs of q and k change places as those of their kernels do (`names.py`): PEFT on the Hugging Face model of the
same base gives the same logits. It has no place for RoPE's base, so a longer context is said in a file of our own; a
person who uses the folder with PEFT sets `rope_theta` of the base's config to the same.

`sample:smollm2-128k` travels with the package: SmolLM2-135M-Instruct with a context of 131,072 tokens.
"""

import dataclasses
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from ringjax.data import samples
from ringjax.interop.names import Path as Names
from ringjax.interop.names import Recipe, hf_recipes
from ringjax.interop.published import Published, file_fingerprint
from ringjax.interop.tensors import SafetensorsSource, listed, read_json
from ringjax.json_text import brief
from ringjax.models import lora
from ringjax.models.config import ModelConfig, RopeScaling
from ringjax.models.lora import LoraConfig
from ringjax.models.parallel import Parallel
from ringjax.models.transformer import Transformer

CONFIG, WEIGHTS, CHANGES = "adapter_config.json", "adapter_model.safetensors", "ringjax.json"
SAMPLE = "sample:smollm2-128k"
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
_MAX_RANK = 2**16
# What the fields of adapter_config.json must be where they are there: anything else changes the maths.
_NEUTRAL = {
    "bias": ("none",), "fan_in_fan_out": (False,), "use_dora": (False,), "use_qalora": (False,), "lora_bias": (False,),
    "layers_to_transform": (None, []), "layers_pattern": (None, []), "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None), "layer_replication": (None, []), "megatron_config": (None,),
    "exclude_modules": (None, []), "target_parameters": (None, []), "trainable_token_indices": (None, []),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"), "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
}  # fmt: skip
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode",
    "loftq_config", "lora_alpha", "lora_dropout", "megatron_core", "modules_to_save", "peft_type", "peft_version",
    "qalora_group_size", "r", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
_CHANGED = ("rope_theta", "rope_scaling", "window")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter's folder, opened: its config, its tensors, and what else of the model it was trained with."""

    path: Path
    rank: int
    alpha: float
    rank_stabilised: bool
    source: SafetensorsSource
    changes: dict[str, Any]
    context: int | None

    @classmethod
    def read(cls, folder: str | Path) -> "Adapter":
        """Raises FileNotFoundError where files are missing, ValueError for damaged ones, NotImplementedError for an
        adapter that does more than LoRA here."""
        if str(folder).startswith("sample:"):
            if str(folder) != SAMPLE:
                raise ValueError(f"no adapter {folder}; {SAMPLE} is the one that comes with the package")
            folder = samples.path(f"smollm2_128k/{CONFIG}").parent
        folder = Path(folder)
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder} is no LoRA adapter in PEFT's form: it has no {name}; give a folder that has, or {SAMPLE}"
                )
        fields, where = read_json(folder / CONFIG), folder / CONFIG
        _refuse(fields, where)
        rank, alpha = fields.get("r"), fields.get("lora_alpha")
        if type(rank) is not int or not 1 <= rank <= _MAX_RANK or not _is_scale(alpha):
            said = f"r {brief(rank)} and lora_alpha {brief(alpha)}"
            raise ValueError(f"{where}: {said} must be a whole number and one above 0")
        changes, context = _read_changes(folder / CHANGES)
        stabilised = bool(fields.get("use_rslora", False))
        return cls(folder, rank, float(alpha), stabilised, SafetensorsSource(folder / WEIGHTS), changes, context)

    def params(self, config: ModelConfig) -> tuple[LoraConfig, dict[Names, np.ndarray]]:
        """What is trained of a model of `config`, by our paths: adapters, and norms and tables that are replaced.

        Raises ValueError for tensors that do not fit the model.
        """
        recipes, tensors = hf_recipes(config), set(self.source.shapes)
        found: dict[Names, np.ndarray] = {}
        targets, also = [], set()
        for path, recipe in recipes.items():
            modules = [name.removesuffix(".weight") for name in recipe.names]
            if f"{_PREFIX}{modules[0]}{_A}" in tensors:
                targets.append(".".join(path[:-1]))
                for name, part in (("a", _A), ("b", _B)):
                    one = _part(recipe, name, self.rank)
                    found[*path[:-1], "low_rank", name] = self._stack(one, [f"{_PREFIX}{m}{part}" for m in modules])
                    tensors -= {f"{_PREFIX}{m}{part}" for m in modules}
            elif f"{_PREFIX}{recipe.names[0]}" in tensors:
                also.add("embeddings" if path[0] == "wte" else "norms")
                names = [f"{_PREFIX}{name}" for name in recipe.names]
                found[path] = self._stack(recipe, names)
                tensors -= set(names)
        if tensors or not targets:
            what = f"has {listed(sorted(tensors))}" if tensors else "has no adapter"
            raise ValueError(f"{self.path / WEIGHTS} {what}, which does not fit this model")
        made = LoraConfig(
            rank=self.rank, alpha=self.alpha, targets=tuple(targets), rank_stabilised=self.rank_stabilised,
            also=tuple(sorted(also)),
        )  # fmt: skip
        return made, found

    def _stack(self, recipe: Recipe, names: list[str]) -> np.ndarray:
        """Our parameter from tensors of these names, which must all be there."""
        for name in names:
            shape = self.source.shapes.get(name)
            if shape != recipe.shape:
                wrong = "missing" if shape is None else f"{shape}, not {recipe.shape}"
                raise ValueError(f"{self.path / WEIGHTS}: {name} is {wrong}; an adapter here is on all layers alike")
        named = dataclasses.replace(recipe, names=tuple(names))
        return named.read(self.source, tuple(slice(0, size) for size in named.our_shape)).astype(np.float32)


def _part(recipe: Recipe, name: str, rank: int) -> Recipe:
    """The recipe of A or B beside that of the kernel: A has no heads, B's outputs are the kernel's."""
    outputs, inputs = recipe.shape
    shape = (rank, inputs) if name == "a" else (outputs, rank)
    return dataclasses.replace(recipe, shape=shape, heads=recipe.heads if name == "b" else None)


def adapted(published: Published, adapter: Adapter) -> Published:
    """The model with the adapter merged in, with RoPE and context as the adapter was trained with."""
    description = published.description
    config = dataclasses.replace(description.config, **adapter.changes)
    context = adapter.context or description.context
    adapter.params(config)  # whether it fits is known before anything is loaded

    def load(config: ModelConfig, parallel: Parallel) -> Transformer:
        wide = published.load_config(dataclasses.replace(config, param_dtype="float32"), parallel)
        made, tensors = adapter.params(config)
        abstract = lora.abstract(wide.config, made)
        flat = dict(nnx.to_flat_state(nnx.state(wide)))
        leaves = [(path, _leaf(leaf, tensors.get(path), flat.get(path))) for path, leaf in
                  nnx.to_flat_state(nnx.state(abstract))]  # fmt: skip
        whole = lora.merged(nnx.merge(nnx.graphdef(abstract), nnx.from_flat_state(leaves)))
        state = nnx.to_flat_state(nnx.state(whole))
        typed = [(path, leaf.replace(leaf.get_value().astype(config.storage_dtype))) for path, leaf in state]
        return nnx.merge(nnx.graphdef(Transformer.abstract(config)), nnx.from_flat_state(typed))

    fingerprint = f"{published.fingerprint}+{file_fingerprint(adapter.path)}"
    return dataclasses.replace(
        published, description=dataclasses.replace(description, config=config, context=context), _load=load,
        _fingerprint=fingerprint,
    )  # fmt: skip


def _leaf(abstract: nnx.Variable, tensor: np.ndarray | None, base: nnx.Variable | None) -> nnx.Variable:
    if tensor is None:
        return base
    if base is None:
        return abstract.replace(jnp.asarray(tensor))
    return base.replace(jnp.asarray(tensor, device=base.get_value().sharding))


def save_adapter(
    model: Transformer, made: LoraConfig, folder: str | Path, *, base: str, context: int | None = None,
    base_config: ModelConfig | None = None, dtype: str = "float32",
) -> Path:  # fmt: skip
    """Writes the adapters of `model`, and what is trained whole beside them; gives the folder.

    `base_config` is that of the model they were made for, if RoPE or the window changed since. The folder appears when
    it is whole. Raises FileExistsError where there is one, NotImplementedError for an adapter on a layer that Hugging
    Face's LLaMA does not have.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; give another name, or remove it")
    text = dataclasses.replace(model.config, vision_vocab_size=0)
    trained, _ = lora.split_trained(nnx.state(model), made)
    recipes, tensors = hf_recipes(text), {}
    for path, leaf in nnx.to_flat_state(trained):
        tensors |= _tensors(path, np.asarray(leaf.get_value(), np.float32), recipes)
    saved = {name: np.ascontiguousarray(x).astype(jnp.dtype(dtype)) for name, x in tensors.items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as unfinished:
        parts = Path(unfinished, "folder")
        parts.mkdir()
        (parts / CONFIG).write_text(json.dumps(_fields(made, tensors, base), indent=2) + "\n")
        changes = _changes(model.config, base_config or model.config)
        (parts / CHANGES).write_text(json.dumps({"context": context, "model": changes}, indent=2) + "\n")
        save_file(saved, parts / WEIGHTS, metadata={"format": "pt"})
        (parts / WEIGHTS).chmod((parts / CONFIG).stat().st_mode)  # safetensors makes it readable to its owner only
        parts.rename(folder)
    return folder


def _tensors(path: Names, value: np.ndarray, recipes: Mapping[Names, Recipe]) -> dict[str, np.ndarray]:
    """PEFT's tensors of one of our parameters: one, or one a layer."""
    low = path[-2] == "low_rank"
    recipe = recipes.get((*path[:-2], "kernel") if low else path)
    if recipe is None:
        raise NotImplementedError(f"{'.'.join(path)}: Hugging Face's LLaMA has no such layer, so PEFT can't name it")
    names = [f"{_PREFIX}{name}" for name in recipe.names]
    if low:
        names = [name.removesuffix(".weight") + (_A if path[-1] == "a" else _B) for name in names]
        recipe = _part(recipe, path[-1], value.shape[-1 if path[-1] == "a" else -2])
    return {name: recipe.write(one) for name, one in zip(names, value if recipe.stacked else [value])}


def _fields(made: LoraConfig, tensors: Mapping[str, np.ndarray], base: str) -> dict[str, Any]:
    """adapter_config.json, as PEFT reads it."""
    adapters = {name.removesuffix(_A).split(".")[-1] for name in tensors if name.endswith(_A)}
    whole = {name.split(".")[-2] for name in tensors if not name.endswith((_A, _B))}
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": made.rank, "lora_alpha": made.alpha, "lora_dropout": 0.0, "use_rslora": made.rank_stabilised,
        "bias": "none", "fan_in_fan_out": False, "target_modules": sorted(adapters),
        "modules_to_save": sorted(whole) or None,
    }  # fmt: skip


def _changes(config: ModelConfig, base: ModelConfig) -> dict[str, Any]:
    ours, theirs = dataclasses.asdict(config), dataclasses.asdict(base)
    return {name: ours[name] for name in _CHANGED if ours[name] != theirs[name]}


def _read_changes(file: Path) -> tuple[dict[str, Any], int | None]:
    """Fields of the model, and the context, that our own file says; none without it."""
    if not file.is_file():
        return {}, None
    fields = read_json(file)
    changes, context = fields.get("model", {}), fields.get("context")
    unknown = [name for name in changes if name not in _CHANGED] if isinstance(changes, dict) else ["model"]
    if unknown or not (context is None or (type(context) is int and 1 <= context < 2**31)):
        faults = listed([*unknown, f"context {brief(context)}"])
        raise ValueError(f"{file}: {faults}: only {', '.join(_CHANGED)} may change")
    try:
        if changes.get("rope_scaling") is not None:
            changes = {**changes, "rope_scaling": RopeScaling(**changes["rope_scaling"])}
        ModelConfig(width=2, ffn_width=1, layers=1, heads=1, **changes)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None
    return changes, context


def _is_scale(alpha: Any) -> bool:
    return isinstance(alpha, (int, float)) and not isinstance(alpha, bool) and 0 < alpha < 1e300


def _refuse(fields: Mapping[str, Any], where: Path) -> None:
    """Raises NotImplementedError for what is not plain LoRA."""
    if fields.get("peft_type") != "LORA":
        kind = brief(fields.get("peft_type"))
        raise NotImplementedError(f"{where}: peft_type {kind} is not supported: only LORA is read")
    for name, value in fields.items():
        if name in _NEUTRAL:
            if not any(type(value) is type(x) and value == x for x in _NEUTRAL[name]):
                rule = " or ".join(map(repr, _NEUTRAL[name]))
                raise NotImplementedError(f"{where}: {name} {brief(value)} is not supported; only {rule}")
        elif name not in _HARMLESS and value:
            raise NotImplementedError(f"{where}: {name[:80]} {brief(value)} is unknown here; it may change the maths")
