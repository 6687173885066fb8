"""A cursor over msgpack in a mapped file, for files that are not trusted: every length is checked before it is used."""

from typing import NoReturn

import numpy as np

LONGEST_TEXT = 256  # bytes; names are shorter, and a hostile file must not fill the memory

# First byte: what follows, and how many bytes tell its length (or value).
_HEAD = {0xC3: ("true", 0)}
_HEAD |= {0xC4 + i: ("bytes", 2**i) for i in range(3)}
_HEAD |= {0xC7 + i: ("ext", 2**i) for i in range(3)}
_HEAD |= {0xCC + i: ("int", 2**i) for i in range(4)}
_HEAD |= {0xD9 + i: ("text", 2**i) for i in range(3)}
_HEAD |= {0xDC + i: ("array", 2 ** (i + 1)) for i in range(2)}
_HEAD |= {0xDE + i: ("map", 2 ** (i + 1)) for i in range(2)}
# First byte alone: what follows, and its length (or value).
_WHOLE = {i: ("int", i) for i in range(128)}
_WHOLE |= {0x80 + i: ("map", i) for i in range(16)}
_WHOLE |= {0x90 + i: ("array", i) for i in range(16)}
_WHOLE |= {0xA0 + i: ("text", i) for i in range(32)}
_WHOLE |= {0xD4 + i: ("ext", 2**i) for i in range(5)}


class Fault(Exception):
    """What is wrong, and `at` which byte."""

    def __init__(self, what: str, at: int):
        super().__init__(what)
        self.at = at


class Cursor:
    """Msgpack between two bytes of a file. Copies nothing but texts; no length is used before it is checked.

    Not msgpack's own Unpacker: it hands out every tensor as bytes, a stacked one of 2.9 GB too.
    """

    def __init__(self, content: np.ndarray, at: int, end: int, code: int | None = None):
        self.content, self.start, self.at, self.end, self.code = content, at, at, end, code

    def fail(self, what: str, at: int) -> NoReturn:
        raise Fault(what, at)

    def peek(self) -> str:
        """What comes next."""
        at = self.at
        kind, _ = self._head()
        self.at = at
        return kind

    def take(self, wanted: str) -> int:
        """The length (or value) of what must come next; the cursor goes behind its head."""
        at = self.at
        kind, length = self._head()
        if kind != wanted:
            self.fail(f"{kind}, where {wanted} belongs", at)
        return length

    def inside(self, wanted: str) -> "Cursor":
        """A cursor over the contents of bytes or an ext; this one goes behind them."""
        length = self.take(wanted)
        code = int(self.content[self._skip(1)]) if wanted == "ext" else None
        at = self._skip(length)
        return Cursor(self.content, at, at + length, code)

    def text(self) -> str:
        at, length = self.at, self.take("text")
        if length > LONGEST_TEXT:
            self.fail(f"text of {length} bytes, more than {LONGEST_TEXT}", at)
        try:
            return self.content[self._skip(length) : self.at].tobytes().decode()
        except UnicodeDecodeError:
            self.fail("text that is not UTF-8", at)

    def close(self) -> None:
        """Raises unless all has been read."""
        if self.at != self.end:
            self.fail(f"{self.end - self.at} bytes too many", self.at)

    def _head(self) -> tuple[str, int]:
        at = self._skip(1)
        first = int(self.content[at])
        if first in _WHOLE:
            return _WHOLE[first]
        if first not in _HEAD:
            self.fail(f"0x{first:02x}, which parameters do not need", at)
        kind, size = _HEAD[first]
        start = self._skip(size)
        return kind, int.from_bytes(self.content[start : start + size].tobytes(), "big")

    def _skip(self, length: int) -> int:
        """Goes `length` bytes on; gives where it was."""
        if length > self.end - self.at:
            self.fail(f"breaks off: {length} bytes should follow, and {self.end - self.at} do", self.at)
        self.at += length
        return self.at - length
