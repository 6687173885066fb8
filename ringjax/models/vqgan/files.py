"""A VQGAN in a safetensors file: the config in the header, tensors under the names of the published Flax weights.

    encoder/DownsamplingBlock_0/ResnetBlock_1/Conv_0/kernel      encoder.levels[0].blocks[1].conv1.kernel
    decoder/UpsamplingBlock_2/Upsample_0/Conv_0/bias             decoder.levels[2].resize.conv.bias
    quantize/embeddings                                          codebook (none with finite scalar quantization)
"""

import hashlib
import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ringjax.json_text import parse_json
from ringjax.models.vqgan.config import VQGANConfig
from ringjax.models.vqgan.model import VQGAN

HEADER_KEY = "ringjax.vqgan"

_PUBLISHED = {
    "norm1": "GroupNorm_0",
    "conv1": "Conv_0",
    "norm2": "GroupNorm_1",
    "conv2": "Conv_1",
    "shortcut": "Conv_2",
    "conv": "Conv_0",
    "conv_in": "Conv_0",
    "conv_out": "Conv_1",
    "norm_out": "GroupNorm_0",
    "codebook": "quantize/embeddings",
}
_PUBLISHED_LISTS = {
    ("encoder", "levels"): "DownsamplingBlock_",
    ("decoder", "levels"): "UpsamplingBlock_",
    ("encoder", "blocks"): "ResnetBlock_",
    ("decoder", "blocks"): "ResnetBlock_",
    ("encoder", "middle"): "MidBlock_0/ResnetBlock_",
    ("decoder", "middle"): "MidBlock_0/ResnetBlock_",
}
_PUBLISHED_RESIZE = {"encoder": "Downsample_0", "decoder": "Upsample_0"}


def published_name(path: tuple[str | int, ...]) -> str:
    """The name of a parameter in LWM's published weights, from its path in our model."""
    half, name, steps = path[0], [], iter(path)
    for step in steps:
        if (half, step) in _PUBLISHED_LISTS:
            name.append(f"{_PUBLISHED_LISTS[half, step]}{next(steps)}")
        elif step == "resize":
            name.append(_PUBLISHED_RESIZE[half])
        else:
            name.append(_PUBLISHED.get(step, step))
    return "/".join(name)


def named_tensors(model: VQGAN) -> dict[str, np.ndarray]:
    """Every parameter in float32 under its published name, in alphabetical order."""
    flat = nnx.to_flat_state(nnx.state(model))
    return dict(sorted((published_name(path), np.asarray(value[...], np.float32)) for path, value in flat))


def save_vqgan(model: VQGAN, path: str | os.PathLike, *, dtype: str = "float32") -> None:
    """Write the model; the file appears whole or not at all.

    In bfloat16 it is half as large, and another tokenizer: near the border between two codes it takes the other one.
    """
    path = Path(path)
    tensors = {name: tensor.astype(jnp.dtype(dtype)) for name, tensor in named_tensors(model).items()}
    content = save(tensors, metadata={HEADER_KEY: json.dumps(model.config.plain(), sort_keys=True)})
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def load_vqgan(path: str | os.PathLike) -> VQGAN:
    """Read a model written by `save_vqgan`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no whole safetensors file, holds no VQGAN, or tensors are missing, unknown or misshapen.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no image tokenizer at {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            config = _read_config(path, file.metadata() or {})
            model = VQGAN.abstract(config)
            graph, state = nnx.split(model)
            wanted = {published_name(at): (at, value) for at, value in nnx.to_flat_state(state)}
            _check_tensors(path, {name: value.shape for name, (_, value) in wanted.items()}, file)
            loaded = [
                (at, value.replace(jnp.asarray(file.get_tensor(name).astype(np.float32))))
                for name, (at, value) in wanted.items()
            ]
    except SafetensorError as error:
        said = str(error)[:300]
        raise ValueError(f"{path} is not a whole safetensors file ({said}); copy or train it again") from None
    return nnx.merge(graph, nnx.from_flat_state(loaded))


def vqgan_fingerprint(model: VQGAN) -> str:
    """SHA-256 over config and weights: equal exactly when two tokenizers give the same codes for the same reason."""
    digest = hashlib.sha256(json.dumps(model.config.plain(), sort_keys=True).encode())
    for name, tensor in named_tensors(model).items():
        digest.update(f"{name}{tensor.shape}".encode())
        digest.update(tensor.astype("<f4").tobytes())
    return digest.hexdigest()


def _read_config(path: str | os.PathLike, header: dict[str, str]) -> VQGANConfig:
    if HEADER_KEY not in header:
        raise ValueError(f"{path} holds no ringjax VQGAN: its header has no {HEADER_KEY!r}")
    try:
        return VQGANConfig(**parse_json(header[HEADER_KEY]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: the VQGAN config in the header is not usable ({str(error)[:300]})") from None


def _check_tensors(path: str | os.PathLike, wanted: dict[str, tuple[int, ...]], file) -> None:
    found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    faults = [f"missing {name}" for name in wanted if name not in found]
    faults += [f"unknown {name}" for name in found if name not in wanted]
    for name in sorted(wanted.keys() & found.keys()):
        shape, dtype = tuple(found[name].get_shape()), found[name].get_dtype()
        if shape != wanted[name]:
            faults.append(f"{name} is {shape}, not {wanted[name]}")
        elif dtype not in ("F32", "BF16", "F16"):
            faults.append(f"{name} is {dtype}, not F32, BF16 or F16")
    if faults:
        shown = "; ".join(faults[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
        raise ValueError(f"{path} does not fit its config: {shown}")
