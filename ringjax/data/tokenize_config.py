"""The options of `ringjax tokenize`, and what it reports."""

import dataclasses
from pathlib import Path
from typing import Literal

from ringjax.data.bundles import JoinAs
from ringjax.data.fields import parse
from ringjax.data.heldout import SHARE, Split, heldout
from ringjax.data.pictures import Fit

CODES = 8192
"""Codes of LWM's tokenizer: what lines that hold codes are taken to have."""


@dataclasses.dataclass(frozen=True)
class TokenizeConfig:
    """Tokenize text, pictures and clips into a data set that training reads."""

    inputs: tuple[str, ...]
    """.jsonl files (the example language of docs/data.md) and .txt files (a document each), in order."""
    output: str
    """The folder to make."""
    fields: str | tuple[str, ...] | None = None
    """The example language for lines without `fields` of their own; a list: one is chosen a line."""
    tokenizer: str = "sample"
    """`sample`, `bytes`, a tokenizer.json (or its folder), a SentencePiece .model, or a .gguf file."""
    vision_tokenizer: str | None = None
    """A VQGAN .safetensors, or `sample` for the digits': turns the picture a line names into its field `vision`."""
    picture_key: str = "file"
    """The field that names a picture or clip, relative to the .jsonl's folder."""
    caption_key: str = "caption"
    """The field with the caption, for `split` and `mirror`."""
    fit: Fit = "crop"
    """How a picture becomes square: its middle, padded, or left at its size."""
    background: str = "white"
    """What lies behind transparent and padded places."""
    codes_per_frame: int = 256
    """Codes of a frame in lines that hold codes; with a vision_tokenizer, its own number is used."""
    vision_codes: int | None = None
    """Codes of the codebook: the id of the end of a frame, as the model will have it; null: the vision_tokenizer's
    own number, or 8192."""
    max_frames: int | None = None
    """Clips with more frames keep this many, evenly spread; null: all."""
    split: Split = "all"
    """Which lines: all, those to train on, or those whose captions are kept aside (`heldout_share`)."""
    heldout_share: float = SHARE
    """Share of the captions that is kept aside, by a hash of the caption's words (ringjax/data/heldout.py)."""
    variants: int = 1
    """Examples of each line: the picture as it is, and so many less one with small random changes of size, place and
    angle; each chooses one of `fields` anew."""
    mirror: bool = False
    """Whether variants may be mirrored, where the caption allows it."""
    join: int = 1
    """Lines that make one example, at most; 1: each line its own."""
    join_least: int | None = None
    """Lines that make one example, at least; null: as many as `join`."""
    join_as: JoinAs = "turns"
    """turns: one line after the other; video: all frames one video, texts joined by "; "; needle: one line's frames
    hidden among copies of up to four others', with the texts of the one."""
    caption_words: int = 256
    """Words that a text beside a picture may have."""
    long_captions: Literal["refuse", "truncate"] = "refuse"
    """A longer text makes the line one that cannot be used, or is cut to its first words and counted."""
    separator: str = " "
    """What `+` puts between two fields."""
    add_bos: bool = True
    """Begin every example with the tokenizer's begin token."""
    add_eos: bool = True
    """End every example with the tokenizer's end token."""
    examples_per_shard: int = 512
    """Examples in a file of the data set, and in a worker's portion."""
    workers: int | None = None
    """Processes; null: one a core (of the cluster, on Ray), or 0 for pictures where there is an accelerator; 0: this
    process, which encodes pictures on its default device."""
    executor: Literal["local", "ray"] = "local"
    """Where the processes run: on this machine, or on all machines of a Ray cluster (RAY_ADDRESS; without it one is
    started here), with inputs and output on storage that they share. A run on Ray that was stopped goes on."""
    on_error: Literal["stop", "skip"] = "stop"
    """A line that cannot be used ends the run, or is left out, counted, and told in skipped.txt."""
    seed: int = 0
    """Of the order in which lines are joined."""
    overwrite: bool = False
    """Replace a data set of that name."""
    progress: bool = True
    """Show a progress bar on a terminal."""

    def __post_init__(self):
        if not self.inputs:
            raise ValueError("inputs is empty; name at least one .jsonl or .txt file")
        if not self.output:
            raise ValueError("output is empty; name the folder to make")
        counts = "codes_per_frame", "vision_codes", "examples_per_shard", "max_frames", "variants", "caption_words"
        for name in (*counts, "join", "join_least"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers {self.workers} must be at least 0; 0 works in this process")
        if self.executor == "ray" and self.workers == 0:
            raise ValueError("workers 0 works in this process, and executor ray in others; raise or leave out workers")
        for spec in (self.fields,) if isinstance(self.fields, str) else self.fields or ():
            parse(spec)
        heldout("", self.heldout_share)
        self._check_pictures()

    def _check_pictures(self) -> None:
        if self.join_least is not None and self.join_least > self.join:
            raise ValueError(f"join_least {self.join_least} is more than join {self.join}; raise join")
        if self.join == 1 and self.join_as != "turns":
            raise ValueError(f"join_as {self.join_as!r} of one line; set join to the lines of an example")
        if self.mirror and self.variants == 1:
            raise ValueError("mirror changes variants, and variants is 1; raise variants")
        if self.variants > 1 and self.join == 1 and self.vision_tokenizer is None:
            raise ValueError(
                f"variants {self.variants} of pictures need a vision_tokenizer; name it or leave variants out"
            )
        if self.variants > 1 and self.vision_tokenizer is not None and self.fit == "centre":
            raise ValueError("variants change pictures of one size; use fit crop or pad, or variants 1")


@dataclasses.dataclass(frozen=True)
class TokenizeReport:
    """What a run made."""

    folder: Path
    examples: int
    tokens: int
    vision_tokens: int
    skipped: tuple[str, ...]
    """Of every line left out, its place and fault."""
    truncated: int = 0
    """Texts that were cut to `caption_words`."""

    def __str__(self) -> str:
        text = f"{self.folder}: {self.examples} examples, {self.tokens} tokens ({self.vision_tokens} of vision)"
        if self.truncated:
            text += f"; {self.truncated} texts cut"
        if self.skipped:
            text += f"; {len(self.skipped)} lines skipped (skipped.txt names them), the first: {self.skipped[0]}"
        return text
