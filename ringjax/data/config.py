"""What to train on, in the words of a run's YAML file."""

import dataclasses
from typing import Literal

SAMPLES = ("sample:digits", "sample:prose", "sample:novels")


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of examples."""

    path: str
    """A .jsonl file, a .txt file, a folder that `ringjax tokenize` wrote, or `sample:digits`, `sample:prose`
    (chapters), `sample:novels` (whole books)."""
    weight: float | None = None
    """Share of the tokens in the mixture, relative to the other sources; null: in proportion to its examples."""
    fields: str | tuple[str, ...] | None = None
    """The example language for lines without `fields` of their own; a list: one is chosen a line."""

    def __post_init__(self):
        if not self.path:
            raise ValueError("path is empty; name a .jsonl or .txt file, a tokenized folder or a sample:… source")
        if self.path.startswith("sample:") and self.path not in SAMPLES:
            raise ValueError(f"path {self.path!r} is no sample; there are {', '.join(SAMPLES)}")
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise ValueError(f"weight {self.weight} of {self.path} must be positive; leave the source out instead of 0")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Sources, tokens and packing. How rows are cut and weighted is told in docs/data.md."""

    sources: tuple[SourceConfig, ...] = (SourceConfig("sample:digits"),)
    """What is trained on."""
    heldout: tuple[SourceConfig, ...] = ()
    """What is evaluated on; empty: the held-out part of the samples among the sources."""
    tokenizer: str = "sample"
    """`sample`, `bytes`, a tokenizer.json (or its folder), a SentencePiece .model, or the .gguf file of a model."""
    codes_per_frame: int = 256
    """Codes of one picture or frame: 256 for LWM, 16 for the digits."""
    vision_codes: int = 8192
    """Codes of the image tokenizer; the end of a frame is this id, the end of the vision the next."""
    vision_tokenizer: str | None = None
    """The image tokenizer of the codes, a VQGAN .safetensors: data sets that another one made are refused, and the run
    keeps a copy to draw with; null: what the data sets record, and no copy."""
    drop_captions: float = 0.0
    """Share of the drawings that lose the text before them, for guidance: a new draw every epoch."""
    max_frames: int | None = None
    """Clips with more frames keep this many, evenly spread; null: all."""
    separator: str = " "
    """What `+` puts between two fields."""
    add_bos: bool = True
    """Begin every example with the tokenizer's begin token."""
    add_eos: bool = True
    """End every example with the tokenizer's end token, which bears loss."""
    packing: Literal["masked", "pad"] = "masked"
    """`masked`: several examples a row, none sees another; `pad`: one example a row."""
    open_rows: int = 4
    """Rows of each batch line that wait for examples that fit; more rows, less padding."""
    long_examples: Literal["split", "refuse", "skip"] = "split"
    """Examples longer than a row: cut into rows, an error, or left out and counted."""
    weights: Literal["example", "token"] = "example"
    """`example`: the loss tokens of an example share one weight; `token`: every loss token weighs 1."""
    bidirectional_frames: bool = False
    """Tokens of a frame that bears no loss see the rest of their frame."""
    window: int | None = None
    """Keys that a query sees, itself included, on top of the packing; null: all of its example."""
    on_error: Literal["stop", "skip"] = "stop"
    """A line that cannot be used ends the run, or is left out and counted."""
    shuffle: bool = True
    """A new order every epoch, from the run's seed."""
    epochs: int | None = None
    """How often every example is seen; null: without end."""
    prefetch: int = 2
    """Batches made ahead in a background thread, 0: none."""

    def __post_init__(self):
        if not self.sources:
            raise ValueError("sources is empty; name at least one, for instance - path: sample:digits")
        for name in ("codes_per_frame", "vision_codes", "open_rows"):
            _at_least(name, getattr(self, name), 1)
        for name in ("max_frames", "window", "epochs"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        _at_least("prefetch", self.prefetch, 0)
        if isinstance(self.drop_captions, bool) or not 0 <= self.drop_captions < 1:
            raise ValueError(f"drop_captions {self.drop_captions!r} must lie in [0, 1): 0.1 is usual, 0 drops none")
        for sources in (self.sources, self.heldout):
            given = [source.weight is not None for source in sources]
            if any(given) and not all(given):
                bare = next(source.path for source in sources if source.weight is None)
                raise ValueError(f"source {bare} has no weight but others have; give all sources a weight, or none")


def _at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} {value!r} must be an integer of at least {least}")
