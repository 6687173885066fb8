"""What a VQGAN looks like."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from ringjax.json_text import brief

# Generous bounds, so that a size read from a damaged file is refused before anything is built from it.
_LARGEST = {"resolution": 4096, "channels": 16, "res_blocks": 16, "codes": 1 << 20}
_LARGEST_WIDTH = 8192


@dataclass(frozen=True)
class VQGANConfig:
    """Sizes of encoder, codebook and decoder. The defaults are those of LWM (and aMUSEd).

    Args:
        resolution: height and width of a picture.
        channels: 3 for colour, 1 for grey.
        hidden: channels of the first convolution.
        multipliers: channels of each level, in units of `hidden`; between two levels the picture halves.
        res_blocks: residual blocks a level in the encoder; the decoder has one more.
        z_channels: channels that leave the encoder and enter the decoder.
        codes: entries of the codebook.
        code_dim: length of a codebook entry.
        norm_groups: groups of every GroupNorm.
        levels: finite scalar quantization in place of a learned codebook: values of each latent dimension, such as
            (8, 8, 4, 4) for 1,024 codes; `codes` is their product and `code_dim` their number.

    Raises:
        ValueError: a size is not a positive int, or sizes do not divide each other or fit the levels.
    """

    resolution: int = 256
    channels: int = 3
    hidden: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 4, 6)
    res_blocks: int = 2
    z_channels: int = 64
    codes: int = 8192
    code_dim: int = 64
    norm_groups: int = 32
    levels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "multipliers", _as_tuple(self.multipliers))
        for field in fields(self):
            if field.name not in ("multipliers", "levels"):
                _check_size(field.name, getattr(self, field.name))
        for multiplier in self.multipliers:
            _check_size("multipliers", multiplier)
        if self.resolution % self.downscale:
            raise ValueError(
                f"resolution {self.resolution} is not divisible by {self.downscale}, "
                f"as {len(self.multipliers)} levels need; pad the picture or use fewer multipliers"
            )
        for multiplier in self.multipliers:
            if self.hidden * multiplier % self.norm_groups:
                raise ValueError(
                    f"hidden {self.hidden} · multiplier {multiplier} is not divisible by norm_groups {self.norm_groups}"
                )
        object.__setattr__(self, "levels", _checked_levels(self.levels, self.codes, self.code_dim))

    def plain(self) -> dict[str, Any]:
        """The fields as a file or a fingerprint holds them; what a codebook has no use for is left out."""
        found = asdict(self)
        if not self.levels:
            del found["levels"]
        return found

    @property
    def downscale(self) -> int:
        """How many pixels of a row fall on one code."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def grid(self) -> int:
        """Codes a row and a column."""
        return self.resolution // self.downscale

    @property
    def codes_per_picture(self) -> int:
        return self.grid**2

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, the finest first."""
        return tuple(self.hidden * multiplier for multiplier in self.multipliers)


def _as_tuple(multipliers: object) -> tuple[int, ...]:
    if not isinstance(multipliers, list | tuple) or not 1 <= len(multipliers) <= 12:
        raise ValueError(f"multipliers {brief(multipliers)} must be a list of 1 to 12 sizes, one a level")
    return tuple(multipliers)


def _checked_levels(levels: object, codes: int, code_dim: int) -> tuple[int, ...]:
    if not isinstance(levels, list | tuple) or len(levels) > 32:
        raise ValueError(f"levels {brief(levels)} must be a list of up to 32 numbers, one a latent dimension")
    for level in levels:
        if isinstance(level, bool) or not isinstance(level, int) or not 2 <= level <= 1024:
            raise ValueError(f"levels {brief(list(levels))}: {brief(level)} must be an int from 2 to 1024")
    if levels and (math.prod(levels), len(levels)) != (codes, code_dim):
        raise ValueError(
            f"levels {list(levels)} make {math.prod(levels)} codes of {len(levels)} dimensions, not codes {codes} and"
            f" code_dim {code_dim}; set these to {math.prod(levels)} and {len(levels)}, or levels to [] for a codebook"
        )
    return tuple(levels)


def _check_size(name: str, size: object) -> None:
    largest = _LARGEST.get(name, _LARGEST_WIDTH)
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= largest:
        raise ValueError(f"{name} {brief(size)} must be an int from 1 to {largest}")


LWM = VQGANConfig()
"""256 × 256 colour to 16 × 16 codes of 8,192: 277 tensors, 146,244,675 parameters."""

DIGITS = VQGANConfig(
    resolution=32,
    channels=1,
    hidden=8,
    multipliers=(1, 2, 4, 6),
    res_blocks=1,
    z_channels=32,
    codes=64,
    code_dim=8,
    norm_groups=4,
)
"""28 × 28 grey digits, padded to 32 × 32, to 4 × 4 codes of 64: 165 tensors, 438,785 parameters."""
