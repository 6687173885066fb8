"""JSON that is not trusted: what is nested beyond all need is a ValueError, before anything walks through it."""

import json
import re
from typing import Any

DEEPEST = 64
"""Levels of lists and objects. Python's own limit is some hundred, less the deeper the caller is; configs have five."""
_SHOWN = 120
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str | bytes) -> Any:
    """The value that `text` holds.

    Raises ValueError (json.JSONDecodeError with the place, UnicodeDecodeError) where there is none, where it has
    numbers of thousands of digits, halves of surrogate pairs, or more than DEEPEST levels.
    """
    text = text.decode("utf-8") if isinstance(text, bytes) else text
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested more than {DEEPEST} levels deep") from None
    # A text with few brackets cannot be deep: most need no walk.
    if text.count("[") + text.count("{") > DEEPEST:
        _check_depth(value)
    if _HALF.search(text) and not _is_unicode(value):
        raise ValueError("a text holds half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    return value


def brief(value: object, most: int = _SHOWN) -> str:
    """A value for an error message: no more than `most` characters of it."""
    if isinstance(value, dict | list | tuple):
        # No repr of all of it: it may be long, or too deep for repr.
        text = f"{type(value).__name__} of {len(value)}" if _is_large(value) else repr(value)
    elif isinstance(value, int) and abs(value) >= 10**most:
        text = f"a whole number of over {most} digits"
    else:
        text = repr(value if not isinstance(value, str) else value[: most + 1])
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (UnicodeEncodeError, RecursionError):
        return False
    return True


def _is_large(value: object, levels: int = 3) -> bool:
    if not isinstance(value, dict | list | tuple):
        return False
    parts = list(value.values()) if isinstance(value, dict) else value
    return levels == 0 or len(parts) > 20 or any(_is_large(part, levels - 1) for part in parts)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST):
        level = [part for one in level if isinstance(one, dict | list) for part in _parts(one)]
        if not any(isinstance(part, dict | list) for part in level):
            return
    raise ValueError(f"nested more than {DEEPEST} levels deep")


def _parts(value: dict | list) -> list:
    return list(value.values()) if isinstance(value, dict) else value
