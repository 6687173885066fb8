"""Masked packing: several examples in one row, as if each had a row of its own.

An example of n tokens is n − 1 pairs (token, next token), and a row holds `seq_len` pairs. Two examples in a row:

    tokens      <s> a  b  c | <s> x  y | ·          the last token of an example is a target only
    targets      a  b  c  d |  x  y  z | ·
    positions    0  1  2  3 |  0  1  2 | 0          restart, so RoPE sees each example alone
    behind       0  1  2  3 |  0  1  2 | −1         reach ends at the example's first token; padding sees nothing

With example weights, each of the N_i loss tokens of example i weighs 1/N_i. The loss is Σ weight · nll / Σ weight
over the whole batch, the mean over examples of each one's mean, whatever row they landed in:

    packed = Σ_i Σ_{t ∈ i} nll_t / N_i  ÷  Σ_i 1 = unpacked                          (LWM, arXiv:2402.08268, §4)

An example longer than a row is cut into pieces; each piece stands alone from position 0, and the pair that joins two
pieces belongs to the first. Its P pieces share its weight evenly by token, P/N_i each, so that a book does not count
as little as a caption. A cut never falls inside a frame that fits a row.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np

from ringjax.data.example import Example, frame_spans

Batch = dict[str, np.ndarray]

_PADDING = {
    "tokens": (np.int32, 0),
    "modality": (np.bool_, False),
    "targets": (np.int32, 0),
    "target_modality": (np.bool_, False),
    "loss_weights": (np.float32, 0),
    "positions": (np.int32, 0),
    "behind": (np.int32, -1),
    "ahead": (np.int32, 0),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """The pairs `start … stop − 1` of an example, and what each of its loss tokens weighs."""

    example: Example
    start: int
    stop: int
    weight: float
    origin: tuple[int, int, int] = (0, 0, 0)
    """Where to find it again: source, index of the example in the source's stream, number of the piece."""

    def __len__(self) -> int:
        return self.stop - self.start


def cut(
    example: Example, seq_len: int, *, vision_codes: int, weights: Literal["example", "token"] = "example"
) -> list[Piece]:
    """The example as pieces of at most `seq_len` pairs, in order: every pair is in exactly one of them.

    A cut inside a frame moves back to the frame's start, where that leaves a piece at all.
    """
    edges, pairs = [0], example.pairs
    spans = frame_spans(example, vision_codes) if pairs > seq_len else None
    while pairs - edges[-1] > seq_len:
        edges.append(_before_frame(spans, edges[-1], edges[-1] + seq_len))
    edges.append(pairs)
    pieces = len(edges) - 1
    weight = pieces / max(example.loss_tokens, 1) if weights == "example" else 1.0
    return [Piece(example, start, stop, weight) for start, stop in zip(edges[:-1], edges[1:])]


def _before_frame(spans: np.ndarray, start: int, stop: int) -> int:
    """`stop`, or the start of the frame that it falls into when that is beyond `start`."""
    i = np.searchsorted(spans[:, 0], stop, side="left") - 1  # the last frame that begins before `stop`
    if i >= 0 and spans[i, 1] > stop and spans[i, 0] > start:
        return int(spans[i, 0])
    return stop


def empty_batch(rows: int, seq_len: int) -> Batch:
    """A batch of padding: no token is seen by any other or learned."""
    return {name: np.full((rows, seq_len), fill, dtype) for name, (dtype, fill) in _PADDING.items()}


def assemble(rows: Iterable[Iterable[Piece]], batch_size: int, seq_len: int, *, window: int | None = None) -> Batch:
    """`[batch_size, seq_len]` arrays from the pieces of each row; rows that are not given stay padding.

    Raises:
        ValueError: a row's pieces have more than `seq_len` pairs, or there are more than `batch_size` rows.
    """
    batch, filled, pieces = empty_batch(batch_size, seq_len), np.zeros(batch_size, int), []
    for row, given in enumerate(rows):
        if row >= batch_size:
            raise ValueError(f"more than batch_size {batch_size} rows")
        in_row = list(given)
        filled[row] = _filled(in_row)
        if filled[row] > seq_len:
            raise ValueError(f"row {row} holds more than seq_len {seq_len} tokens; cut the examples first")
        pieces += in_row
    if pieces:
        here = np.arange(seq_len) < filled[:, None]
        for name, joined in _join(pieces, window).items():
            batch[name][here] = joined
    return batch


def _join(pieces: list[Piece], window: int | None) -> Batch:
    """The arrays of a batch for the pieces laid end to end; for all at once, as most are short and a batch has many."""
    lengths = np.array([len(piece) for piece in pieces])
    position = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    furthest = np.iinfo(np.int32).max if window is None else window - 1
    sources = [(piece.example, slice(piece.start, piece.stop)) for piece in pieces]
    targets = [(piece.example, slice(piece.start + 1, piece.stop + 1)) for piece in pieces]
    loss = np.concatenate([example.loss[target] for example, target in targets])
    ahead = np.concatenate([_ahead(example)[source] for example, source in sources])
    left = np.repeat(lengths, lengths) - 1 - position
    return {
        "tokens": np.concatenate([example.tokens[source] for example, source in sources]),
        "modality": np.concatenate([example.modality[source] for example, source in sources]),
        "targets": np.concatenate([example.tokens[target] for example, target in targets]),
        "target_modality": np.concatenate([example.modality[target] for example, target in targets]),
        "loss_weights": loss * np.repeat(np.array([piece.weight for piece in pieces], np.float32), lengths),
        "positions": position,
        "behind": np.minimum(position, furthest),
        # A token must not see beyond its piece: what follows in the row is another example.
        "ahead": np.minimum(ahead, np.minimum(left, furthest)),
    }


def _ahead(example: Example) -> np.ndarray:
    return np.zeros(len(example), np.int32) if example.ahead is None else example.ahead


def first_fit(
    pieces: Iterator[Piece], seq_len: int, open_rows: list[list[Piece]], most_open: int
) -> Iterator[list[Piece]]:
    """Rows of pieces: each piece goes to the fullest open row that it fits, and a row is given when it must go.

    `open_rows` is the half-filled pack: it is changed in place, and what is left in it when `pieces` ends is given
    fullest first. Between two rows it is the whole state.
    """
    filled = [_filled(row) for row in open_rows]  # kept beside the rows, as counting anew takes longer than reading
    for piece in pieces:
        size = len(piece)
        fitting = [tokens for tokens in filled if tokens + size <= seq_len]
        if fitting:
            row = filled.index(max(fitting))
        else:
            row = len(open_rows)
            open_rows.append([])
            filled.append(0)
        open_rows[row].append(piece)
        filled[row] += size
        full = filled[row] == seq_len
        if full or len(open_rows) > most_open:
            done = row if full else filled.index(max(filled))
            del filled[done]
            yield open_rows.pop(done)
    while open_rows:
        done = filled.index(max(filled))
        del filled[done]
        yield open_rows.pop(done)


def _filled(row: list[Piece]) -> int:
    return sum(map(len, row))
