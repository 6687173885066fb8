"""config.json and preprocessor_config.json of Hugging Face's LLaVA, read whole: what is not known here is refused.

    {"model_type": "llava", "text_config": {…}, "vision_config": {…}, "image_token_index": 32000,
     "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "projector_hidden_act": "gelu"}
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ringjax.interop.hf_config import Description, read_hf_config, refuse_unknown
from ringjax.json_text import brief
from ringjax.models.clip import ClipConfig, Preprocessing
from ringjax.models.llava import LlavaConfig

ARCHITECTURE = "LlavaForConditionalGeneration"

# What fields that are not there mean, by Hugging Face's classes: published files leave most of LLaMA's out.
_TEXT_DEFAULTS = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_VISION_DEFAULTS = {
    "model_type": "clip_vision_model", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_channels": 3, "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5, "initializer_range": 0.02,
}  # fmt: skip
# Where there is no vision_config at all.
_VISION_OF_LLAVA = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip
_DEFAULTS = {
    "image_token_index": 32000, "projector_hidden_act": "gelu", "vision_feature_select_strategy": "default",
    "vision_feature_layer": -2, "multimodal_projector_bias": True, "tie_word_embeddings": False,
}  # fmt: skip
_HARMLESS = {"ignore_index", "image_seq_length", "initializer_range", "vocab_size"}
_VISION_HARMLESS = {"attention_dropout", "dropout", "initializer_factor", "projection_dim", "vocab_size"}
_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
# transformers' default is BICUBIC for all of these; LLaVA's own pads to a square where the file says so.
_PROCESSORS = ("CLIPImageProcessor", "CLIPFeatureExtractor", "CLIPImageProcessorFast", "LlavaImageProcessor",
               "LlavaImageProcessorFast")  # fmt: skip
_PICTURE_DEFAULTS = {
    "do_resize": True, "size": {"shortest_edge": 224}, "resample": 3, "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224}, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": Preprocessing.mean, "image_std": Preprocessing.std, "do_convert_rgb": True, "do_pad": False,
}  # fmt: skip
_PICTURE_HARMLESS = {
    "_valid_processor_keys", "data_format", "default_to_square", "device", "disable_grouping", "feature_extractor_type",
    "image_processor_type", "image_seq_length", "input_data_format", "pad_size", "processor_class", "return_tensors",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LlavaDescription:
    """A published LLaVA: its shape, and of its language model also what `Description` says."""

    config: LlavaConfig
    text: Description


def read_llava_config(fields: Mapping[str, Any], where: str = "config.json") -> LlavaDescription:
    """The model that a config.json describes; in float32.

    Raises ValueError for a field that is wrong, NotImplementedError for a model that is no LLaVA-1.5, or a field that
    this library does not know: it may change what the model computes.
    """
    if fields.get("model_type") != "llava" or fields.get("architectures", [ARCHITECTURE]) != [ARCHITECTURE]:
        raise NotImplementedError(
            f"{where}: model_type {brief(fields.get('model_type'))}, architectures"
            f" {brief(fields.get('architectures'))}: this reads model_type 'llava',"
            f" architecture {ARCHITECTURE!r} (LLaVA-1.5)"
        )
    refuse_unknown(fields, {*_DEFAULTS, *_HARMLESS, "model_type", "text_config", "vision_config"}, where)
    found = {**_DEFAULTS, **fields}
    text = _text(found, where)
    try:
        depths = _depths(found, where)
        vision = _vision(found, max(depths), where)
        config = LlavaConfig(
            text.config, vision, found["image_token_index"], depths, found["vision_feature_select_strategy"],
            _activation(found["projector_hidden_act"], "projector_hidden_act", where),
            found["multimodal_projector_bias"],
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
    return LlavaDescription(config, text)


def _text(fields: Mapping[str, Any], where: str) -> Description:
    given = _section(fields, "text_config", where)
    tied = bool(fields["tie_word_embeddings"] or given.get("tie_word_embeddings"))
    defaults = _TEXT_DEFAULTS if given.get("model_type", "llama") == "llama" else {}
    return read_hf_config({**defaults, **given, "tie_word_embeddings": tied}, f"{where}, text_config")


def _vision(fields: Mapping[str, Any], layers: int, where: str) -> ClipConfig:
    given, where = _vision_fields(fields, where), f"{where}, vision_config"
    if given["model_type"] != "clip_vision_model":
        raise NotImplementedError(
            f"{where}: model_type {brief(given['model_type'])} is not supported: the vision transformer is CLIP's"
            " (clip_vision_model)"
        )
    refuse_unknown(given, {*_VISION_DEFAULTS, *_VISION_HARMLESS}, where)
    return ClipConfig(
        width=given["hidden_size"], ffn_width=given["intermediate_size"], layers=layers,
        heads=given["num_attention_heads"], image_size=given["image_size"], patch_size=given["patch_size"],
        channels=given["num_channels"], activation=_activation(given["hidden_act"], "hidden_act", where),
        norm_eps=given["layer_norm_eps"], init_std=given["initializer_range"],
    )  # fmt: skip


def _vision_fields(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    given = _section(fields, "vision_config", where)
    return {**_VISION_DEFAULTS, **(given or _VISION_OF_LLAVA)}


def _depths(fields: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """After how many blocks the features are taken; −1 is the last block's output."""
    layers, chosen = _vision_fields(fields, where)["num_hidden_layers"], fields["vision_feature_layer"]
    named = chosen if isinstance(chosen, list) else [chosen]
    whole = all(isinstance(x, int) and not isinstance(x, bool) for x in (layers, *named))
    if not named or not whole or not all(-layers <= x <= layers and x != 0 for x in named):
        raise ValueError(
            f"vision_feature_layer {brief(chosen)} must name outputs of the {brief(layers)} blocks of the vision"
            " transformer: from 1, or from -1 backwards"
        )
    return tuple(x % (layers + 1) for x in named)


def _section(fields: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    section = fields.get(name) or {}
    if not isinstance(section, dict):
        raise ValueError(f"{where}: {name} is a {type(section).__name__}, not an object")
    return section


def _activation(name: str, field: str, where: str) -> str:
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise NotImplementedError(f"{where}: {field} {brief(name)} is not supported: there are {known}")
    return _ACTIVATIONS[name]


def read_preprocessing(fields: Mapping[str, Any], where: str = "preprocessor_config.json") -> Preprocessing:
    """How pictures are prepared, by the fields of a preprocessor_config.json of CLIP or LLaVA.

    Raises ValueError for a field that is wrong, NotImplementedError for another processor or an unknown field.
    """
    kind = fields.get("image_processor_type") or fields.get("feature_extractor_type") or _PROCESSORS[0]
    if kind not in _PROCESSORS:
        raise NotImplementedError(f"{where}: image_processor_type {brief(kind)} is not one of {', '.join(_PROCESSORS)}")
    refuse_unknown(fields, {*_PICTURE_DEFAULTS, *_PICTURE_HARMLESS}, where)
    found = {**_PICTURE_DEFAULTS, **fields}
    if found["do_pad"] and not kind.startswith("Llava"):
        raise NotImplementedError(f"{where}: do_pad true is not supported for {kind}: only LLaVA's pads to a square")
    try:
        return Preprocessing(
            resize=_size(found["size"]) if found["do_resize"] else None,
            crop=_crop(found["crop_size"]) if found["do_center_crop"] else None,
            resample=found["resample"],
            rescale=found["rescale_factor"] if found["do_rescale"] else None,
            mean=tuple(found["image_mean"]) if found["do_normalize"] else None,
            std=tuple(found["image_std"]) if found["do_normalize"] else None,
            pad_to_square=bool(found["do_pad"]),
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def _size(size: Any) -> int | tuple[int, int]:
    if isinstance(size, int):
        return size
    given = {name: value for name, value in dict(size).items() if value is not None}
    if set(given) == {"shortest_edge"}:
        return given["shortest_edge"]
    if set(given) == {"height", "width"}:
        return given["height"], given["width"]
    raise ValueError(f"size {brief(size)} must have shortest_edge, or height and width")


def _crop(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    found = _size(size)
    if isinstance(found, int):
        raise ValueError(f"crop_size {brief(size)} must have height and width")
    return found
