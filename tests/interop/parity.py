"""Prints the tables of docs/results/parity.md: our logits against those of Hugging Face's transformers.

    python -m tests.interop.parity                                 tiny models, against golden.npz
    python -m tests.interop.parity --model FOLDER --text FILE      a real model, against transformers (extra `parity`)
    python -m tests.interop.parity --full_size                     LLaVA-1.5's vision transformer, random (the same)
"""

import argparse
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ringjax.attention import Reach, layouts
from ringjax.interop.hf import load_hf
from ringjax.interop.llava import load_llava
from ringjax.interop.llava_config import read_preprocessing
from ringjax.interop.vqgan import load_vqmodel
from ringjax.models import ModelConfig, Parallel
from ringjax.models.features import feature_index
from ringjax.models.llava import Llava
from ringjax.models.rope import frequencies
from ringjax.models.vqgan import VQGAN
from tests.interop import families, llava_small, make_golden, vqgan_small

_ONE_DEVICE = Parallel()


def logits(model, ids: np.ndarray) -> np.ndarray:
    """Float32, of every token of ids `[B, T]`."""
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    return np.asarray(model.text_logits(model.hidden(ids, np.zeros(ids.shape, bool), positions)))


def llava_logits(model: Llava, parallel: Parallel = _ONE_DEVICE) -> np.ndarray:
    """Float32 `[2, T, V]` of the rows of `llava_small`, in ascending order whatever the layout; 0 where padded."""
    ids = llava_small.tokens(model.config.features)
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    row = np.arange(ids.shape[1]) < np.asarray([[ids.shape[1]], [llava_small.PADDED]])
    order = layouts.get(parallel.layout)
    inputs = ids, feature_index(ids, llava_small.IMAGE_TOKEN), positions, np.where(row, positions, -1)
    ids, index, positions, behind = (order.permute(x.astype(np.int32), parallel.ring_size, 1) for x in inputs)

    @jax.jit
    def run(ids, index, positions, behind, pixels):
        reach = Reach(behind, jnp.zeros_like(behind), max_ahead=0)
        states = model.hidden(ids, pixels, index, positions, reach, parallel=parallel)
        return model.language.text_logits(states)

    found = np.asarray(run(ids, index, positions, behind, llava_small.pixels_by_row()))
    return order.restore(found, parallel.ring_size, 1) * row[..., None]


def llava_features(model: Llava) -> np.ndarray:
    """`[3, P, D]` of the pictures of `llava_small`."""
    return np.asarray(jax.jit(model.image_features)(llava_small.pixels()[:, None]))


def vqgan_parts(model: VQGAN) -> dict[str, np.ndarray]:
    """What `make_golden.vqgan` gives."""
    found = jax.jit(model)(jnp.asarray(vqgan_small.pixels()))
    return {"latents": found.latents, "codes": found.codes, "pictures": found.pixels}


def tiny() -> None:
    print("| family | largest difference | largest logit |\n| --- | --- | --- |")
    with np.load(make_golden.GOLDEN) as golden:
        for name, fields in families.FAMILIES.items():
            with tempfile.TemporaryDirectory() as folder:
                model = load_hf(families.write(Path(folder), fields))
            _row(name, make_golden.ends(logits(model, families.tokens())), golden[name])
        for name, fields in llava_small.FAMILIES.items():
            with tempfile.TemporaryDirectory() as folder:
                model = load_llava(llava_small.write(Path(folder), fields))
            _row(f"{name}: features of pictures", llava_features(model), golden[f"{name}, features"])
            _row(f"{name}: logits", llava_logits(model), golden[f"{name}, logits"])
        with tempfile.TemporaryDirectory() as folder:
            model = load_vqmodel(vqgan_small.write(Path(folder)), vqgan_small.RESOLUTION)
        for part, found in vqgan_parts(model).items():
            _row(f"VQGAN: {part}", found, golden[f"vqgan, {part}"])
        for name, fields in llava_small.PROCESSORS.items():
            prepare = read_preprocessing(fields)
            _row(f"pictures: {name}", [prepare(x) for x in llava_small.pictures()], golden[f"pictures, {name}"])


def _row(name: str, found, expected: np.ndarray) -> None:
    print(f"| {name} | {np.abs(np.asarray(found) - expected).max():.1e} | {np.abs(expected).max():.1f} |")


def real(folder: str, text: str, length: int) -> None:
    import tokenizers
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    ids = np.asarray([tokenizer.encode(Path(text).read_text("utf-8"), add_special_tokens=False).ids[:length]], np.int32)
    mine = load_hf(folder)
    found = {"float64": [], "float32": []}
    for dtype, results in found.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="eager")
        with torch.no_grad():
            results.append(model.eval()(input_ids=torch.tensor(ids).long()).logits.numpy())
            if dtype == "float64":
                model.model.rotary_emb.forward = _exact_rotations(mine.config)
                results.append(model(input_ids=torch.tensor(ids).long()).logits.numpy())
        del model
    references = found["float64"]
    ours = logits(mine, ids)
    print(f"{ids.shape[1]} tokens; the largest logit is {np.abs(references[0]).max():.1f}\n")
    print("| float32 of | from transformers in float64, its RoPE in float32 | mean | with RoPE in float64 | mean |")
    print("| --- | --- | --- | --- | --- |")
    for name, x in (("ringjax", ours), ("transformers", found["float32"][0])):
        errors = [np.abs(x - exact) for exact in references]
        print(f"| {name} | " + " | ".join(f"{e.max():.1e} | {e.mean():.1e}" for e in errors) + " |")
    same = (ours.argmax(-1) == references[0].argmax(-1)).mean()
    print(f"\nThe likeliest next token is the same in {100 * same:.1f} % of places.")


def _exact_rotations(config: ModelConfig):
    """transformers computes cosines and sines in float32, whatever the model's type; these are float64's."""
    import torch

    radians, factor = frequencies(config.head_size, config.rope_theta, config.rope_scaling)

    def forward(x, position_ids):
        angle = position_ids[..., None].double() * torch.tensor(radians)
        both = torch.cat([angle, angle], -1)
        return (factor * both.cos()).to(x.dtype), (factor * both.sin()).to(x.dtype)

    return forward


def full_size() -> None:
    """CLIP ViT-L/14 at 336 pixels with random weights: features of two pictures, beside transformers in float64."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4)
    theirs = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text)).eval()
    pixels = torch.randn(2, 3, 336, 336)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        theirs.save_pretrained(folder, max_shard_size="500MB")
        ours = jax.jit(load_llava(folder).image_features)(pixels.permute(0, 2, 3, 1).numpy()[:, None])
        single = torch.stack(theirs.get_image_features(pixels).pooler_output).numpy()
        exact = torch.stack(theirs.double().get_image_features(pixels.double()).pooler_output).numpy()
    print("| float32 of | largest difference from transformers in float64 | largest feature |\n| --- | --- | --- |")
    for name, x in (("ringjax", ours), ("transformers", single)):
        print(f"| {name} | {np.abs(x - exact).max():.1e} | {np.abs(exact).max():.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--text")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--full_size", action="store_true")
    arguments = parser.parse_args()
    if (arguments.model is None) != (arguments.text is None):
        parser.error("--model and --text belong together")
    if arguments.full_size:
        full_size()
    elif arguments.model is None:
        tiny()
    else:
        real(arguments.model, arguments.text, arguments.length)


if __name__ == "__main__":
    main()
