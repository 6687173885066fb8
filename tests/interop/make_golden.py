"""Writes golden.npz: what transformers and diffusers compute for the models of `families`, `llava_small` and
`vqgan_small`. Needs the extra `parity`.

    python -m tests.interop.make_golden
"""

import tempfile
from pathlib import Path

import numpy as np

from tests.interop import families, llava_small, vqgan_small

GOLDEN = Path(__file__).with_name("golden.npz")
# Positions that are kept: the last ones hold what all before them did.
KEPT = 6


def logits(folder: Path) -> np.ndarray:
    """Of both rows, float32 `[2, T, V]`; the padded part of the second one means nothing."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids, mask = families.tokens(), _mask(families.PADDED)
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids).long(), attention_mask=torch.tensor(mask)).logits.numpy()


def ends(found: np.ndarray) -> np.ndarray:
    """The last KEPT positions of each row."""
    return np.stack([found[0, -KEPT:], found[1, families.PADDED - KEPT : families.PADDED]])


def llava(folder: Path, fields: dict) -> dict[str, np.ndarray]:
    """Logits of both rows `[2, T, V]`, 0 where padded, and the features of the pictures `[3, P, D]`."""
    import torch
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    pixels = torch.tensor(llava_small.pixels().transpose(0, 3, 1, 2))
    ids, mask = llava_small.tokens(llava_small.features(fields)), _mask(llava_small.PADDED)
    with torch.no_grad():
        found = model.eval()(input_ids=torch.tensor(ids).long(), attention_mask=torch.tensor(mask), pixel_values=pixels)
        features = model.get_image_features(pixels).pooler_output
    return {"logits": found.logits.numpy() * mask[..., None], "features": torch.stack(features).numpy()}


def processed(fields: dict) -> np.ndarray:
    """The pictures as a processor of transformers prepares them with Pillow, `[n, h, w, 3]`."""
    from transformers import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    kind = LlavaImageProcessorPil if fields["image_processor_type"].startswith("Llava") else CLIPImageProcessorPil
    found = kind(**fields)(llava_small.pictures(), return_tensors="np", input_data_format="channels_last")
    return found["pixel_values"].transpose(0, 2, 3, 1)


def vqgan(folder: Path) -> dict[str, np.ndarray]:
    """Latents `[B, h, w, D]`, codes `[B, h, w]` and pictures `[B, H, W, C]`, not clipped."""
    import torch
    from diffusers import VQModel

    model = VQModel.from_pretrained(folder, torch_dtype=torch.float32).eval()
    with torch.no_grad():
        latents = model.encode(torch.tensor(vqgan_small.pixels().transpose(0, 3, 1, 2))).latents
        codes = model.quantize(latents)[2][2].reshape(len(latents), *latents.shape[2:])
        pictures = model.decode(latents).sample
    last = lambda x: x.permute(0, 2, 3, 1).numpy()  # noqa: E731
    return {"latents": last(latents), "codes": codes.numpy().astype(np.int32), "pictures": last(pictures)}


def _mask(padded: int) -> np.ndarray:
    mask = np.ones((2, families.LENGTH), np.int32)
    mask[1, padded:] = 0
    return mask


def main() -> None:
    golden = {}
    for name, fields in families.FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder:
            golden[name] = ends(logits(families.write(Path(folder), fields)))
    for name, fields in llava_small.FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder:
            found = llava(llava_small.write(Path(folder), fields), fields)
        golden |= {f"{name}, {part}": x for part, x in found.items()}
    golden |= {f"pictures, {name}": processed(fields) for name, fields in llava_small.PROCESSORS.items()}
    with tempfile.TemporaryDirectory() as folder:
        golden |= {f"vqgan, {part}": x for part, x in vqgan(vqgan_small.write(Path(folder))).items()}
    for name, x in golden.items():
        print(name, x.shape, f"largest {np.abs(x).max():.1f}")
    np.savez_compressed(GOLDEN, **golden)


if __name__ == "__main__":
    main()
