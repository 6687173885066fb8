"""Changes of JSON-like trees: a value becomes a hostile one, keys vanish, move or come twice, levels become many."""

import copy
import json
import random
from typing import Any

from tests.fuzz.mutate import BOUNDARIES, TEXTS

DEPTHS = (5, 40, 150, 900, 990, 1100, 20_000)


class Raw(str):
    """Text that goes into the JSON as it is: what no Python value says, such as very deep nesting."""


def hostile(rng: random.Random) -> Any:
    """A value that a reader may not expect at this place."""
    kind = rng.randrange(12)
    if kind < 4:
        return rng.choice(BOUNDARIES)
    if kind < 6:
        return rng.choice(TEXTS)
    if kind == 6:
        return rng.choice((None, True, False, [], {}, [[]], [None], {"": None}, [1, 2, 3], "auto", {"a": [{}]}))
    if kind == 7:
        return rng.choice((0.5, -0.0, 1e-320, 1e308, 0.1, -1.5, 2.0))
    if kind == 8:
        return Raw(rng.choice(("NaN", "Infinity", "-Infinity", "1e999", "9" * 400, "9" * 5000, "-0", "0.1e-999")))
    if kind == 9:
        depth = rng.choice(DEPTHS)
        start, end = rng.choice((("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")))
        return Raw(start * depth + "0" + end * depth)
    if kind == 10:
        return [rng.choice((0, 1, -1, "a", None))] * rng.choice((1, 2, 10, 3000))
    return {f"k{i}": hostile(rng) for i in range(rng.choice((1, 2, 5)))}


def _nodes(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key)."""
    found, waiting = [], [tree]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict | list):
            keys = list(one) if isinstance(one, dict) else range(len(one))
            found += [(one, key) for key in keys]
            waiting += [one[key] for key in keys]
    return found


def of_tree(rng: random.Random, tree: Any, words: tuple[str, ...] = ()) -> Any:
    """A changed copy; `words` are keys and values that a reader may know."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        nodes = _nodes(tree)
        if not nodes or rng.random() < 0.02:
            return hostile(rng)
        box, key = rng.choice(nodes)
        what = rng.randrange(10)
        if what < 5:
            box[key] = hostile(rng)
        elif what == 5:
            del box[key]
        elif what == 6:
            other_box, other_key = rng.choice(nodes)
            box[key] = copy.deepcopy(other_box[other_key]) if _has(other_box, other_key) else None
        elif what == 7:
            old = box[key]
            times = rng.choice((2, 1000)) if isinstance(old, str | list) and len(old) < 1000 else 2
            box[key] = old * times if isinstance(old, str | list) else [old]
        elif what == 8 and isinstance(box, dict):
            new = rng.choice(words) if words and rng.random() < 0.7 else rng.choice(TEXTS)
            box[new] = box.pop(key) if rng.random() < 0.5 else hostile(rng)
        elif isinstance(box[key], int | float) and not isinstance(box[key], bool):
            box[key] = box[key] + rng.choice((-1, 1, 0.5, 2**31))
        elif words:
            box[key] = rng.choice(words)
    return tree


def _has(box: Any, key: Any) -> bool:
    return key in box if isinstance(box, dict) else key < len(box)


def dumps(tree: Any) -> bytes:
    """JSON with `Raw` texts put in as they are; lone surrogates are written as escapes."""
    raws: list[str] = []

    def put_by(value: Any) -> Any:
        if isinstance(value, Raw):
            raws.append(str(value))
            return f"@raw{len(raws) - 1}@"
        if isinstance(value, dict):
            return {str(key): put_by(one) for key, one in value.items()}
        return [put_by(one) for one in value] if isinstance(value, list) else value

    text = json.dumps(put_by(tree))
    for number, raw in enumerate(raws):
        text = text.replace(f'"@raw{number}@"', raw)
    return text.encode()


def of_json(rng: random.Random, content: bytes, words: tuple[str, ...] = ()) -> bytes:
    """A JSON text with a changed tree; a byte order mark, a second value or a twice given key now and then."""
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return content
    text = dumps(of_tree(rng, tree, words))
    odd = rng.randrange(40)
    if odd == 0:
        return b"\xef\xbb\xbf" + text
    if odd == 1:
        return text + b" " + text
    if odd == 2 and text.startswith(b"{") and isinstance(tree, dict) and tree:
        key = rng.choice(list(tree))
        return b"{" + json.dumps(key).encode() + b":" + dumps(hostile(rng)) + b"," + text[1:]
    return text
