"""JSON that is not trusted, and values in messages."""

import json

import pytest

from ringjax.json_text import DEEPEST, brief, parse_json


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


def test_levels():
    assert parse_json(nested(DEEPEST)) == json.loads(nested(DEEPEST))
    flat = [[i] for i in range(1000)]
    assert parse_json(json.dumps(flat)) == flat
    for levels in (DEEPEST + 1, 500, 100_000):
        with pytest.raises(ValueError, match="nested more than 64 levels deep"):
            parse_json('{"a": ' + nested(levels - 1) + "}")


@pytest.mark.parametrize(
    "text, fault",
    [
        ('{"a": "\\ud800"}', "half of a surrogate pair"),
        ('{"\\uDFFF": 1}', "half of a surrogate pair"),
        ("9" * 5000, "digits"),
        (b'"\xff"', "utf-8"),
        ("{", "Expecting property name"),
    ],
)
def test_refused(text, fault):
    with pytest.raises(ValueError, match=fault):
        parse_json(text)


def test_whole_pairs_and_escaped_backslashes_are_characters():
    assert parse_json('"\\ud83d\\ude00"') == "\N{GRINNING FACE}"
    assert parse_json('"\\\\ud800"') == "\\ud800"


def test_values_in_messages_are_short():
    deep = json.loads(nested(500))
    values = ("x" * 10**6, [1] * 10**6, {"a": deep}, deep, 10**4000, -(10**4000), ["x" * 10**6], 1.5, None, {"a": 1})
    assert all(len(brief(value)) <= 120 for value in values)
    assert brief({"a": [1, "b"]}) == "{'a': [1, 'b']}" and brief("a") == "'a'" and brief("x" * 50, 10) == "'xxxxxxxx…"
