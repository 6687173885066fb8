"""Which image tokenizer made the codes: a number from one codebook means nothing to another.

A data set records the fingerprint of the tokenizer that made it (`meta.json`); lines of codes have the one that the
config names (`data.vision_tokenizer`), or none that is known. All sources of a run must agree, its checkpoints record
it, and whatever reads pictures for such a checkpoint must have the same.
"""

import functools
from collections.abc import Iterable
from pathlib import Path

SAMPLE = "sample"


def vision_tokenizer_path(name: str) -> Path:
    """The file of an image tokenizer; `sample` is the digits' own."""
    from ringjax.data import samples

    return samples.path("digits_vqgan.safetensors") if name == SAMPLE else Path(name)


def tokenizer_fingerprint(name: str) -> str:
    """The fingerprint of an image tokenizer.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no image tokenizer.
    """
    path = vision_tokenizer_path(name)
    if not path.is_file():
        raise FileNotFoundError(f"vision_tokenizer {name!r} does not exist; give a VQGAN .safetensors, or 'sample'")
    return _fingerprint(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _fingerprint(path: Path, mtime_ns: int) -> str:
    from ringjax.models.vqgan import load_vqgan, vqgan_fingerprint

    return vqgan_fingerprint(load_vqgan(path))


def agreed(found: Iterable[tuple[str, str | None]]) -> str | None:
    """The one fingerprint of several `(what, fingerprint)`, None where none is known.

    Raises:
        ValueError: two of them differ; the message says which.
    """
    known: tuple[str, str] | None = None
    for what, fingerprint in found:
        if fingerprint is None:
            continue
        if known is not None and known[1] != fingerprint:
            raise ValueError(
                f"{what} has codes of image tokenizer {fingerprint[:12]} and {known[0]} of {known[1][:12]}: the same"
                " number is another piece of picture in each; tokenize the pictures again, all with one tokenizer"
            )
        known = what, fingerprint
    return None if known is None else known[1]
