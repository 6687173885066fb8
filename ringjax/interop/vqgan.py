"""aMUSEd's image tokenizer as diffusers writes it (`VQModel`), which has the structure of LWM's.

    folder/config.json  diffusion_pytorch_model.safetensors

    encoder.down_blocks.0.resnets.1.conv1.weight     encoder.levels[0].blocks[1].conv1.kernel
    decoder.up_blocks.2.upsamplers.0.conv.bias       decoder.levels[2].resize.conv.bias
    quantize.embedding.weight                        codebook
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ringjax.interop.load import check_tensors
from ringjax.interop.names import Recipe
from ringjax.interop.tensors import SafetensorsSource, listed, read_json
from ringjax.json_text import brief
from ringjax.models.vqgan import VQGAN, VQGANConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"

_NAMES = {"shortcut": "conv_shortcut", "norm_out": "conv_norm_out", "middle": "mid_block.resnets", "blocks": "resnets"}
_LEVELS = {"encoder": ("down_blocks", "downsamplers.0"), "decoder": ("up_blocks", "upsamplers.0")}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
# What must be so, and what a field that is not there means.
_FIXED = {"act_fn": "silu", "norm_type": "group", "mid_block_add_attention": False}
_DEFAULTS = {
    "in_channels": 3, "out_channels": 3, "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"], "block_out_channels": [64], "layers_per_block": 1, "act_fn": "silu",
    "latent_channels": 3, "num_vq_embeddings": 256, "norm_num_groups": 32, "vq_embed_dim": None, "norm_type": "group",
    "mid_block_add_attention": True,
}  # fmt: skip
_HARMLESS = {
    "_class_name", "_diffusers_version", "_name_or_path", "force_upcast", "lookup_from_codebook", "sample_size",
    "scaling_factor",
}  # fmt: skip
_TENSORS_OF_A_BLOCK = 8  # two norms and two convolutions


def read_vqmodel_config(fields: Mapping[str, Any], resolution: int, where: str = "config.json") -> VQGANConfig:
    """The VQGAN that a config.json of diffusers describes, for pictures of `resolution`, which it doesn't say.

    Raises ValueError for a field that is wrong, NotImplementedError for another model or an unknown field.
    """
    if fields.get("_class_name") != "VQModel":
        kind = brief(fields.get("_class_name"))
        raise NotImplementedError(f"{where}: _class_name {kind} is not supported: VQModel is")
    unknown = sorted(set(fields) - set(_DEFAULTS) - _HARMLESS)
    if unknown:
        raise NotImplementedError(f"{where} has {listed(unknown)}, unknown here; it may change what the model computes")
    found = {**_DEFAULTS, **fields}
    _check_lists(found, where)
    for name, wanted in _FIXED.items():
        if found[name] != wanted:
            raise NotImplementedError(f"{where}: {name} {brief(found[name])} is not supported: it must be {wanted!r}")
    for name, wanted in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if set(found[name]) != {wanted} or len(found[name]) != len(found["block_out_channels"]):
            said = f"{name} {brief(found[name])} must be a {wanted} for each block_out_channels"
            raise NotImplementedError(f"{where}: {said}")
    if found["in_channels"] != found["out_channels"]:
        raise NotImplementedError(f"{where}: in_channels and out_channels differ")
    widths, z = found["block_out_channels"], found["latent_channels"]
    uneven = [width for width in widths if width % widths[0]]
    if uneven:
        raise NotImplementedError(f"{where}: block_out_channels {brief(widths)} must be multiples of the first")
    try:
        return VQGANConfig(
            resolution=resolution, channels=found["in_channels"], hidden=widths[0],
            multipliers=[width // widths[0] for width in widths], res_blocks=found["layers_per_block"], z_channels=z,
            codes=found["num_vq_embeddings"], code_dim=found["vq_embed_dim"] or z, norm_groups=found["norm_num_groups"],
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def _check_lists(found: Mapping[str, Any], where: str) -> None:
    """Raises ValueError where what is taken for a list of names or of widths is none."""
    for name in ("down_block_types", "up_block_types"):
        if not isinstance(found[name], list) or not all(isinstance(kind, str) for kind in found[name]):
            raise ValueError(f"{where}: {name} {brief(found[name])} is not a list of names")
    widths = found["block_out_channels"]
    if not isinstance(widths, list) or not widths or not all(type(width) is int and width > 0 for width in widths):
        raise ValueError(f"{where}: block_out_channels {brief(widths)} is not a list of widths")


def load_vqmodel(folder: str | Path, resolution: int = 256) -> VQGAN:
    """The VQGAN of a folder of diffusers, in float32.

    Raises FileNotFoundError for missing files, ValueError for damaged ones or tensors that do not fit config.json,
    NotImplementedError for a model of another structure.
    """
    folder = Path(folder)
    for name in ("config.json", WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; is it the folder of a diffusers VQModel?")
    config = read_vqmodel_config(read_json(folder / "config.json"), resolution, str(folder / "config.json"))
    source = SafetensorsSource(folder / WEIGHTS)
    _check_blocks(config, len(source.shapes), folder)
    graph, state = nnx.split(VQGAN.abstract(config))
    flat = dict(nnx.to_flat_state(state))
    recipes = {path: _recipe(path, leaf.get_value().shape) for path, leaf in flat.items()}
    check_tensors(source, recipes, lambda name: False)
    loaded = [(path, leaf.replace(_read(recipes[path], source))) for path, leaf in flat.items()]
    return nnx.merge(graph, nnx.from_flat_state(loaded))


def _check_blocks(config: VQGANConfig, tensors: int, folder: Path) -> None:
    """Raises ValueError where a file can hold no half of the blocks, before their shapes are worked out for seconds."""
    blocks = len(config.multipliers) * (2 * config.res_blocks + 1)
    if 2 * tensors < _TENSORS_OF_A_BLOCK * blocks:
        raise ValueError(
            f"{folder}: config.json describes {blocks} residual blocks of {_TENSORS_OF_A_BLOCK} tensors each, and"
            f" {WEIGHTS} holds {tensors} tensors; take both files from one model"
        )


def _recipe(path: tuple[str | int, ...], shape: tuple[int, ...]) -> Recipe:
    if path == ("codebook",):
        return Recipe(("quantize.embedding.weight",), shape, False)
    levels, resize = _LEVELS.get(path[0], ("", ""))
    named = {**_NAMES, "levels": levels, "resize": resize}
    name = ".".join(str(named.get(step, step)) for step in path[:-1])
    turned = len(shape) == 4
    theirs = (shape[3], shape[2], shape[0], shape[1]) if turned else shape
    return Recipe((f"{name}.{_LEAVES[path[-1]]}",), theirs, False, transposed=turned)


def _read(recipe: Recipe, source: SafetensorsSource) -> jnp.ndarray:
    found = recipe.read(source, tuple(slice(None) for _ in recipe.our_shape)).astype(np.float32)
    # A transposed kernel has its columns before its rows.
    return jnp.asarray(found.swapaxes(0, 1) if recipe.transposed else found)
