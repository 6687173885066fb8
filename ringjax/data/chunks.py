"""What the chunks of an ArrayRecord file say of themselves: how large each is when it is unpacked.

The library unpacks whatever a file claims: 128 KB of zeros, packed, take 1.5 GB when their record is read (array_record
0.8). So the headers are looked at first, which takes about two seconds for a million records.

    block of 65536 bytes: a header of 24, then chunks, which go on behind the next block's header
    chunk: hash 8 | packed size 8 | hash 8 | kind 1, records 7 | unpacked size 8 | packed bytes, then padding
"""

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MOST_BYTES = 1 << 28
"""Of one chunk when it is unpacked, which holds one example here: 63M tokens."""
_BLOCK, _BLOCK_HEADER = 1 << 16, 24
_HEADER = struct.Struct("<QQQQQ")
_KINDS = b"smpr"  # signature, metadata, padding, records; not those that are transposed


class Chunk(NamedTuple):
    """Where a chunk starts, its kind, its records, and its bytes packed and unpacked."""

    at: int
    kind: int
    records: int
    packed: int
    unpacked: int


def check_chunks(path: str | Path) -> None:
    """Raises ValueError, which names the file, where a chunk is cut, of an unknown kind, or larger than MOST_BYTES."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for chunk in _chunks(content, path):
            if chunk.kind not in _KINDS:
                raise ValueError(
                    f"{path} has a chunk of kind {chr(chunk.kind)!r} at byte {chunk.at}; it is damaged: copy the data"
                    " set again"
                )
            if chunk.unpacked > MOST_BYTES or chunk.records > MOST_BYTES:
                raise ValueError(
                    f"{path} has a chunk of {chunk.records} records and {chunk.unpacked} bytes, packed into"
                    f" {chunk.packed}, at byte {chunk.at}: more than {MOST_BYTES}; cut the examples"
                )


def _chunks(content: mmap.mmap, path: str | Path) -> Iterator[Chunk]:
    at, end = 0, len(content)
    while at < end:
        start = at if at % _BLOCK else at + _BLOCK_HEADER
        if start % _BLOCK + _HEADER.size <= _BLOCK and start + _HEADER.size <= end:
            fields = _HEADER.unpack_from(content, start)
            behind = start + _HEADER.size
        else:
            raw, behind = _across(content, at, _HEADER.size)
            if len(raw) < _HEADER.size:
                raise ValueError(f"{path} is cut in the header of a chunk at byte {at}; copy the data set again")
            fields = _HEADER.unpack(raw)
        _, packed, _, kinds, unpacked = fields
        chunk = Chunk(at, kinds & 255, kinds >> 8, packed, unpacked)
        after = _skip(behind, packed)
        if packed > end or after > end:
            raise ValueError(f"{path} is cut in a chunk of {packed} bytes at byte {at}; copy the data set again")
        yield chunk
        # A chunk is as long as it has records at least, and none begins within a block's header.
        at = max(after, _skip(at, chunk.records))
        if 0 < at % _BLOCK < _BLOCK_HEADER:
            at += _BLOCK_HEADER - at % _BLOCK


def _across(content: mmap.mmap, at: int, size: int) -> tuple[bytes, int]:
    """`size` bytes from `at` on without the headers of blocks, and where they end."""
    found = b""
    while len(found) < size and at < len(content):
        at += 0 if at % _BLOCK else _BLOCK_HEADER
        part = content[at : at + min(size - len(found), _BLOCK - at % _BLOCK)]
        found, at = found + part, at + len(part)
        if not part:
            break
    return found, at


def _skip(at: int, size: int) -> int:
    """`size` bytes behind `at`, without the headers of blocks."""
    if size == 0:
        return at
    whole = _BLOCK - _BLOCK_HEADER
    inside = at % _BLOCK - _BLOCK_HEADER if at % _BLOCK else 0
    block = at - at % _BLOCK
    blocks, rest = divmod(inside + size, whole)
    return block + (blocks - 1) * _BLOCK + _BLOCK if rest == 0 else block + blocks * _BLOCK + _BLOCK_HEADER + rest
