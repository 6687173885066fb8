"""The example language: how a jsonl line becomes tokens.

A line is a JSON object; a spec says which of its fields are strung together, and which of them are learned.

    spec        what it gives                                                       loss
    ----------  ------------------------------------------------------------------  ------------------------
    a,b         tokens of a, then tokens of b (each encoded on its own)             on both
    a+b         tokens of the text "a b" (joined by `separator`, then encoded)      on all
    [a],b       as a,b                                                              on b only
    [a,b],c     as [a],[b],c                                                        on c only
    <|bos|>     the begin token                                                     as any field
    <|eos|>     the end token                                                       as any field
    <|name|>    another special token that the tokenizer calls so                   as any field
    vision      <vision> codes </vision>, when the field holds a list of codes      on all of it
    "Draw"+a    words of the spec itself, in JSON's quotes, wherever a name may     as any field
                stand: tokens of the text "Draw a"

Text:

    {"question": "What is 2 + 2?", "answer": "4"}      with [question],answer
    <s> What is 2 + 2? 4 </s>
     ·  ·   ·  ·  ·  · 1  1                             (1: the token is a target that counts)

Vision, two frames of four codes (`codes_per_frame=4`, `vision_codes=8192`):

    {"vision": [11, 12, 13, 14, 21, 22, 23, 24], "caption": "a cat"}      with [vision],caption
    <s> <vision> 11 12 13 14 8192 21 22 23 24 8193 </vision> a cat </s>
     ·     ·      ·  ·  ·  ·   ·   ·  ·  ·  ·   ·      ·     1  1   1

`vision_codes` ends every frame but the last, `vision_codes + 1` the last; both are vision ids. The codes and their
end marks have modality true; `<vision>` and `</vision>` are text.

The begin token comes first, without loss, and the end token last, with loss, unless the spec itself begins or
ends with it; nothing else is ever put in. A spec may be a list, or a line's own `fields` may
be one: then one is chosen, by the number of the line counted from 0, so that it is the same in every run:

    {"fields": ["[instruction],vision", "[vision],caption"], "vision": […], "instruction": …, "caption": …}

Liu et al. 2024 (LWM), arXiv:2402.08268. Its released code adds the tokenizer's own begin token before every field
as well; that fault is not repeated here.
"""

import dataclasses
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ringjax.data.errors import DataError
from ringjax.data.example import Example, require_usable
from ringjax.data.tokenizers import VISION_END, VISION_START, TextTokenizer
from ringjax.json_text import brief

BOS = "<|bos|>"
EOS = "<|eos|>"
MOST_SPEC = 4096
"""Characters of a spec; the time that its quotes take grows with the square."""
_WORDS = re.compile(r'"(?:[^"\\]|\\.)*"')

_SURROGATE = re.compile("[\ud800-\udfff]")

Spec = str | Sequence[str]


@dataclasses.dataclass(frozen=True)
class Field:
    """One part of a spec between commas: names and words in quotes joined by `+`, or a special token."""

    names: tuple[str, ...]
    loss: bool

    @property
    def special(self) -> bool:
        return _is_special(self.names[0])

    def __str__(self) -> str:
        return "+".join(self.names)


def _is_special(name: str) -> bool:
    return name.startswith("<|") and name.endswith("|>")


def words(name: str) -> str | None:
    """The text of words in quotes; None for the name of a field."""
    return json.loads(name, strict=False) if name.startswith('"') else None


def parse(spec: str) -> tuple[Field, ...]:
    """The fields of a spec.

    Raises:
        ValueError: brackets or quotes do not pair, a name is missing, a special token is joined by `+`, or the spec is
            longer than MOST_SPEC or holds NUL.
    """
    if len(spec) > MOST_SPEC or "\0" in spec:
        what = (
            f"has {len(spec)} characters, more than {MOST_SPEC}" if len(spec) > MOST_SPEC else "holds the character NUL"
        )
        raise ValueError(f"fields {spec[:40]!r}… {what}; name fields, and put long texts into the line")
    quoted: list[str] = []

    def put_by(match: re.Match) -> str:
        quoted.append(match[0])
        return f"\0{len(quoted) - 1}\0"

    def put_back(name: str) -> str:
        return re.sub("\0(\\d+)\0", lambda match: quoted[int(match[1])], name)

    bare = _WORDS.sub(put_by, spec)
    if '"' in bare:
        raise ValueError(f"fields {spec!r}: a quote is never closed, or not as in JSON")
    return tuple(
        dataclasses.replace(field, names=tuple(_whole(put_back(name), spec) for name in field.names))
        for field in _parse_bare(bare, spec)
    )


def _whole(name: str, spec: str) -> str:
    """A name, or words in quotes that are JSON and nothing else."""
    if '"' in name:
        try:
            empty = not json.loads(name, strict=False)
        except ValueError:
            raise ValueError(f'fields {spec!r}: {name} is neither a name nor words in quotes; write "Draw"+a') from None
        if empty:
            raise ValueError(f"fields {spec!r}: there are no words in the quotes")
    return name


def _parse_bare(bare: str, spec: str) -> list[Field]:
    """The fields of a spec without quotes; `spec` is what errors name."""
    fields, inside = [], False
    for part in bare.split(","):
        name = part.strip()
        opens, closes = name.startswith("["), name.endswith("]")
        inner = name[opens : len(name) - closes]
        if (opens and inside) or (closes and not (inside or opens)) or "[" in inner or "]" in inner:
            raise ValueError(f"fields {spec!r}: the brackets around {name!r} do not pair; write [a],b or [a,b],c")
        inside = inside or opens
        fields.append(Field(_names(inner, spec), loss=not inside))
        inside = inside and not closes
    if inside:
        raise ValueError(f"fields {spec!r}: a [ is never closed; write [a],b or [a,b],c")
    return fields


def _names(part: str, spec: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in part.split("+"))
    if "" in names:
        raise ValueError(f"fields {spec!r}: a name is missing beside a comma, a + or a bracket")
    if len(names) > 1 and any(map(_is_special, names)):
        raise ValueError(f"fields {spec!r}: {BOS}, {EOS} and their like are tokens, not text; separate them by a comma")
    return names


def choose(spec: Spec, line_index: int) -> str:
    """The spec of a line: the only one, or one of a list chosen by the line's number (counted from 0)."""
    if isinstance(spec, str):
        return spec
    return random.Random(line_index).choice(list(spec))


@dataclasses.dataclass(frozen=True)
class FieldEncoder:
    """Turns a line and a spec into an `Example`."""

    tokenizer: TextTokenizer
    codes_per_frame: int = 256
    vision_codes: int = 8192
    max_frames: int | None = None
    separator: str = " "
    add_bos: bool = True
    add_eos: bool = True

    def encode_line(
        self, row: Mapping, default: Spec | None, which: int | Callable[[Spec], str], place: str
    ) -> Example:
        """The example of a whole line: by its own `fields`, or else by `default`.

        `which` is the number of the line (`choose`), or a function that chooses from a list of specs.

        Raises:
            DataError: no spec, a faulty spec, a field that is missing, empty or of a wrong type, codes out of range,
                or nothing to learn; the message begins with `place`.
        """
        spec = row.get("fields", default)
        if spec is None:
            raise DataError(f"{place}: no 'fields' in the line and none in the config; say what to learn, e.g. 'text'")
        if not _is_spec(spec):
            raise DataError(f"{place}: 'fields' must be a string or a list of strings, not {_shown(spec)}")
        chosen = which(spec) if callable(which) else choose(spec, which)
        return require_usable(self.encode(row, chosen, place), place)

    def encode(self, row: Mapping, spec: str, place: str = "example") -> Example:
        """The example of `row` by one spec, which may lack loss: a prompt is `encode` with `add_eos=False`."""
        try:
            fields = parse(spec)
        except ValueError as error:
            raise DataError(f"{place}: {error}") from None
        builder = _Builder()
        if self.add_bos and self._special(fields[0]) != self.tokenizer.bos_id:
            builder.text([self.tokenizer.bos_id], loss=False)
        for field in fields:
            self._append(builder, row, field, place)
        if self.add_eos and self._special(fields[-1]) != self.tokenizer.eos_id:
            builder.text([self.tokenizer.eos_id], loss=True)
        return builder.example()

    def enclosed(self, turns: Sequence[Example]) -> Example:
        """Several examples, encoded without begin and end, as one with both."""
        builder = _Builder()
        builder.text([self.tokenizer.bos_id] if self.add_bos else [], loss=False)
        for turn in turns:
            builder.example_so_far(turn)
        builder.text([self.tokenizer.eos_id] if self.add_eos else [], loss=True)
        return builder.example()

    def _append(self, builder: "_Builder", row: Mapping, field: Field, place: str) -> None:
        if field.special:
            token = self._special(field)
            if token is None:
                has = ", ".join(sorted(self.tokenizer.specials)[:8]) or "none"
                raise DataError(f"{place}: the tokenizer has no special token {field}; it has {has}")
            return builder.text([token], field.loss)
        said = [words(name) for name in field.names]
        missing = [name for name, own in zip(field.names, said) if own is None and name not in row]
        if missing:
            raise DataError(f"{place}: field {missing[0]!r} is missing; the line has {_brief_names(row)}")
        name = field.names[0]
        if said == [None] and not isinstance(row[name], str):
            return self._append_vision(builder, row[name], field.loss, f"{place}: field {name!r}")
        texts = [
            _text(row[name], f"{place}: field {name!r}") if own is None else own for name, own in zip(field.names, said)
        ]
        text = self.separator.join(texts)
        if not text.isascii() and _SURROGATE.search(text):
            raise DataError(
                f"{place}: field {name!r} holds half of a surrogate pair, which is no character; take it out"
            )
        builder.text(self.tokenizer.encode(text), field.loss)

    def _special(self, field: Field) -> int | None:
        """The id of a field that is a special token of this tokenizer; None for all others."""
        if not field.special:
            return None
        named = {BOS: self.tokenizer.bos_id, EOS: self.tokenizer.eos_id}
        return named.get(field.names[0], self.tokenizer.specials.get(field.names[0]))

    def _append_vision(self, builder: "_Builder", value: object, loss: bool, place: str) -> None:
        frames = self.frames(value, place)
        ends = np.full((len(frames), 1), self.vision_codes, np.int32)
        ends[-1] += 1
        builder.text(self.tokenizer.marker(VISION_START), loss)
        builder.vision(np.concatenate([frames, ends], axis=1).ravel(), loss)
        builder.text(self.tokenizer.marker(VISION_END), loss)

    def frames(self, value: object, place: str) -> np.ndarray:
        """The value of a vision field as `[frames, codes_per_frame]` int32; at most `max_frames`, evenly spread.

        Raises DataError, which begins with `place`, for what are no codes of whole frames.
        """
        codes = _codes(value, place)
        if len(codes) == 0 or len(codes) % self.codes_per_frame:
            raise DataError(
                f"{place} has {len(codes)} codes, which is not a whole number of frames of {self.codes_per_frame}; "
                "give every frame whole and without end marks, or set codes_per_frame"
            )
        wrong = np.flatnonzero((codes < 0) | (codes >= self.vision_codes))
        if len(wrong):
            raise DataError(
                f"{place} has code {codes[wrong[0]]} at {wrong[0]}; codes are 0 to {self.vision_codes - 1}, end marks "
                "are put in by the loader"
            )
        frames = codes.reshape(-1, self.codes_per_frame).astype(np.int32)
        if self.max_frames is not None and len(frames) > self.max_frames:
            frames = frames[np.linspace(0, len(frames) - 1, self.max_frames).astype(int)]
        return frames


class _Builder:
    """Collects tokens, modality and loss in step."""

    def __init__(self) -> None:
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def text(self, ids: Sequence[int], loss: bool) -> None:
        self._add(np.asarray(ids, np.int32), False, loss)

    def vision(self, ids: np.ndarray, loss: bool) -> None:
        self._add(ids, True, loss)

    def example_so_far(self, example: Example) -> None:
        self._parts.append((example.tokens, example.modality, example.loss))

    def _add(self, ids: np.ndarray, vision: bool, loss: bool) -> None:
        self._parts.append((ids, np.full(len(ids), vision), np.full(len(ids), loss)))

    def example(self) -> Example:
        return Example(*(np.concatenate(arrays) for arrays in zip(*self._parts)))


def _is_spec(spec: object) -> bool:
    if isinstance(spec, list | tuple):
        return bool(spec) and all(isinstance(one, str) for one in spec)
    return isinstance(spec, str)


def _text(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place} must be text here, not {_shown(value)}")
    if not value.strip():
        raise DataError(f"{place} is empty; fill it or leave it out of 'fields'")
    return value


def _codes(value: object, place: str) -> np.ndarray:
    whole = isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "iu"
    if not whole and not (isinstance(value, list) and all(type(code) is int for code in value)):
        raise DataError(f"{place} must be text or a flat list of whole numbers (codes), not {_shown(value)}")
    try:
        return np.asarray(value, np.int64)
    except OverflowError:
        raise DataError(f"{place} has a code beyond any codebook") from None


def _brief_names(row: Mapping) -> str:
    names = ", ".join(map(str, row))
    return names if len(names) <= 300 else f"{names[:300]}…"


def _shown(value: object) -> str:
    """A value of a line, short enough for an error message."""
    return f"{type(value).__name__} {brief(value, 40)}"
