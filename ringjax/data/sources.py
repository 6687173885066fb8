"""Where examples come from: files and samples, each read in any order by index."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from ringjax.data.codes import agreed, tokenizer_fingerprint
from ringjax.data.config import DataConfig, SourceConfig
from ringjax.data.errors import DataError
from ringjax.data.example import Example, require_usable
from ringjax.data.fields import FieldEncoder, Spec
from ringjax.data.jsonl import JsonLines
from ringjax.data.tokenizers import load_tokenizer


class Source(Protocol):
    """Examples by index."""

    name: str
    fingerprint: str
    codes_of: str | None
    """The fingerprint of the image tokenizer that made its codes; None: it has none, or nobody knows."""

    def __len__(self) -> int: ...

    def place(self, index: int) -> str:
        """How an error names example `index`."""
        ...

    def read(self, index: int) -> Example:
        """Example `index`. Raises DataError where it cannot be used."""
        ...


class JsonlSource:
    """The lines of a jsonl file, by the example language."""

    def __init__(self, config: SourceConfig, encoder: FieldEncoder, codes_of: str | None = None):
        self._lines, self._encoder, self._default = JsonLines(config.path), encoder, config.fields
        self.name, self.codes_of = config.path, codes_of
        self.fingerprint = self._lines.fingerprint

    def __len__(self) -> int:
        return len(self._lines)

    def place(self, index: int) -> str:
        return self._lines.place(index)

    def read(self, index: int) -> Example:
        line_index = int(self._lines.line_index[index])
        return self._encoder.encode_line(self._lines[index], self._default, line_index, self.place(index))


class TextSource:
    """One document: a whole plain text file in UTF-8."""

    codes_of = None

    def __init__(self, config: SourceConfig, encoder: FieldEncoder):
        if config.fields is not None:
            raise ValueError(f"source {config.path} is plain text and has no fields; remove fields, or give a .jsonl")
        if not Path(config.path).is_file():
            raise FileNotFoundError(f"data file {config.path} does not exist")
        self.name, self._encoder = config.path, encoder
        content = Path(config.path).read_bytes()
        self.fingerprint = hashlib.sha256(content).hexdigest()
        try:
            self._text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{config.path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None

    def __len__(self) -> int:
        return 1

    def place(self, index: int) -> str:
        return self.name

    def read(self, index: int) -> Example:
        return require_usable(self._encoder.encode({"text": self._text}, "text", self.name), self.name)


class RowsSource:
    """Rows in memory, each with its spec: the samples."""

    def __init__(
        self,
        name: str,
        rows: Sequence[dict],
        specs: Callable[[int], Spec],
        encoder: FieldEncoder,
        stamp: str,
        codes_of: str | None = None,
    ):
        self.name, self._rows, self._specs, self._encoder = name, rows, specs, encoder
        self.fingerprint, self.codes_of = stamp, codes_of

    def __len__(self) -> int:
        return len(self._rows)

    def place(self, index: int) -> str:
        return f"{self.name} example {index}"

    def read(self, index: int) -> Example:
        return self._encoder.encode_line(self._rows[index], self._specs(index), index, self.place(index))


def open_sources(config: DataConfig, split: str) -> tuple[list[Source], tuple[SourceConfig, ...]]:
    """The sources of a split, opened, and their configs.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: a source is empty, of no known kind, or made with other tokenizers, of text or of images; no
            held-out data is named.
    """
    chosen = _of_split(config, split)
    tokenizer = load_tokenizer(config.tokenizer)
    encoder = FieldEncoder(
        tokenizer,
        codes_per_frame=config.codes_per_frame,
        vision_codes=config.vision_codes,
        max_frames=config.max_frames,
        separator=config.separator,
        add_bos=config.add_bos,
        add_eos=config.add_eos,
    )
    sources = [_open(source, config, encoder, split) for source in chosen]
    codes_of(sources, config)
    return sources, chosen


def codes_of(sources: Sequence[Source], config: DataConfig) -> str | None:
    """The fingerprint of the image tokenizer that all sources have; raises ValueError where they differ."""
    found = [(f"source {source.name}", source.codes_of) for source in sources]
    name = config.vision_tokenizer
    return agreed([(f"vision_tokenizer {name}", _named(config)), *found])


def _named(config: DataConfig) -> str | None:
    return None if config.vision_tokenizer is None else tokenizer_fingerprint(config.vision_tokenizer)


def _of_split(config: DataConfig, split: str) -> tuple[SourceConfig, ...]:
    if split not in ("train", "heldout"):
        raise ValueError(f"split {split!r} is unknown; use 'train' or 'heldout'")
    if split == "train" or config.heldout:
        return config.sources if split == "train" else config.heldout
    samples = tuple(source for source in config.sources if source.path.startswith("sample:"))
    if not samples:
        raise ValueError("no held-out data: name it under data.heldout, or switch evaluation off (eval_every: 0)")
    return samples


def _open(source: SourceConfig, config: DataConfig, encoder: FieldEncoder, split: str) -> Source:
    path = Path(source.path)
    if source.path.startswith("sample:"):
        return _sample(source, config, encoder, split)
    if path.suffix in (".jsonl", ".json", ".ndjson") or ".jsonl" in path.suffixes:
        return JsonlSource(source, encoder, _named(config))
    if path.suffix == ".txt":
        return TextSource(source, encoder)
    if path.is_dir():
        from ringjax.data.records import RecordSource

        return RecordSource(source, config, encoder.tokenizer)
    if not path.exists():
        raise FileNotFoundError(f"data source {source.path} does not exist")
    raise ValueError(f"data source {source.path} is of no known kind; give a .jsonl, .txt, tokenized folder or sample")


def _sample(source: SourceConfig, config: DataConfig, encoder: FieldEncoder, split: str) -> Source:
    from ringjax.data import samples

    if source.path == "sample:digits":
        return _digits(source, config, encoder, split)
    texts = samples.prose_chapters(split) if source.path == "sample:prose" else samples.prose(split)
    spec = "text" if source.fields is None else source.fields
    rows = [{"text": text} for text in texts]
    return RowsSource(f"{source.path} ({split})", rows, lambda index: spec, encoder, _stamp(rows))


# Of ten lines that ask for a drawing, one has no words: guidance compares with what is drawn without any.
DRAW_SPECS = ("[caption],vision",) * 9 + ("vision",)
CAPTION_SPEC = "[vision],caption"


def _digits(source: SourceConfig, config: DataConfig, encoder: FieldEncoder, split: str) -> Source:
    """Every digit twice, to be put into words and to be drawn; or once, by the source's own `fields`."""
    from ringjax.data import samples
    from ringjax.data.samples_vision import digit_rows

    rows, codes = digit_rows(split)
    if config.codes_per_frame != len(rows[0]["vision"]) or config.vision_codes < codes:
        raise ValueError(
            f"sample:digits has {len(rows[0]['vision'])} codes a frame of a codebook of {codes}, not codes_per_frame "
            f"{config.codes_per_frame} of vision_codes {config.vision_codes}; set data.codes_per_frame and vision_codes"
        )
    # Not of the codes: between kinds of devices a picture can fall on the other of two codes that are equally near.
    files = [samples.manifest()[file]["sha256"] for file in ("digits.npz", "digits_vqgan.safetensors")]
    name, stamp = f"{source.path} ({split})", _stamp([files, CAPTION_SPEC, DRAW_SPECS])
    made_by = tokenizer_fingerprint("sample")
    if source.fields is not None:
        return RowsSource(name, rows, lambda index: source.fields, encoder, stamp, made_by)
    twice = [row for row in rows for _ in range(2)]
    return RowsSource(name, twice, lambda index: DRAW_SPECS if index % 2 else CAPTION_SPEC, encoder, stamp, made_by)


def _stamp(rows: list) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
