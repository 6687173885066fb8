"""Tiny LLaVAs, the same with and without PyTorch: config.json, weights drawn by NumPy, pictures and prompts."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.interop import families

IMAGE_TOKEN, LENGTH, PADDED = 60, 48, 31
_TEXT = families.FAMILIES["llama2"]
_VISION = {
    "model_type": "clip_vision_model", "hidden_size": 20, "intermediate_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 2, "image_size": 12, "patch_size": 4, "projection_dim": 16,
}  # fmt: skip
_LLAVA = {
    "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "image_token_index": IMAGE_TOKEN,
    "text_config": _TEXT, "vision_config": _VISION, "projector_hidden_act": "gelu", "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default", "image_seq_length": 9, "ignore_index": -100,
}  # fmt: skip

FAMILIES = {
    "llava": _LLAVA,
    "llava full": {
        **_LLAVA, "text_config": families.FAMILIES["mistral"], "projector_hidden_act": "gelu_pytorch_tanh",
        "vision_config": {**_VISION, "hidden_act": "gelu", "layer_norm_eps": 1e-3}, "vision_feature_layer": [-3, 3],
        "vision_feature_select_strategy": "full", "multimodal_projector_bias": False, "image_seq_length": 10},
}  # fmt: skip


def features(fields: dict) -> int:
    """Image tokens of a picture."""
    return 9 + (fields["vision_feature_select_strategy"] == "full")


def weights(fields: dict) -> dict[str, np.ndarray]:
    """Hugging Face's tensors, as versions before 4.52 call them, large enough that every part of them matters."""
    draw = np.random.default_rng(11).standard_normal
    vision, width = fields["vision_config"], fields["text_config"]["hidden_size"]
    inner, hidden = vision["hidden_size"], vision["intermediate_size"]

    def linear(name: str, out: int, inputs: int, bias: bool = True) -> dict[str, np.ndarray]:
        made = {f"{name}.weight": 2 * draw((out, inputs)) / inputs**0.5} | ({f"{name}.bias": draw(out)} if bias else {})
        return {name: x.astype(np.float32) for name, x in made.items()}

    def norm(name: str) -> dict[str, np.ndarray]:
        made = {f"{name}.weight": 1 + 0.3 * draw(inner), f"{name}.bias": 0.3 * draw(inner)}
        return {name: x.astype(np.float32) for name, x in made.items()}

    found = {f"language_model.{name}": x for name, x in families.weights(fields["text_config"]).items()}
    before, size = "vision_tower.vision_model.", vision["patch_size"]
    found |= {
        f"{before}embeddings.class_embedding": draw(inner).astype(np.float32),
        f"{before}embeddings.patch_embedding.weight": draw((inner, 3, size, size)).astype(np.float32) / 4,
        f"{before}embeddings.position_embedding.weight": draw((10, inner)).astype(np.float32),
    }
    found |= norm(f"{before}pre_layrnorm") | norm(f"{before}post_layernorm")
    for i in range(vision["num_hidden_layers"]):
        layer = f"{before}encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= linear(f"{layer}self_attn.{name}", inner, inner)
        found |= linear(f"{layer}mlp.fc1", hidden, inner) | linear(f"{layer}mlp.fc2", inner, hidden)
        found |= norm(f"{layer}layer_norm1") | norm(f"{layer}layer_norm2")
    chosen, bias = fields["vision_feature_layer"], fields.get("multimodal_projector_bias", True)
    inputs = inner * (len(chosen) if isinstance(chosen, list) else 1)
    found |= linear("multi_modal_projector.linear_1", width, inputs, bias)
    last = linear("multi_modal_projector.linear_2", width, width, bias)
    return found | {name: x / 8 for name, x in last.items()}  # features about as large as the vectors of tokens


def renamed(tensors: dict[str, np.ndarray], scheme: str) -> dict[str, np.ndarray]:
    """The tensors as `4.51`, `4.52`, `5` (in memory) or `5 saved` call them."""

    def new(name: str) -> str:
        if scheme.startswith("5"):
            name = name.replace("vision_tower.vision_model.", "vision_tower.")
        if scheme in ("4.51", "5 saved"):
            return name
        name = name.replace("language_model.model.", "language_model.").replace("language_model.lm_head", "lm_head")
        return name if name.startswith("lm_head") else f"model.{name}"

    return {new(name): x for name, x in tensors.items()}


def write(folder: Path, fields: dict, tensors: dict[str, np.ndarray] | None = None) -> Path:
    """The folder of a model; `tensors` in place of its own weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(weights(fields) if tensors is None else tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def tokens(size: int) -> np.ndarray:
    """Two rows: with two pictures, one of them amid text; with one picture and padding from PADDED on.

    `size` is how many tokens stand for a picture.
    """
    ids = np.random.default_rng(5).integers(0, IMAGE_TOKEN, (2, LENGTH), np.int32)
    for row, first in ((0, 3), (0, 20), (1, 1)):
        ids[row, first : first + size] = IMAGE_TOKEN
    return ids


def pixels() -> np.ndarray:
    """The pictures, `[3, 12, 12, 3]`: two of row 0, then that of row 1."""
    return np.random.default_rng(6).standard_normal((3, 12, 12, 3)).astype(np.float32)


def pixels_by_row() -> np.ndarray:
    """`[2, 2, 12, 12, 3]`: the second picture of row 1 is none's."""
    found = pixels()
    return np.stack([found[:2], np.stack([found[2], 0 * found[2]])])


def pictures() -> list[np.ndarray]:
    """Of many shapes, uint8 `[H, W, 3]`."""
    draw = np.random.default_rng(8).integers
    return [draw(0, 256, (*shape, 3), np.uint8) for shape in ((12, 12), (9, 31), (50, 20), (7, 8), (33, 33))]


_CLIP = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 12},
         "crop_size": {"height": 12, "width": 12}}  # fmt: skip
PROCESSORS = {
    "clip": _CLIP,
    "small": {**_CLIP, "size": {"shortest_edge": 9}, "resample": 2, "image_mean": [0.5, 0.4, 0.3]},
    "square": {**_CLIP, "size": {"height": 12, "width": 12}, "do_center_crop": False, "do_normalize": False},
    "padded": {**_CLIP, "image_processor_type": "LlavaImageProcessor", "do_pad": True, "resample": 1},
}
