"""Changes that know a format: they reach what lies behind a checksum or a length, where flipped bits do not."""

import io
import json
import pickletools
import random
import re
import struct
import zlib
from collections.abc import Callable

import msgpack

from tests.fuzz import payloads, trees
from tests.fuzz.mutate import BOUNDARIES, NAMES, TEXTS, of_bytes

WORDS: dict[str, tuple[str, ...]] = {}
"""By name of a file: keys and values that its reader knows; filled by `targets`."""


def changed(rng: random.Random, name: str, content: bytes, others: list[bytes]) -> bytes:
    """The content of the file `name`, changed as its format is, or byte by byte."""
    special = _SPECIAL.get(name.rsplit(".", 1)[-1])
    if special is None or rng.random() < 0.35:
        return of_bytes(rng, content, others)
    try:
        return special(rng, name, content, others)[: 1 << 23]
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, struct.error, RecursionError):
        return of_bytes(rng, content, others)  # the seed itself was changed too far to be taken apart


def _json(rng, name, content, others):
    return trees.of_json(rng, content, WORDS.get(name, ()))


def _jsonl(rng, name, content, others):
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    what = rng.randrange(8)
    if what < 6 and lines[at].strip():
        lines[at] = trees.of_json(rng, lines[at], WORDS.get(name, ()))
    elif what == 6:
        lines[at:at] = [rng.choice((b"", b"\0", b"null", b"{}", b" " * 100, b"\r", b"{", b"\xff\xfe"))]
    else:
        lines[at] = trees.dumps(trees.hostile(rng))
    return b"\n".join(lines)


def _safetensors(rng, name, content, others):
    """Another header before the same tensors; now and then its length is another too."""
    (size,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + size])
    what = rng.randrange(6)
    if what == 0 and "__metadata__" in header:
        inner = {key: trees.of_json(rng, text.encode()).decode() for key, text in header["__metadata__"].items()}
        header["__metadata__"] = inner
    elif what == 1:
        chosen = rng.choice([key for key in header if key != "__metadata__"])
        header[chosen]["shape"] = [abs(rng.choice(BOUNDARIES)) for _ in range(rng.choice((1, 2, 4, 60)))]
        header[chosen]["dtype"] = rng.choice(("F32", "BF16", "F8_E4M3", "I64", "BOOL", "F4", "C64", "U16"))
    elif what == 2:
        new = rng.choice((*NAMES, *WORDS.get(name, ("a",))))
        header[new] = header.pop(rng.choice(list(header)))
    else:
        header = trees.of_tree(rng, header, WORDS.get(name, ()))
    text = trees.dumps(header)
    length = len(text) if rng.random() < 0.9 else rng.choice(BOUNDARIES) % (1 << 64)
    return struct.pack("<Q", length) + text + content[8 + size :]


_GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def gguf_places(content: bytes) -> list[tuple[int, str]]:
    """Where the numbers of a GGUF header stand, with struct's letters: versions, counts, lengths, types, sizes."""
    places: list[tuple[int, str]] = []
    at = 4

    def number(code: str) -> int:
        nonlocal at
        places.append((at, code))
        (value,) = struct.unpack_from(f"<{code}", content, at)
        at += struct.calcsize(f"<{code}")
        return value

    def text() -> None:
        nonlocal at
        length = number("Q")
        places.append((at, f"{length}s"))
        at += length

    def value(kind: int) -> None:
        nonlocal at
        if kind == 8:
            text()
        elif kind == 9:
            item, count = number("I"), number("Q")
            for _ in range(min(count, 10_000)):
                if item == 8:
                    text()
                else:
                    at += _GGUF_SIZES[item]
        else:
            places.append((at, "I" if _GGUF_SIZES[kind] == 4 else "Q" if _GGUF_SIZES[kind] == 8 else "B"))
            at += _GGUF_SIZES[kind]

    number("I")
    tensors, keys = number("Q"), number("Q")
    for _ in range(keys):
        text()
        value(number("I"))
    for _ in range(tensors):
        text()
        for _ in range(number("I")):
            number("Q")
        number("I")
        number("Q")
    return places


def _gguf(rng, name, content, others):
    places = gguf_places(content)
    new = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at, code = rng.choice(places)
        if code.endswith("s"):
            size = int(code[:-1])
            text = rng.choice((*WORDS.get(name, ()), *TEXTS[:14])).encode("utf-8", "surrogatepass")
            new[at : at + size] = text[:size].ljust(size, b"\0")
            continue
        width = struct.calcsize(f"<{code}")
        (old,) = struct.unpack_from(f"<{code}", new, at)
        value = rng.choice((rng.choice(BOUNDARIES), old + 1, old - 1, old * 2, rng.randrange(40)))
        struct.pack_into(f"<{code}", new, at, value % (1 << 8 * width))
    return bytes(new)


def _msgpack(rng, name, content, others):
    """A stream of LWM's: one record's key, shape, type or bytes are others; records vanish, move or come twice."""
    records = list(msgpack.Unpacker(io.BytesIO(content), use_list=True, max_buffer_size=0))
    at, what = rng.randrange(len(records)), rng.randrange(7)
    key, value = records[at]
    if what == 0:
        records[at][0] = _shallow(rng, key)
    elif what == 1:
        records.insert(rng.randrange(len(records) + 1), records[at])
    elif what == 2:
        del records[at]
    elif what == 3:
        records[at][1] = of_bytes(rng, value, [record[1] for record in records[:4]])
    else:
        inner = msgpack.unpackb(value, strict_map_key=False)
        if isinstance(inner, msgpack.ExtType):
            parts = list(msgpack.unpackb(inner.data))
            parts[rng.randrange(3)] = _shallow(rng, parts[rng.randrange(3)])
            code = 1 if rng.random() < 0.9 else rng.randrange(128)
            inner = msgpack.ExtType(code, msgpack.packb(parts))
        chunked = {"__msgpack_chunked_array__": True, "shape": {"0": rng.choice((0, 1, 2**40))}, "chunks": {"0": inner}}
        records[at][1] = msgpack.packb(chunked if what == 4 else inner)
    return b"".join(msgpack.packb(record) for record in records)


def _shallow(rng: random.Random, value):
    """A value that msgpack can hold."""
    return rng.choice(
        (
            value,
            None,
            0,
            -1,
            2**31,
            2**63,
            2**64 - 1,
            "",
            "a" * 300,
            "params",
            "float32",
            "bfloat16",
            "int8",
            b"",
            b"ab",
            [],
            [0],
            [2**63, 2],
            [1] * 20,
            ["params"] * 17,
            [["a"]],
            {},
            {"0": 1},
            1.5,
            True,
        )
    )


def _pickle(rng, name, content, others):
    """Opcodes that vanish, move, come twice or are put in, hostile ones too."""
    spans, last = [], 0
    for _, _, at in pickletools.genops(content):
        if at > last:
            spans.append(content[last:at])
        last = at
    spans.append(content[last:])
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, what = rng.randrange(len(spans)), rng.randrange(6)
        if what == 0:
            del spans[at]
        elif what == 1:
            spans.insert(at, spans[rng.randrange(len(spans))])
        elif what == 2:
            other = rng.randrange(len(spans))
            spans[at], spans[other] = spans[other], spans[at]
        elif what == 3:
            spans[at] = of_bytes(rng, spans[at], [])
        else:
            spans.insert(at, rng.choice(payloads.OPCODES))
    return b"".join(spans)


def png_chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], 8
    while at + 8 <= len(content):
        (size,) = struct.unpack_from(">I", content, at)
        found.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + size]))
        at += 12 + size
    return found


def png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """A PNG of these chunks, with their checksums."""
    made = (struct.pack(">I", len(x)) + kind + x + struct.pack(">I", zlib.crc32(kind + x)) for kind, x in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(made)


def _png(rng, name, content, others):
    chunks = png_chunks(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(chunks))
        kind, data = chunks[at]
        what = rng.randrange(8)
        if what == 0:
            del chunks[at]
        elif what == 1:
            chunks.insert(rng.randrange(len(chunks) + 1), chunks[at])
        elif what == 2:
            chunks[at] = (
                rng.choice(
                    (
                        b"IHDR",
                        b"acTL",
                        b"fcTL",
                        b"fdAT",
                        b"eXIf",
                        b"iCCP",
                        b"tRNS",
                        b"PLTE",
                        b"zTXt",
                        b"iTXt",
                        b"pHYs",
                        b"gAMA",
                        b"sRGB",
                        b"cHRM",
                        b"IDAT",
                        b"\0\0\0\0",
                    )
                ),
                data,
            )
        elif what == 3:
            chunks.insert(1, (b"acTL", struct.pack(">II", rng.choice(BOUNDARIES) % 2**32, rng.randrange(3))))
        elif what == 4:
            chunks.insert(1, (b"zTXt", b"a\0\0" + zlib.compress(b"\0" * rng.choice((100, 1 << 20, 1 << 27)))))
        elif what == 5:
            chunks[0] = (
                b"IHDR",
                struct.pack(
                    ">IIBBBBB",
                    rng.choice(BOUNDARIES) % 2**32,
                    rng.choice((1, 8, 60_000, 2**31 - 1)),
                    rng.choice((1, 2, 4, 8, 16)),
                    rng.choice((0, 2, 3, 4, 6)),
                    0,
                    0,
                    rng.choice((0, 1)),
                ),
            )
        else:
            chunks[at] = kind, of_bytes(rng, data, [x for _, x in chunks])
    return png(chunks)


def _yaml(rng, name, content, others):
    text = content.decode()
    lines = text.split("\n")
    at = rng.randrange(len(lines))
    what = rng.randrange(9)
    if what < 4:  # the value of a key
        value = rng.choice((*map(str, BOUNDARIES), *payloads.YAML))
        lines[at] = re.sub(r"(: ).*", lambda found: found[1] + value, lines[at], count=1)
    elif what == 4:
        lines.insert(at, lines[rng.randrange(len(lines))])
    elif what == 5:
        del lines[at]
    elif what == 6:
        lines[at] = re.sub(r"[\w-]+", lambda found: rng.choice(WORDS.get(name, ("a",))), lines[at], count=1)
    elif what == 7:
        depth = rng.choice(trees.DEPTHS)
        lines[at] = rng.choice(
            ("a: " + "[" * depth, "a: " + "{a: " * depth, "- " * depth, "? " * depth, "a: " + "!" * depth)
        )
    else:
        lines.insert(at, rng.choice(payloads.YAML_LINES))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _template(rng, name, content, others):
    """Jinja put together from pieces, among them what loops, grows, recurs and looks for Python's objects."""
    parts = [content.decode("utf-8", "replace")]
    for _ in range(rng.choice((1, 1, 2, 4))):
        parts.insert(rng.randrange(len(parts) + 1), rng.choice(payloads.JINJA))
    text = "".join(parts)
    if rng.random() < 0.3:
        text = text.replace("1", rng.choice(("0", "-1", "100000", "10**9", "9" * 30)))
    return text.encode()


_SPECIAL: dict[str, Callable] = {
    "json": _json,
    "jsonl": _jsonl,
    "safetensors": _safetensors,
    "gguf": _gguf,
    "msgpack": _msgpack,
    "pickle": _pickle,
    "png": _png,
    "yaml": _yaml,
    "jinja": _template,
}
