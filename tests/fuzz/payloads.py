"""What hostile files are made of: calls in pickles, tags and bombs in YAML, loops and escapes in Jinja."""

import pickle
import struct


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


OPCODES = (
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


YAML = (
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
YAML_LINES = (
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

JINJA = (
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
