"""The digits of the sample data as codes of their own image tokenizer."""

from functools import cache

from ringjax.data import samples


@cache
def digit_rows(split: samples.Split) -> tuple[list[dict], int]:
    """Rows of `caption` (the digit in words) and `vision` (its codes), and how many codes the codebook has."""
    from ringjax.models.vqgan import encode_pictures, load_vqgan

    tokenizer = load_vqgan(samples.path("digits_vqgan.safetensors"))
    images, labels = samples.digits(split)
    codes = encode_pictures(tokenizer, images)
    rows = [
        {"caption": samples.digit_caption(label), "vision": grid.ravel()}
        for label, grid in zip(labels, codes, strict=True)
    ]
    return rows, tokenizer.config.codes
