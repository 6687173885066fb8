"""`ringjax convert SOURCE TARGET`: weights from one form to another.

    SOURCE   a Hugging Face folder, a .gguf file, an LWM stream (.msgpack), or the folder of a run of `ringjax train`
    TARGET   the name of a Hugging Face folder, or of an LWM stream (….msgpack); with --adapter true that of a folder
             with the adapters alone of a run with `lora`, in PEFT's form

A run that knows pictures goes into a folder with its tokenizers (release.py), or as text alone (`--text_only`). And
LWM's VQGAN, a pickle that is read without being executed, to the .safetensors that `--image_tokenizer` takes; such a
file to one in bfloat16.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ringjax.interop import lwm
from ringjax.interop.hf import save_hf
from ringjax.interop.load import load_params
from ringjax.interop.peft import WEIGHTS, save_adapter
from ringjax.interop.published import is_published, open_published
from ringjax.interop.release import save_release
from ringjax.interop.runs import Checkpoint, is_run
from ringjax.models.transformer import Transformer
from ringjax.models.vqgan import load_vqgan, save_vqgan

LWM_SUFFIX, VQGAN_SUFFIX = ".msgpack", ".safetensors"


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """Weights of other projects in and out."""

    source: str
    """A Hugging Face folder, a .gguf file, an LWM stream (.msgpack), LWM's VQGAN (a pickle) or a run folder."""
    target: str
    """The name of a Hugging Face folder, of an LWM stream (….msgpack) or of a VQGAN (….safetensors): a new one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the weights that are written."""
    shard_gib: float = 5.0
    """A Hugging Face folder's files are at most this large, each."""
    text_only: bool = False
    """Leave the vision tables of an any-to-any model out: Hugging Face's LLaMA has none."""
    heads: int | None = None
    """For an LWM stream, which doesn't say: query heads; null: those of LWM's size with its shapes."""
    rope_theta: float | None = None
    """For an LWM stream, which doesn't say: RoPE's base; null: 10000."""
    context: int | None = None
    """Tokens of the context, for config.json; null: what the source says (an LWM stream says nothing)."""
    stage: str | None = None
    """Of a run: the stage whose last checkpoint is taken; null: the last."""
    adapter: bool = False
    """Of a run with `lora`: its adapters alone, as PEFT has them; false: merged into the model."""
    base: str | None = None
    """What the adapters are said to belong to, such as a model's name on a hub; null: the path that the run has."""
    scanned: bool = True
    """For an LWM stream: whether the layers are stacked, as LWM publishes them."""

    def __post_init__(self):
        if not self.shard_gib > 0:
            raise ValueError(f"shard_gib {self.shard_gib} must be above 0")
        if self.base is not None and not self.base.strip():
            raise ValueError(f"base {self.base!r} names no model; give a name such as org/model, or leave it out")
        for name in ("heads", "context"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")


@dataclasses.dataclass(frozen=True)
class _Source:
    model: Transformer
    context: int | None
    tokenizer: Path | Mapping[str, str] | None = None
    tokens: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def run_convert(config: ConvertConfig) -> str:
    """Converts, and says what was written.

    Raises FileExistsError for a target that is there, and what reading the source raises.
    """
    target = Path(config.target)
    if target.exists():
        raise FileExistsError(f"{target} is there already; give another name, or remove it")
    _check_options(config, Path(config.source), target)
    if config.adapter:
        return _write_adapter(config, target)
    if target.suffix == VQGAN_SUFFIX:
        return _write_vqgan(config, target)
    if _is_whole(config, target):
        found = Checkpoint.find(config.source, config.stage)
        save_release(found, target, dtype=config.dtype)
        size = sum(file.stat().st_size for file in target.rglob("*"))
        return f"{config.source} -> {target}: text and pictures with their tokenizers, {size / 1e6:.1f} MB"
    source = _read(config)
    model, what = source.model, f"{config.source} -> {target}"
    if config.text_only and model.vte is not None:
        model = text_part(model)
    if target.suffix == LWM_SUFFIX:
        _write_lwm(model, target, config)
        return f"{what}: an LWM stream, {config.dtype}, {'scanned' if config.scanned else 'a tensor a layer'}"
    context = config.context or source.context
    if context is None:
        raise ValueError(f"{config.source} does not say its context, and config.json must: give --context TOKENS")
    save_hf(
        model, target, context=context, dtype=config.dtype, shard_bytes=int(config.shard_gib * 2**30),
        tokenizer=source.tokenizer, tokens=source.tokens,
    )  # fmt: skip
    files = sorted(target.glob("*.safetensors"))
    total = sum(file.stat().st_size for file in files)
    return f"{what}: a Hugging Face folder, {config.dtype}, {total / 2**30:.2f} GiB in {len(files)} file(s)"


def _is_whole(config: ConvertConfig, target: Path) -> bool:
    """Whether text and pictures go into a folder together: a run that knows both, not into a form of others'."""
    if not is_run(config.source) or config.text_only or target.suffix == LWM_SUFFIX:
        return False
    return Checkpoint.find(config.source, config.stage).config.vision_vocab_size > 0


def _write_vqgan(config: ConvertConfig, target: Path) -> str:
    if Path(config.source).suffix == VQGAN_SUFFIX:
        save_vqgan(load_vqgan(config.source), target, dtype=config.dtype)
        return f"{config.source} -> {target}: an image tokenizer, {config.dtype}"
    from ringjax.interop.pickled import load_vqgan_pickle

    save_vqgan(load_vqgan_pickle(config.source), target)
    return f"{config.source} -> {target}: LWM's VQGAN, float32"


def _check_options(config: ConvertConfig, source: Path, target: Path) -> None:
    """Raises ValueError for an option that says nothing about this conversion: it would be ignored."""
    vqgan = target.suffix == VQGAN_SUFFIX
    from_stream, to_stream = _is_stream(source) and not vqgan, target.suffix == LWM_SUFFIX
    from_run, adapter = is_run(source), config.adapter
    folder = not (vqgan or to_stream or adapter or _is_whole(config, target))
    used = {
        "dtype": not vqgan or source.suffix == VQGAN_SUFFIX, "shard_gib": folder, "text_only": not (vqgan or adapter),
        "heads": from_stream, "rope_theta": from_stream, "context": folder or adapter, "scanned": to_stream,
        "stage": from_run, "adapter": from_run and not to_stream, "base": from_run and adapter,
    }  # fmt: skip
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, serves in used.items():
        value = getattr(config, name)
        if value != defaults[name] and not serves:
            raise ValueError(f"{name} {value} says nothing about {source.name} -> {target.name}; leave it out")


def _is_stream(source: Path) -> bool:
    return source.suffix == LWM_SUFFIX or (source.is_file() and source.suffix != ".gguf")


def _write_adapter(config: ConvertConfig, target: Path) -> str:
    found = Checkpoint.find(config.source, config.stage)
    if found.lora is None:
        raise ValueError(f"{config.source} trained the whole model and has no adapters; leave --adapter out")
    model, base = found.adapted(), found.info["base"]["path"] if config.base is None else config.base
    save_adapter(
        model, found.lora, target, base=base, context=config.context or found.stage.training.seq_len,
        base_config=found.base_config, dtype=config.dtype,
    )  # fmt: skip
    size = (target / WEIGHTS).stat().st_size
    return f"{config.source} -> {target}: a LoRA adapter for {base}, {config.dtype}, {size / 1e6:.1f} MB"


def _write_lwm(model: Transformer, target: Path, config: ConvertConfig) -> None:
    if model.config.qkv_bias or model.config.tie_embeddings:
        what = "biases" if model.config.qkv_bias else "tied embeddings"
        raise NotImplementedError(f"an LWM stream has no {what}; write a Hugging Face folder")
    dtype = jnp.dtype(config.dtype)
    params = nnx.to_flat_state(nnx.state(model))
    arrays = ((path, lambda leaf=leaf: np.asarray(leaf.get_value()).astype(dtype)) for path, leaf in params)
    target.parent.mkdir(parents=True, exist_ok=True)
    lwm.save_lwm(arrays, target, scanned=config.scanned, layers=model.config.layers)


def text_part(model: Transformer) -> Transformer:
    """An any-to-any model without its vision table and head."""
    config = dataclasses.replace(model.config, vision_vocab_size=0)
    state = dict(nnx.to_flat_state(nnx.state(model)))
    kept = [(path, state[path]) for path, _ in nnx.to_flat_state(nnx.state(Transformer.abstract(config)))]
    return nnx.merge(nnx.graphdef(Transformer.abstract(config)), nnx.from_flat_state(kept))


def _read(config: ConvertConfig) -> _Source:
    source = Path(config.source)
    if _is_stream(source):
        return _read_lwm(config, source)
    if is_published(source):
        published = open_published(source)
        about = published.description
        ends = list(about.eos_ids) or None  # 0 is a token too
        tokens = {"bos_token_id": about.bos_id, "eos_token_id": ends[0] if ends and len(ends) == 1 else ends}
        return _Source(published.load(param_dtype=config.dtype), about.context, published.tokenizer, tokens)
    return _read_run(config, source)


def _read_lwm(config: ConvertConfig, path: Path) -> _Source:
    source = lwm.LwmSource(path)
    shape = dataclasses.replace(lwm.shape_of_stream(source, config.heads), param_dtype=config.dtype)
    if config.rope_theta is not None:
        shape = dataclasses.replace(shape, rope_theta=config.rope_theta)
    model = load_params(shape, source, lwm.lwm_recipes(shape, lwm.is_scanned(source)))
    return _Source(model, None)


def _read_run(config: ConvertConfig, folder: Path) -> _Source:
    if not is_run(folder):
        raise FileNotFoundError(
            f"{folder} is neither a run folder (config.yaml), a Hugging Face folder (config.json), a .gguf file nor an"
            f" LWM stream ({LWM_SUFFIX})"
        )
    found = Checkpoint.find(folder, config.stage)
    tokenizer = Path(found.data.tokenizer)
    model = found.load(dataclasses.replace(found.config, param_dtype=config.dtype))
    return _Source(model, found.stage.training.seq_len, tokenizer if tokenizer.exists() else None)
