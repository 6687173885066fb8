"""Tokenized data sets: examples in ArrayRecord shards, with a description that can be checked against them.

    my-data/
      meta.json               what made the tokens; of every shard its size, SHA-256 and number of examples
      00000.array_record      one record an example, see `encode_record`

`meta.json` is written last and the folder gets its name last, so a folder that has one is whole.
"""

import bisect
import dataclasses
import hashlib
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ringjax.data.chunks import check_chunks
from ringjax.data.config import DataConfig, SourceConfig
from ringjax.data.errors import DataError, MissingShard
from ringjax.data.example import Example, require_usable
from ringjax.data.tokenizers import TextTokenizer
from ringjax.inside import inside
from ringjax.json_text import brief, parse_json

META = "meta.json"
FORMAT = "ringjax-records-1"

_HEADER = struct.Struct("<4sBxxxI")  # magic, version, tokens
_MAGIC, _VERSION = b"rjex", 1
_CHECKSUM = struct.Struct("<I")


def encode_record(example: Example) -> bytes:
    """The bytes of an example: header, int32 tokens, one bit a token of modality and of loss, CRC-32 of it all.

    magic "rjex" | version 1 | 3 zero bytes | uint32 n | int32 tokens[n] | bits modality | bits loss | uint32 CRC
    """
    body = b"".join(
        (
            _HEADER.pack(_MAGIC, _VERSION, len(example)),
            np.ascontiguousarray(example.tokens, "<i4").tobytes(),
            np.packbits(example.modality).tobytes(),
            np.packbits(example.loss).tobytes(),
        )
    )
    return body + _CHECKSUM.pack(zlib.crc32(body))


def decode_record(record: bytes, place: str) -> Example:
    """The example in a record.

    Raises:
        DataError: it is cut, garbled or of another format; the message begins with `place`.
    """
    if len(record) < _HEADER.size + _CHECKSUM.size:
        raise DataError(f"{place}: cut record of {len(record)} bytes")
    magic, version, n = _HEADER.unpack_from(record)
    if magic != _MAGIC or version != _VERSION:
        raise DataError(f"{place}: not a record of ringjax version {_VERSION}; make the data set again")
    bits = (n + 7) // 8
    wanted = _HEADER.size + 4 * n + 2 * bits + _CHECKSUM.size
    if len(record) != wanted:
        raise DataError(f"{place}: {len(record)} bytes instead of the {wanted} of {n} tokens; the record is cut")
    (checksum,) = _CHECKSUM.unpack_from(record, wanted - _CHECKSUM.size)
    if zlib.crc32(record[: -_CHECKSUM.size]) != checksum:
        raise DataError(f"{place}: the checksum does not fit; the record is garbled")
    tokens = np.frombuffer(record, "<i4", n, _HEADER.size).astype(np.int32)
    flags = np.unpackbits(np.frombuffer(record, np.uint8, 2 * bits, _HEADER.size + 4 * n)).view(bool)
    return Example(tokens, modality=flags[:n], loss=flags[8 * bits :][:n])


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of a data set, as `meta.json` has it."""

    file: str
    examples: int
    bytes: int
    sha256: str


def write_shard(path: Path, records: Iterator[bytes] | Sequence[bytes]) -> Shard:
    """An ArrayRecord file of `records`; the same records give the same bytes."""
    from array_record.python.array_record_module import ArrayRecordWriter

    # One record a group: examples are read one by one, in shuffled order.
    writer = ArrayRecordWriter(str(path), "group_size:1")
    count = 0
    for record in records:
        writer.write(record)
        count += 1
    writer.close()
    return Shard(path.name, count, path.stat().st_size, file_digest(path))


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class RecordReader:
    """The examples of a data set folder in any order, from any thread.

    Sizes are checked when it is opened, every record when it is read; `verify` reads the whole files.

    Raises:
        FileNotFoundError: no such folder, no `meta.json` in it, or a shard is missing.
        ValueError: the description is garbled, a shard has another size than recorded, or there are no examples.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.meta, self.shards = _read_meta(self.folder)
        self._names = [str(self.folder / shard.file) for shard in self.shards]
        self._stops = np.cumsum([shard.examples for shard in self.shards]).tolist()
        for shard in self.shards:
            self._check_size(shard)
        self._readers = [_open_shard(self.folder / shard.file, shard.examples) for shard in self.shards]

    def __len__(self) -> int:
        return self._stops[-1]

    def place(self, index: int) -> str:
        """How an error names an example: its file and record, counted from 0."""
        shard, record = self._locate(index)
        return f"{self._names[shard]} record {record}"

    def __getitem__(self, index: int) -> Example:
        shard, record = self._locate(index)
        place = f"{self._names[shard]} record {record}"
        try:
            (raw,) = self._readers[shard].read([record])
        except (RuntimeError, ValueError, IndexError) as error:
            raise DataError(f"{place}: cannot be read ({error}); copy or make the data set again") from None
        return decode_record(raw, place)

    def verify(self) -> None:
        """Read all shards and compare them with the recorded SHA-256. Raises DataError that names the first bad one."""
        for shard in self.shards:
            self._check_size(shard)
            if file_digest(self.folder / shard.file) != shard.sha256:
                raise DataError(f"{self.folder / shard.file}: content differs from {META}; copy the data set again")

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        shard = bisect.bisect_right(self._stops, index)
        return shard, index - (self._stops[shard - 1] if shard else 0)

    def _check_size(self, shard: Shard) -> None:
        path = self.folder / shard.file
        if not path.is_file():
            raise MissingShard(f"shard {path} is missing; copy the data set again")
        size = path.stat().st_size
        if size != shard.bytes:
            what = "cut" if size < shard.bytes else "too long"
            raise DataError(f"{path} is {what}: {size} bytes instead of {shard.bytes}; copy the data set again")


class RecordSource:
    """A tokenized data set as a source of the loader."""

    def __init__(self, source: SourceConfig, config: DataConfig, tokenizer: TextTokenizer):
        self._reader = RecordReader(source.path)
        _check_origin(self._reader.meta, source, config, tokenizer)
        self.name = source.path
        self._table_sizes = np.array([tokenizer.vocab_size, config.vision_codes + 2])  # of text, of vision
        meta = self._reader.meta
        self.codes_of = meta.get("vision_tokenizer_fingerprint") if meta.get("has_vision") else None
        self.fingerprint = hashlib.sha256((self._reader.folder / META).read_bytes()).hexdigest()

    def __len__(self) -> int:
        return len(self._reader)

    def place(self, index: int) -> str:
        return self._reader.place(index)

    def read(self, index: int) -> Example:
        example = require_usable(self._reader[index], self.place(index))
        limits = self._table_sizes.take(example.modality)
        wrong = (example.tokens.view(np.uint32) >= limits).nonzero()[0]  # a negative id is a huge one
        if len(wrong):
            raise DataError(
                f"{self.place(index)}: token {wrong[0]} has id {example.tokens[wrong[0]]}, beyond its table of "
                f"{limits[wrong[0]]}"
            )
        return example


def _open_shard(path: Path, examples: int):
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        check_chunks(path)
    except ValueError as error:
        raise DataError(str(error)) from None
    reader = ArrayRecordReader(str(path), "readahead_buffer_size:0")
    if not reader.ok() or reader.num_records() != examples:
        found = reader.num_records() if reader.ok() else "no readable"
        raise DataError(f"{path} has {found} records instead of {examples}; it is damaged: copy the data set again")
    return reader


def _read_meta(folder: Path) -> tuple[dict, list[Shard]]:
    if not folder.is_dir():
        raise FileNotFoundError(f"data set folder {folder} does not exist")
    path = folder / META
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {META}, so it is no data set; make one with `ringjax tokenize`")
    try:
        meta = parse_json(path.read_bytes())
        shards = [Shard(**shard) for shard in meta["shards"]]
        kinds = [(type(s.file), type(s.examples), type(s.bytes), type(s.sha256)) for s in shards]
        sound = meta["format"] == FORMAT and all(kind == (str, int, int, str) for kind in kinds)
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise DataError(f"{path} is no description of a data set in format {FORMAT}; make the data set again")
    for shard in shards:
        try:
            inside(folder, shard.file, levels=False)
        except ValueError as error:
            raise DataError(f"{path}: shard {error}; make the data set again") from None
        if not 0 <= shard.examples <= shard.bytes:
            raise DataError(
                f"{path}: shard {shard.file!r} has {brief(shard.examples)} examples in {brief(shard.bytes)} bytes; make"
                " the data set again"
            )
    if sum(shard.examples for shard in shards) == 0:
        raise ValueError(f"data set {folder} has no examples")
    return meta, shards


def _check_origin(meta: dict, source: SourceConfig, config: DataConfig, tokenizer: TextTokenizer) -> None:
    """Refuse tokens that mean something else to this config's tokenizers."""
    if source.fields is not None:
        raise ValueError(f"data set {source.path} is tokenized already and has no fields; remove fields")
    made_with = meta.get("tokenizer_fingerprint")
    if made_with != tokenizer.fingerprint:
        raise ValueError(
            f"data set {source.path} was made with tokenizer {brief(meta.get('tokenizer'))} ({str(made_with)[:12]}),"
            f" not with {config.tokenizer!r} ({tokenizer.fingerprint[:12]}); use that one or tokenize again"
        )
    for name in ("codes_per_frame", "vision_codes"):
        if meta.get("has_vision") and meta.get(name) != getattr(config, name):
            raise ValueError(
                f"data set {source.path} was made with {name} {brief(meta.get(name))}, not {getattr(config, name)}; "
                f"set data.{name} to it or tokenize again"
            )
