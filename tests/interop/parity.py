"""Prints the tables of docs/results/parity.md: our logits against those of Hugging Face's transformers.

    python -m tests.interop.parity                                 tiny models, against golden.npz
    python -m tests.interop.parity --model FOLDER --text FILE      a real model, against transformers (extra `parity`)
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
from ringjax.models import Parallel
from ringjax.models.features import feature_index
from ringjax.models.llava import Llava
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
    found = {}
    for dtype in (torch.float64, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
        with torch.no_grad():
            found[dtype] = model(input_ids=torch.tensor(ids).long()).logits.numpy()
        del model
    exact, theirs = found[torch.float64], found[torch.float32]
    ours = logits(load_hf(folder), ids)
    print(f"{ids.shape[1]} tokens; the largest logit is {np.abs(exact).max():.1f}\n")
    print("| float32 of | largest difference from transformers in float64 | mean |\n| --- | --- | --- |")
    for name, x in (("ringjax", ours), ("transformers", theirs)):
        print(f"| {name} | {np.abs(x - exact).max():.1e} | {np.abs(x - exact).mean():.1e} |")
    same = (ours.argmax(-1) == exact.argmax(-1)).mean()
    print(f"\nThe likeliest next token is the same in {100 * same:.1f} % of places.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--text")
    parser.add_argument("--length", type=int, default=512)
    arguments = parser.parse_args()
    if (arguments.model is None) != (arguments.text is None):
        parser.error("--model and --text belong together")
    if arguments.model is None:
        tiny()
    else:
        real(arguments.model, arguments.text, arguments.length)


if __name__ == "__main__":
    main()
