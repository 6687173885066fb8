"""Changes that know a format: they reach what lies behind a checksum or a length, where flipped bits do not."""

import io
import json
import pickle
import pickletools
import random
import re
import struct
import zlib
from collections.abc import Callable

import msgpack

from tests.fuzz import trees
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
            spans.insert(at, rng.choice(_OPCODES))
    return b"".join(spans)


class _Runs:
    def __reduce__(self):
        import os

        return os.system, ("touch CANARY",)


def deep_pickle(depth: int) -> bytes:
    """Tuples in tuples."""
    return b"\x80\x04)" + b"\x85" * depth + b"."


def memo_bomb(times: int, size: int = 1 << 20) -> bytes:
    """One string of `size` bytes that becomes `times` arrays, each of them a copy (big-endian numbers are turned)."""

    def text(value: str) -> bytes:
        return b"\x8c" + bytes([len(value)]) + value.encode()

    dtype = (
        b"cnumpy\ndtype\n"
        + text("f4")
        + b"\x89\x88\x87R(K\x03"
        + text(">")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tbq\x02"
    )
    content = b"B" + struct.pack("<I", size) + b"\0" * size + b"q\x03"
    parts = [b"\x80\x03}("]
    for i in range(times):
        array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R(K\x01J" + struct.pack(
            "<i", size // 4
        )
        parts += [text(f"a{i}"), array, b"\x85", b"h\x02" if i else dtype, b"\x89", b"h\x03" if i else content, b"tb"]
    return b"".join((*parts, b"u."))


_OPCODES = (
    pickle.dumps(_Runs(), 0)[:-1],
    pickle.dumps(_Runs(), 2)[2:-1],
    pickle.dumps(_Runs(), 4)[2:-1],
    b"cos\nsystem\n",
    b"cbuiltins\neval\n",
    b"\x8c\x08builtins\x8c\x04exec\x93",
    b"(S'touch CANARY'\ntR",
    b"R",
    b"b",
    b"o",
    b"\x81",
    b"0",
    b"1",
    b"2",
    b"(",
    b"t",
    b"l",
    b"]",
    b"}",
    b")",
    b"e",
    b"a",
    b"u",
    b"s",
    b"d",
    b"\x85",
    b"\x86",
    b"\x87",
    b"N",
    b"\x94",
    b"h\x00",
    b"j\xff\xff\xff\xff",
    b"q\xff",
    b"r\xff\xff\xff\xff",
    b"I" + b"9" * 5000 + b"\n",
    b"L" + b"9" * 5000 + b"L\n",
    b"F1e999\n",
    b"g99999999999999999999\n",
    b"V\\ud800\n",
    b"V\\U99999999\n",
    b"\x8b\xff\xff\xff\x7f",
    b"\x8b\xff\xff\xff\xff",
    b"B\xff\xff\xff\x7f",
    b"\x8e" + b"\xff" * 8,
    b"\x95" + b"\xff" * 8,
    b"X\x04\x00\x00\x00\xed\xa0\x80a",
    b"\x80\xff",
    b"Pid\n",
    b"Q",
    b"\x82\x01",
    b"\x97",
    b"\x98",
    b"i os\nsystem\n",
    b".",
    b"c\n\n",
    b"cnumpy\nndarray\n",
    b"cnumpy\ndtype\n",
    b"c_codecs\nencode\n",
    b"cnumpy.core.multiarray\n_reconstruct\n",
)


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
        value = rng.choice((*map(str, BOUNDARIES), *_YAML))
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
        lines.insert(at, rng.choice(_YAML_LINES))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


_YAML = (
    "!!python/object/apply:os.system ['touch CANARY']",
    "!!python/name:os.system",
    "!!binary aGVsbG8=",
    "!!set {a, b}",
    "&a [*a, *a]",
    "*nothing",
    "<<: *a",
    ".inf",
    "-.inf",
    ".nan",
    "1e999",
    "1__0",
    "0x1F",
    "1:30:00",
    "2001-01-01",
    "9" * 39,
    "9" * 5000,
    "true",
    "null",
    "''",
    '"\\0"',
    '"\\ud800"',
    "../../etc/passwd",
    "/etc/passwd",
    "|",
    ">-",
    "@",
    "`",
    "{}",
    "[]",
    "[1, {a: 2}]",
    "!!timestamp 2001-01-01",
    "? a",
    "'" + "x" * 20_000 + "'",
    "yes",
    "1_000",
    "0o17",
    "-",
    "+",
)
_YAML_LINES = (
    "a: &a [x, x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]\n"
    "c: &c [*b, *b, *b, *b, *b, *b, *b]\n"
    "d: &d [*c, *c, *c, *c, *c, *c, *c, *c]\ne: &e [*d, *d, *d, *d, *d, *d, *d]\nf: [*e, *e, *e, *e, *e, *e, *e]",
    "a: &a {b: *a}",
    "? [a, b]\n: c",
    "? {a: {b: c}}\n: d",
    "---",
    "...",
    "%YAML 9.9",
    "%TAG ! tag:x,2000:",
    "\t",
    "\0",
    "\x85",
    "!!python/object/new:os.system [touch CANARY]: 1",
    "- a",
    "key: [" + "a, " * 30_000 + "]",
    ": ",
    "? ",
    "# " + "x" * 1000,
)


def _template(rng, name, content, others):
    """Jinja put together from pieces, among them what loops, grows, recurs and looks for Python's objects."""
    parts = [content.decode("utf-8", "replace")]
    for _ in range(rng.choice((1, 1, 2, 4))):
        parts.insert(rng.randrange(len(parts) + 1), rng.choice(_JINJA))
    text = "".join(parts)
    if rng.random() < 0.3:
        text = text.replace("1", rng.choice(("0", "-1", "100000", "10**9", "9" * 30)))
    return text.encode()


_JINJA = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 10 ** 9 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ lipsum.__globals__['os'].popen('touch CANARY') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ 'a'.ljust(10**9) }}",
    "{{ 'a'|center(1000000000) }}",
    "{{ [1]*1000000000 }}",
    "{{ 'a,'|replace('', 'x'*1000) }}",
    "{{ range(10**9)|list }}",
    "{% set n = namespace(x='a' * 100) %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x='aaaa') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x=[1,2]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "{{ 'x'|indent(1000000000) }}",
    "{% set a %}{% for i in range(90000) %}xxxxxxxxxxxxxxxxxxxx{% endfor %}{% endset %}{{ a }}{{ a }}",
    "{{ messages|map(attribute='content')|join(', ') }}",
    "{{ messages|tojson(indent=4) }}",
    "{{ messages[0]['content'].split('e') }}",
    "{{ messages|batch(1000000000, 'x')|list }}",
    "{{ 'x'|wordwrap(1) }}",
    "{{ messages|groupby('role') }}",
    "{{ lipsum(n=100000) }}",
    "{% include '/etc/passwd' %}",
    "{% import '/etc/passwd' as x %}",
    "{% extends 'x' %}",
    "{{ raise_exception('no') }}",
    "{{ ((((" * 300,
    "{% if 1 %}" * 200,
    "{{ [" + "[" * 2000,
    "{{ 1" + "+1" * 3000 + " }}",
    "{{ " + "not " * 3000 + "1 }}",
    "{% for m in messages recursive %}{{ loop(messages) }}{{ loop(messages) }}{% endfor %}",
    "{{ messages.append(messages) }}",
    "{{ undefined.x.y() }}",
    "{% raw %}",
    "{# ",
    "{{ 1 // 0 }}",
    "{{ 1 % 0 }}",
    "{{ none + 1 }}",
    "{{ messages|sum }}",
    "{{ 'a' < 1 }}",
    "{{ dict(a=1)|xmlattr }}",
    "{{ '\\ud800' }}",
    "{{ 'x'|filesizeformat }}",
    "{{ 10**308|float }}",
    "{{ 'abc'|random }}",
    "{{ {}[[]] }}",
    "{% set x = joiner('x'*100) %}{{ x() }}{{ x() }}",
    "{{ messages|slice(1000000000)|list }}",
    "{{ 'x'.encode('idna') }}",
    "{{ caller() }}",
    "{% filter upper %}a{% endfilter %}",
    "{% call m() %}{% endcall %}",
    "{{ loop.index }}",
    "{{ 'a'.zfill(1000000000) }}",
    "\0",
    "{{ '\0' }}",
    "{{ 'a\tb'.expandtabs(1000000000) }}",
    "{{ 'a'.translate({97: 'b'}) }}",
    "{{ 'x'|attr('__class__') }}",
    "{% autoescape true %}x{% endautoescape %}",
    "{{ 'x'|urlize }}",
    "{{ '%s' % messages }}",
    "{{ '%(a)s' % {'a': 1} }}",
    "{{ 'a'|format(1) }}",
    "{{ (1).__class__ }}",
    "{{ messages|pprint }}",
)
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
