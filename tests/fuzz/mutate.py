"""What a hostile or broken file may look like: small changes of valid bytes and texts.

Every function takes a `random.Random`, so that an input is known by its seed and number alone.
"""

import random
import re

BOUNDARIES = tuple(
    sorted(
        {
            sign * (1 << bits) + more
            for bits in (0, 7, 8, 15, 16, 24, 31, 32, 40, 48, 53, 62, 63, 64)
            for more in (-1, 0, 1)
            for sign in (1, -1)
        }
    )
)
"""Integers at which fixed widths, signs, products and allocations go wrong."""
NAMES = (
    "../outside",
    "../../../../etc/passwd",
    "/etc/passwd",
    "..",
    ".",
    "",
    "a/../../b",
    "nul\0l",
    "\0",
    "C:\\x",
    "~/x",
    "x" * 300,
    "é\u0301\u202e\U0001f600",
    "\ud800",
    "\n",
    "%s%n",
    "model.safetensors/",
    "$(touch CANARY)",
)
"""Names and texts that lead elsewhere, end early or cannot be encoded."""
TEXTS = (*NAMES, "0", "-1", "1e999", "nan", "null", "{{ 7 * 7 }}", "9" * 50, "9" * 5000, "\ufeff", "a" * 70_000)
_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?")


def some_bytes(rng: random.Random, size: int) -> bytes:
    return rng.randbytes(size)


def integer(rng: random.Random) -> bytes:
    """A boundary in 1, 2, 4 or 8 bytes, either order."""
    width = rng.choice((1, 2, 4, 4, 8, 8))
    return (rng.choice(BOUNDARIES) % (1 << 8 * width)).to_bytes(width, rng.choice(("little", "big")))


def _place(rng: random.Random, size: int) -> int:
    """Anywhere, the beginning (where headers are) as often as all the rest."""
    if size == 0:
        return 0
    return rng.randrange(size) if rng.random() < 0.5 else rng.randrange(min(size, rng.choice((16, 64, 512))))


def _flip(rng, content, others):
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        if changed:
            changed[_place(rng, len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _set(rng, content, others):
    at = _place(rng, len(content))
    return content[:at] + bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))]) + content[at + 1 :]


def _cut(rng, content, others):
    return content[: _place(rng, len(content))]


def _remove(rng, content, others):
    at = _place(rng, len(content))
    return content[:at] + content[at + rng.choice((1, 2, 4, 8, 16, 64, 1000)) :]


def _repeat(rng, content, others):
    at, size = _place(rng, len(content)), rng.choice((1, 4, 8, 16, 64, 256, 4096))
    return content[: at + size] + content[at : at + size] * rng.choice((1, 1, 2, 10, 100)) + content[at + size :]


def _splice(rng, content, others):
    other = rng.choice(others) if others else content
    at, source = _place(rng, len(content)), _place(rng, len(other))
    size = rng.choice((4, 16, 64, 512, len(other)))
    return content[:at] + other[source : source + size] + content[at + rng.choice((0, size)) :]


def _integer(rng, content, others):
    at, new = _place(rng, len(content)) // rng.choice((1, 4, 8)), integer(rng)
    return content[:at] + new + content[at + rng.choice((0, len(new), len(new), len(new))) :]


def _insert(rng, content, others):
    at = _place(rng, len(content))
    return content[:at] + some_bytes(rng, rng.choice((1, 2, 8, 64))) + content[at:]


def _decimal(rng, content, others):
    """A number that is written out becomes a boundary."""
    found = list(_NUMBER.finditer(content[: 1 << 16]))
    if not found:
        return _integer(rng, content, others)
    chosen = rng.choice(found)
    new = str(rng.choice((*BOUNDARIES, 10**30, 10**400))).encode()
    return content[: chosen.start()] + new + content[chosen.end() :]


def _text(rng, content, others):
    at = _place(rng, len(content))
    return content[:at] + rng.choice(TEXTS).encode("utf-8", "surrogatepass") + content[at:]


_CHANGES = (_flip, _flip, _set, _cut, _remove, _repeat, _splice, _integer, _integer, _insert, _decimal, _text)


def of_bytes(rng: random.Random, content: bytes, others: list[bytes]) -> bytes:
    """`content` with one to three changes; blocks may come from the `others`."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = rng.choice(_CHANGES)(rng, content, others)
    return content[: 1 << 22]
