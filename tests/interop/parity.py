"""Prints the tables of docs/results/parity.md: our logits against those of Hugging Face's transformers.

    python -m tests.interop.parity                                 tiny models of each family, against golden.npz
    python -m tests.interop.parity --model FOLDER --text FILE      a real model, against transformers (extra `parity`)
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

from ringjax.interop.hf import load_hf
from tests.interop import families, make_golden


def logits(model, ids: np.ndarray) -> np.ndarray:
    """Float32, of every token of ids `[B, T]`."""
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    return np.asarray(model.text_logits(model.hidden(ids, np.zeros(ids.shape, bool), positions)))


def tiny() -> None:
    print("| family | largest difference | largest logit |\n| --- | --- | --- |")
    with np.load(make_golden.GOLDEN) as golden:
        for name, fields in families.FAMILIES.items():
            with tempfile.TemporaryDirectory() as folder:
                model = load_hf(families.write(Path(folder), fields))
            error = np.abs(make_golden.ends(logits(model, families.tokens())) - golden[name]).max()
            print(f"| {name} | {error:.1e} | {np.abs(golden[name]).max():.1f} |")


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
