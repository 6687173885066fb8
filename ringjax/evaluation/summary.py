"""Records to one table: what was right, how long it took and what memory it needed, by method and length."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

Record = dict[str, Any]


class Line(NamedTuple):
    """A row of the table. A value is None where it was not measured."""

    part: str
    method: str
    length: int
    count: int
    score: float
    """Mean score of the answers, 0 to 1; for perplexity the perplexity."""
    first_seconds: float | None
    seconds: float
    read: float | None
    """Tokens of the prompt that the model read, mean."""
    cache_bytes: int | None
    peak_bytes: int | None
    token_loss: float | None = None
    """Perplexity: nats a token."""
    character_loss: float | None = None
    """Nats a character of the text."""
    byte_bits: float | None = None
    """Bits a byte of the text."""


def summarise(records: Iterable[Record]) -> list[Line]:
    """A line for each part, length and method, in the order of the parts, ascending lengths, order of the methods."""
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        groups.setdefault((record["part"], record["method"], record["length"]), []).append(record)
    parts, methods = (list(dict.fromkeys(key[i] for key in groups)) for i in range(2))
    ordered = sorted(groups, key=lambda key: (parts.index(key[0]), key[2], methods.index(key[1])))
    return [_line(key, groups[key]) for key in ordered]


def _line(key: tuple, records: list[Record]) -> Line:
    # The first answer of a method at a length waits for compilation: it does not count where there are others.
    warm = [record for record in records if not record.get("compiled")] or records
    return Line(
        *key, len(records), mean_score(records), _mean(warm, "first_seconds"), _mean(warm, "seconds"),
        _mean(records, "tokens"), _most(records, "cache_bytes"), _most(records, "peak_bytes"), *_losses(records),
    )  # fmt: skip


def _losses(records: Sequence[Record]) -> tuple[float | None, ...]:
    """Nats a token, nats a character, bits a byte; None where they were not measured."""
    if "losses" not in records[0]:
        return None, None, None
    nats, tokens = (sum(np.asarray(record[name], float).sum() for record in records) for name in ("losses", "counts"))
    # Results of earlier versions do not say how long their text was.
    lengths = [sum(record.get(name) or math.nan for record in records) for name in ("characters", "bytes")]
    characters, bits = (nats / length if math.isfinite(length) else None for length in lengths)
    return nats / tokens, characters, None if bits is None else bits / math.log(2)


def mean_score(records: Sequence[Record]) -> float:
    """The mean of the scores; exp(mean loss) where records hold losses."""
    if "losses" in records[0]:
        losses, counts = (sum(np.asarray(r[name], float).sum() for r in records) for name in ("losses", "counts"))
        return math.exp(min(losses / counts, 700))
    return float(np.mean([record["score"] for record in records]))


def by_bucket(records: Sequence[Record]) -> list[float | None]:
    """Mean loss of each bucket of positions over all rows; None where no row has reached."""
    losses, counts = (np.sum([record[name] for record in records], axis=0) for name in ("losses", "counts"))
    return [float(loss / count) if count else None for loss, count in zip(losses, counts)]


def grid(records: Iterable[Record], row: str) -> tuple[list, list[int], np.ndarray]:
    """Mean scores by the field `row` and length: rows, lengths, `[rows, lengths]` with NaN where nothing was asked."""
    cells: dict[tuple, list[float]] = {}
    for record in records:
        cells.setdefault((record[row], record["length"]), []).append(record["score"])
    rows, lengths = list(dict.fromkeys(key[0] for key in cells)), sorted({key[1] for key in cells})
    if all(isinstance(name, (int, float)) for name in rows):
        rows.sort()
    values = [[np.mean(cells.get((name, length), [np.nan])) for length in lengths] for name in rows]
    return rows, lengths, np.asarray(values, float)


def table(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of the table, in words. Columns that nobody has measured are left out."""
    perplexity = all(line.part == "perplexity" for line in lines)
    columns: list[tuple[str, Callable[[Line], str | None]]] = [
        ("task", lambda line: line.part),
        ("length", lambda line: str(line.length)),
        ("method", lambda line: line.method),
        ("perplexity", lambda line: f"{line.score:.2f}" if perplexity else None),
        ("nats a token", lambda line: _shown(line.token_loss)),
        ("nats a character", lambda line: _shown(line.character_loss)),
        ("bits a byte", lambda line: _shown(line.byte_bits)),
        ("score", lambda line: None if perplexity else f"{line.score:.0%}"),
        ("rows" if perplexity else "questions", lambda line: str(line.count)),
        ("tokens read", lambda line: None if line.read is None else f"{line.read:.0f}"),
        ("first token, s", lambda line: _seconds(line.first_seconds)),
        ("in all, s", lambda line: _seconds(line.seconds)),
        ("KV cache, MB", lambda line: _megabytes(line.cache_bytes)),
        ("device's peak so far, MB", lambda line: _megabytes(line.peak_bytes)),
    ]  # fmt: skip
    kept = [(name, show) for name, show in columns if any(show(line) is not None for line in lines)]
    return [name for name, _ in kept], [[show(line) or "-" for _, show in kept] for line in lines]


def markdown(lines: Sequence[Line]) -> str:
    """The table in Markdown."""
    head, rows = table(lines)
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def _mean(records: Sequence[Record], name: str) -> float | None:
    values = [record[name] for record in records if record.get(name) is not None]
    return float(np.mean(values)) if values else None


def _most(records: Sequence[Record], name: str) -> int | None:
    return max((record[name] for record in records if record.get(name) is not None), default=None)


def _shown(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def _seconds(value: float | None) -> str | None:
    return None if value is None else f"{value:.3g}"


def _megabytes(value: int | None) -> str | None:
    return None if value is None else f"{value / 1e6:.1f}"
