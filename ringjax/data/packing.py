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
    edges = [0]
    spans = frame_spans(example, vision_codes) if example.pairs > seq_len else None
    while example.pairs - edges[-1] > seq_len:
        edges.append(_before_frame(spans, edges[-1], edges[-1] + seq_len))
    edges.append(example.pairs)
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
    batch = empty_batch(batch_size, seq_len)
    for row, pieces in enumerate(rows):
        if row >= batch_size:
            raise ValueError(f"more than batch_size {batch_size} rows")
        at = 0
        for piece in pieces:
            if at + len(piece) > seq_len:
                raise ValueError(f"row {row} holds more than seq_len {seq_len} tokens; cut the examples first")
            _write(batch, row, at, piece, window)
            at += len(piece)
    return batch


def _write(batch: Batch, row: int, at: int, piece: Piece, window: int | None) -> None:
    example, here = piece.example, np.s_[row, at : at + len(piece)]
    source, target = np.s_[piece.start : piece.stop], np.s_[piece.start + 1 : piece.stop + 1]
    position = np.arange(len(piece), dtype=np.int32)
    furthest = np.iinfo(np.int32).max if window is None else window - 1
    batch["tokens"][here] = example.tokens[source]
    batch["modality"][here] = example.modality[source]
    batch["targets"][here] = example.tokens[target]
    batch["target_modality"][here] = example.modality[target]
    batch["loss_weights"][here] = example.loss[target] * np.float32(piece.weight)
    batch["positions"][here] = position
    batch["behind"][here] = np.minimum(position, furthest)
    if example.ahead is not None:
        # A token must not see beyond its piece: what follows in the row is another example.
        batch["ahead"][here] = np.minimum(example.ahead[source], np.minimum(len(piece) - 1 - position, furthest))


def first_fit(
    pieces: Iterator[Piece], seq_len: int, open_rows: list[list[Piece]], most_open: int
) -> Iterator[list[Piece]]:
    """Rows of pieces: each piece goes to the fullest open row that it fits, and a row is given when it must go.

    `open_rows` is the half-filled pack: it is changed in place, and what is left in it when `pieces` ends is given
    fullest first. Between two rows it is the whole state.
    """
    for piece in pieces:
        fitting = [row for row in open_rows if _filled(row) + len(piece) <= seq_len]
        if fitting:
            row = max(fitting, key=_filled)
        else:
            row = []
            open_rows.append(row)
        row.append(piece)
        done = row if _filled(row) == seq_len else max(open_rows, key=_filled) if len(open_rows) > most_open else None
        if done is not None:
            # By identity: two rows may hold equal pieces.
            open_rows[:] = [other for other in open_rows if other is not done]
            yield done
    while open_rows:
        done = max(open_rows, key=_filled)
        open_rows[:] = [other for other in open_rows if other is not done]
        yield done


def _filled(row: list[Piece]) -> int:
    return sum(map(len, row))
