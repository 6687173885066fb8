"""The header of llama.cpp's GGUF: metadata and the places of the tensors, read without the library.

    magic, version, two counts | metadata | name, sizes, type, place of each tensor | padding | tensors

The library's reader trusts its lengths: an array that claims 2**60 items fills the memory (gguf 0.19). It also takes
2 s for a vocabulary of 49,152; this takes 0.1 s.
"""

import contextlib
import dataclasses
import struct
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

SUFFIX = ".gguf"

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_LEAST_KEY, _LEAST_TENSOR, _MOST_AXES = 13, 24, 4  # bytes, bytes, axes
# GGUF's types of values, as struct writes them.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class GgufHeader:
    """What a file says before its tensors."""

    path: Path
    metadata: dict[str, Any]
    """By key: numbers, bools, strings, lists of strings, arrays of numbers."""
    tensors: dict[str, tuple[tuple[int, ...], int, int]]
    """Shape ([out, in], numpy's order, which is GGUF's reversed), number of the type, offset."""
    size: int
    """Bytes of the header."""
    content: UInt8[np.ndarray, " bytes"]
    """The whole file, mapped."""

    @classmethod
    def read(cls, path: str | Path) -> "GgufHeader":
        """Raises FileNotFoundError where there is no file, ValueError for a cut or tampered one."""
        path = Path(path)
        with explained(path):
            content = np.asarray(np.memmap(path, np.uint8, mode="r"))
            cursor = _Cursor(memoryview(content))
            metadata, tensors = _read(cursor)
        return cls(path, metadata, tensors, cursor.place, content)


def _read(cursor: "_Cursor") -> tuple[dict[str, Any], dict[str, tuple]]:
    if bytes(cursor.take(4)) != _MAGIC:
        raise ValueError(f"it starts with {bytes(cursor.view[:4])!r}, not {_MAGIC!r}")
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise ValueError(f"version {version} is not one of {_VERSIONS}, little-endian")
    tensors, keys = cursor.count(_LEAST_TENSOR, "tensors"), cursor.count(_LEAST_KEY, "keys")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = cursor.text()
        if key in metadata:
            raise ValueError(f"{key} is there twice")
        metadata[key] = cursor.value()
    infos: dict[str, tuple] = {}
    for _ in range(tensors):
        name = cursor.text()
        if name in infos:
            raise ValueError(f"tensor {name} is there twice")
        axes = cursor.number("I")
        if not 1 <= axes <= _MOST_AXES:
            raise ValueError(f"tensor {name} has {axes} axes, not 1 to {_MOST_AXES}")
        shape = tuple(cursor.number("Q") for _ in range(axes))[::-1]
        infos[name] = shape, cursor.number("I"), cursor.number("Q")
    return metadata, infos


class _Cursor:
    """Reads a header, never past its end: raises ValueError instead."""

    def __init__(self, view: memoryview):
        self.view, self.place = view, 0

    def take(self, size: int) -> memoryview:
        left = len(self.view) - self.place
        if size > left:
            raise ValueError(f"{size} bytes are needed at byte {self.place}, and {left} are left")
        self.place += size
        return self.view[self.place - size : self.place]

    def number(self, code: str) -> Any:
        [number] = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))
        # The shortest decimal of a float32: 1e-05 rather than 9.999999747378752e-06.
        return float(str(np.float32(number))) if code == "f" else number

    def count(self, least: int, what: str) -> int:
        """How many things follow, of at least `least` bytes each: no loop and no list goes by a count before this."""
        place, count = self.place, self.number("Q")
        if count * least > len(self.view) - self.place:
            raise ValueError(f"{count} {what} at byte {place} do not fit into the {len(self.view)} bytes of the file")
        return count

    def text(self) -> str:
        return str(self.take(self.number("Q")), "utf-8")

    def value(self) -> Any:
        place, kind = self.place, self.number("I")
        if kind == _TEXT:
            return self.text()
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        item = self.number("I") if kind == _ARRAY else kind
        if item == _TEXT:
            return [self.text() for _ in range(self.count(8, "strings"))]
        if item not in _NUMBERS:
            raise ValueError(f"a value at byte {place} has type {kind}, items {item}: not a number, a string or a list")
        dtype = np.dtype(_NUMBERS[item]).newbyteorder("<")
        return np.frombuffer(self.take(self.count(dtype.itemsize, "numbers") * dtype.itemsize), dtype)


@contextlib.contextmanager
def explained(path: Path):
    """Says of which file a ValueError is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path} is not a whole GGUF file ({error}); fetch it again") from None
