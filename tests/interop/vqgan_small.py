"""A tiny `diffusers.VQModel` of aMUSEd's structure, the same with and without PyTorch."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

RESOLUTION = 16
FIELDS = {
    "_class_name": "VQModel", "_diffusers_version": "0.42.1", "act_fn": "silu", "block_out_channels": [8, 8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3, "in_channels": 3,
    "out_channels": 3, "latent_channels": 6, "vq_embed_dim": 5, "num_vq_embeddings": 32, "layers_per_block": 2,
    "norm_num_groups": 4, "norm_type": "group", "mid_block_add_attention": False, "lookup_from_codebook": True,
    "sample_size": RESOLUTION, "scaling_factor": 0.18215, "force_upcast": True,
}  # fmt: skip


def shapes() -> dict[str, tuple[int, ...]]:
    """Of every tensor, under the names of diffusers."""
    widths, z = FIELDS["block_out_channels"], FIELDS["latent_channels"]
    found: dict[str, tuple[int, ...]] = {}

    def conv(name: str, inputs: int, outputs: int, size: int = 3) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (outputs, inputs, size, size), (outputs,)

    def norm(name: str, width: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (width,), (width,)

    def resnet(name: str, inputs: int, outputs: int) -> None:
        norm(f"{name}.norm1", inputs)
        conv(f"{name}.conv1", inputs, outputs)
        norm(f"{name}.norm2", outputs)
        conv(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            conv(f"{name}.conv_shortcut", inputs, outputs, 1)

    def half(name: str, levels: list[int], first: int, last: int, blocks: int, level: str, resize: str) -> None:
        conv(f"{name}.conv_in", first, levels[0])
        for i in (0, 1):
            resnet(f"{name}.mid_block.resnets.{i}", widths[-1], widths[-1])
        before = levels[0]
        for i, width in enumerate(levels):
            for j in range(blocks):
                resnet(f"{name}.{level}.{i}.resnets.{j}", before, width)
                before = width
            if i < len(levels) - 1:
                conv(f"{name}.{level}.{i}.{resize}.0.conv", width, width)
        norm(f"{name}.conv_norm_out", before)
        conv(f"{name}.conv_out", before, last)

    half("encoder", widths, 3, z, 2, "down_blocks", "downsamplers")
    half("decoder", widths[::-1], z, 3, 3, "up_blocks", "upsamplers")
    conv("quant_conv", z, FIELDS["vq_embed_dim"], 1)
    conv("post_quant_conv", FIELDS["vq_embed_dim"], z, 1)
    found["quantize.embedding.weight"] = FIELDS["num_vq_embeddings"], FIELDS["vq_embed_dim"]
    return found


def weights() -> dict[str, np.ndarray]:
    """Drawn so that every part matters, and pictures stay within the range of pixels in most places."""
    draw = np.random.default_rng(4).standard_normal
    found = {}
    for name, shape in shapes().items():
        value = draw(shape)
        if len(shape) == 4:
            value *= 1.4 / np.prod(shape[1:]) ** 0.5
        elif len(shape) == 1:
            value *= 0.2
            value += ".weight" in name
        found[name] = value.astype(np.float32)
    found["decoder.conv_out.weight"] *= 0.4
    return found


def write(folder: Path, tensors: dict[str, np.ndarray] | None = None, **changes) -> Path:
    """The folder of the model; `changes` to its config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**FIELDS, **changes}))
    save_file(weights() if tensors is None else tensors, folder / "diffusion_pytorch_model.safetensors")
    return folder


def pixels() -> np.ndarray:
    """`[4, 16, 16, 3]`, in −1 … 1."""
    return np.random.default_rng(9).uniform(-1, 1, (4, RESOLUTION, RESOLUTION, 3)).astype(np.float32)
