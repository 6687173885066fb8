"""Tiny models of each family, the same with and without PyTorch: their config.json and weights drawn by NumPy.

`python -m tests.interop.make_golden` runs Hugging Face's transformers on them; `golden.npz` keeps what it found.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

LENGTH, PADDED = 48, 31
_SHAPE = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 128,
}  # fmt: skip
_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **_SHAPE}
_MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], **_SHAPE}
_QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **_SHAPE}

FAMILIES = {
    "llama2": {**_LLAMA, "num_key_value_heads": 6, "rms_norm_eps": 1e-5},
    "llama3": {**_LLAMA, "rope_theta": 500000.0, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0}},
    "linear": {**_LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "yarn": {**_LLAMA, "rope_theta": 10000.0, "rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    "yarn v5": {**_LLAMA, "rope_parameters": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "rope_theta": 5000.0,
        "beta_fast": 16, "beta_slow": 2, "truncate": False}},
    "wide heads": {**_LLAMA, "head_dim": 8},
    "tied": {**_LLAMA, "tie_word_embeddings": True},
    "mistral": {**_MISTRAL, "sliding_window": 20},
    "mistral full": {**_MISTRAL, "sliding_window": None},
    "qwen2": {**_QWEN2, "use_sliding_window": False},
    "qwen2 window": {**_QWEN2, "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 0},
}  # fmt: skip


def weights(fields: dict) -> dict[str, np.ndarray]:
    """Hugging Face's tensors of a model, large enough that every part of it matters."""
    draw = np.random.default_rng(7).standard_normal
    width, hidden, vocab = fields["hidden_size"], fields["intermediate_size"], fields["vocab_size"]
    head = fields.get("head_dim") or width // fields["num_attention_heads"]
    q, kv = fields["num_attention_heads"] * head, fields["num_key_value_heads"] * head
    linear = lambda out, inputs: (draw((out, inputs)) / inputs**0.5).astype(np.float32)  # noqa: E731
    norm = lambda: (1 + 0.3 * draw(width)).astype(np.float32)  # noqa: E731
    found = {"model.embed_tokens.weight": draw((vocab, width)).astype(np.float32), "model.norm.weight": norm()}
    if not fields.get("tie_word_embeddings"):
        found["lm_head.weight"] = 3 * linear(vocab, width)
    for i in range(fields["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name, shape in {
            "self_attn.q_proj": (q, width), "self_attn.k_proj": (kv, width), "self_attn.v_proj": (kv, width),
            "self_attn.o_proj": (width, q), "mlp.gate_proj": (hidden, width), "mlp.up_proj": (hidden, width),
            "mlp.down_proj": (width, hidden),
        }.items():  # fmt: skip
            found[f"{layer}{name}.weight"] = 2 * linear(*shape)
            if fields["model_type"] == "qwen2" and name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
                found[f"{layer}{name}.bias"] = draw(shape[0]).astype(np.float32)
        found[f"{layer}input_layernorm.weight"] = norm()
        found[f"{layer}post_attention_layernorm.weight"] = norm()
    return found


def write(folder: Path, fields: dict, tensors: dict[str, np.ndarray] | None = None) -> Path:
    """The folder of a model; `tensors` in place of its own weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(weights(fields) if tensors is None else tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def tokens(vocab: int = 64) -> np.ndarray:
    """Two rows; the second one is padded from PADDED on."""
    return np.random.default_rng(3).integers(0, vocab, (2, LENGTH), np.int32)
