"""Writes golden.npz: logits of Hugging Face's transformers for the models of `families`. Needs the extra `parity`.

    python -m tests.interop.make_golden
"""

import tempfile
from pathlib import Path

import numpy as np

from tests.interop import families

GOLDEN = Path(__file__).with_name("golden.npz")
# Positions that are kept: the last ones hold what all before them did.
KEPT = 6


def logits(folder: Path) -> np.ndarray:
    """Of both rows, float32 `[2, T, V]`; the padded part of the second one means nothing."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = families.tokens()
    mask = np.ones_like(ids)
    mask[1, families.PADDED :] = 0
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids).long(), attention_mask=torch.tensor(mask)).logits.numpy()


def ends(found: np.ndarray) -> np.ndarray:
    """The last KEPT positions of each row."""
    return np.stack([found[0, -KEPT:], found[1, families.PADDED - KEPT : families.PADDED]])


def main() -> None:
    golden = {}
    for name, fields in families.FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder:
            golden[name] = ends(logits(families.write(Path(folder), fields)))
        print(name, f"largest logit {np.abs(golden[name]).max():.1f}")
    np.savez_compressed(GOLDEN, **golden)


if __name__ == "__main__":
    main()
