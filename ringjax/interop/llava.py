"""Hugging Face's folders of LLaVA-1.5, in the names of all versions of transformers.

    language model   language_model.model.layers.0…      model.language_model.layers.0…       from 4.52
                     language_model.lm_head.weight       lm_head.weight
    vision           vision_tower.vision_model.…         model.vision_tower.vision_model.…    (5: no vision_model)
    projector        multi_modal_projector.…             model.multi_modal_projector.…
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from ringjax.interop.hf import left_aside
from ringjax.interop.hf_config import check_kinds
from ringjax.interop.llava_config import LlavaDescription, read_llava_config, read_preprocessing
from ringjax.interop.load import load_module
from ringjax.interop.names import HF_OUTER, Recipe, hf_recipes
from ringjax.interop.tensors import SafetensorsSource, read_json
from ringjax.models.clip import ClipConfig, Preprocessing
from ringjax.models.llava import Llava, LlavaConfig
from ringjax.models.parallel import Parallel

_ONE_DEVICE = Parallel()
_PATH = tuple[str, ...]

_CLIP_OUTER = {
    "patch_kernel": "embeddings.patch_embedding.weight",
    "class_token": "embeddings.class_embedding",
    "position": "embeddings.position_embedding.weight",
    "norm_in/kernel": "pre_layrnorm.weight",  # sic
    "norm_in/bias": "pre_layrnorm.bias",
}
_CLIP_NORMS = {"norm1": "layer_norm1", "norm2": "layer_norm2"}
_CLIP_LINEAR = {
    "wq": "self_attn.q_proj", "wk": "self_attn.k_proj", "wv": "self_attn.v_proj", "wo": "self_attn.out_proj",
    "fc1": "mlp.fc1", "fc2": "mlp.fc2",
}  # fmt: skip
# Of the vision transformer, what features don't need: what pools, blocks behind them, and a buffer of old files.
_CLIP_UNUSED = re.compile(r"post_layernorm\.(weight|bias)|embeddings\.position_ids")
_CLIP_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class _Names:
    """What comes before the names of each part's tensors in a file."""

    language: str
    head: str
    vision: str
    projector: str

    @classmethod
    def of(cls, names: Iterable[str]) -> "_Names":
        names = list(names)
        new = any(name.startswith(("model.language_model.", "model.vision_tower.")) for name in names)
        outer = "model." if new else ""
        language, head = ("model.language_model.", "") if new else ("language_model.model.", "language_model.")
        vision = f"{outer}vision_tower."
        if any(name.startswith(f"{vision}vision_model.") for name in names):
            vision += "vision_model."
        return cls(language, head, vision, f"{outer}multi_modal_projector.")

    def text(self, name: str) -> str:
        """The name of a tensor that a language model alone would call `name`."""
        return self.head + name if name.startswith("lm_head.") else self.language + name.removeprefix("model.")


def read_llava(folder: str | Path) -> LlavaDescription:
    """What config.json says, and generation_config.json of the tokens that end an answer."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json; is it a Hugging Face model folder?")
    found = read_llava_config(read_json(folder / "config.json"), str(folder / "config.json"))
    if (folder / "generation_config.json").is_file():
        ends = read_json(folder / "generation_config.json").get("eos_token_id")
        if ends is not None:
            check_kinds({"eos_token_id": ends}, str(folder / "generation_config.json"))
            ends = tuple(ends) if isinstance(ends, list) else (ends,)
            found = dataclasses.replace(found, text=dataclasses.replace(found.text, eos_ids=ends))
    return found


def read_folder_preprocessing(folder: str | Path, config: LlavaConfig) -> Preprocessing:
    """How the folder's pictures are prepared. Raises ValueError where that does not give what the model takes."""
    folder = Path(folder)
    where, nested = folder / "preprocessor_config.json", folder / "processor_config.json"
    fields = read_json(where) if where.is_file() else None
    if fields is None and nested.is_file():  # transformers 5 writes all processors into one file
        where, fields = nested, read_json(nested).get("image_processor")
    if not isinstance(fields, dict):
        raise FileNotFoundError(f"{folder} has no preprocessor_config.json, which says how pictures are prepared")
    found = read_preprocessing(fields, str(where))
    size = (config.vision.image_size,) * 2
    if (found.crop or found.resize) != size:
        made = found.crop or found.resize
        raise ValueError(f"{where}: pictures become {made}, and the vision transformer takes {size}")
    return found


def load_llava(
    folder: str | Path, parallel: Parallel = _ONE_DEVICE, *, dtype: str = "float32", param_dtype: str = "float32"
) -> Llava:
    """The model of a LLaVA folder, streamed to the devices of `parallel`.

    Raises FileNotFoundError for missing files, ValueError for damaged ones or tensors that do not fit config.json,
    NotImplementedError for a model that this library does not have.
    """
    config = with_types(read_llava(folder).config, dtype, param_dtype)
    source = SafetensorsSource(folder)
    names = _Names.of(source.shapes)
    aside = left_aside(source, config.text, {ours: names.text(name) for ours, name in HF_OUTER.items()})

    def ignored(name: str) -> bool:
        part = name.removeprefix(names.vision)
        if part == name:
            return aside(name)
        layer = _CLIP_LAYER.match(part)
        return bool(_CLIP_UNUSED.fullmatch(part)) or (layer is not None and int(layer[1]) >= config.vision.layers)

    return load_module(Llava.abstract(config), source, llava_recipes(config, names), parallel, ignored=ignored)


def with_types(config: LlavaConfig, dtype: str, param_dtype: str) -> LlavaConfig:
    """The same model in other types."""
    text, vision = (dataclasses.replace(x, dtype=dtype, param_dtype=param_dtype) for x in (config.text, config.vision))
    return dataclasses.replace(config, text=text, vision=vision)


def llava_recipes(config: LlavaConfig, names: _Names) -> dict[_PATH, Recipe]:
    """The recipe of every parameter of a LLaVA."""
    language = {
        ("language", *path): dataclasses.replace(recipe, names=tuple(map(names.text, recipe.names)))
        for path, recipe in hf_recipes(config.text).items()
    }
    vision = {("vision", *path): recipe for path, recipe in _clip_recipes(config.vision, names.vision).items()}
    return language | vision | _projector_recipes(config, names.projector)


def _clip_recipes(config: ClipConfig, before: str) -> dict[_PATH, Recipe]:
    width, inner, size = config.width, config.ffn_width, config.patch_size
    shapes: Mapping[str, tuple[int, ...]] = {
        "patch_kernel": (width, config.channels, size, size),
        "position": (1 + config.patches, width),
    }
    found = {
        tuple(path.split("/")): Recipe((before + name,), shapes.get(path, (width,)), False, path == "patch_kernel")
        for path, name in _CLIP_OUTER.items()
    }

    def layers(name: str) -> tuple[str, ...]:
        return tuple(f"{before}encoder.layers.{i}.{name}" for i in range(config.layers))

    for ours, theirs in _CLIP_NORMS.items():
        found["h", ours, "kernel"] = Recipe(layers(f"{theirs}.weight"), (width,), True)
        found["h", ours, "bias"] = Recipe(layers(f"{theirs}.bias"), (width,), True)
    sizes = {"fc1": (inner, width), "fc2": (width, inner)}
    for ours, theirs in _CLIP_LINEAR.items():
        shape = sizes.get(ours, (width, width))
        found["h", ours, "kernel"] = Recipe(layers(f"{theirs}.weight"), shape, True, transposed=True)
        found["h", ours, "bias"] = Recipe(layers(f"{theirs}.bias"), shape[:1], True)
    return found


def _projector_recipes(config: LlavaConfig, before: str) -> dict[_PATH, Recipe]:
    width, inputs = config.text.width, len(config.depths) * config.vision.width
    found = {}
    for ours, theirs, shape in (("linear1", "linear_1", (width, inputs)), ("linear2", "linear_2", (width, width))):
        found["projector", ours, "kernel"] = Recipe((f"{before}{theirs}.weight",), shape, False, transposed=True)
        if config.projector_bias:
            found["projector", ours, "bias"] = Recipe((f"{before}{theirs}.bias",), shape[:1], False)
    return found
