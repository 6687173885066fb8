"""Lanes: the stream of rows behind each line of the global batch.

Line b of every batch comes from lane b, and lane b of B takes examples b, b + B, b + 2B, … of every source's stream
(its order shuffled anew each epoch). A lane depends on nothing but its number, so the global batch is the same for
any number of hosts, and a lane's state is small: how far it is in each source, and which pieces lie in its
half-filled rows.
"""

from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from ringjax.data.errors import DataError, SkippedLines
from ringjax.data.example import Example
from ringjax.data.packing import Piece, first_fit
from ringjax.data.sources import Source

# Examples of several rows that a stream has at hand besides those that its lanes are in.
_LONG_KEPT = 16


class Stream:
    """The examples of one source, epoch after epoch, as pieces."""

    def __init__(
        self,
        number: int,
        source: Source,
        *,
        seed: int | None,
        epochs: int | None,
        skip_errors: bool,
        skipped: SkippedLines,
        prepare: Callable[[Example, int, bool], list[Piece]],
        is_dropped: Callable[[int], bool],
    ):
        """`is_dropped`: whether an example of the stream loses its condition; `prepare` is told that, and its row."""
        self._number, self._source, self._seed = number, source, seed
        self._skip_errors, self._skipped, self._prepare, self._is_dropped = skip_errors, skipped, prepare, is_dropped
        self._long: dict[tuple[int, bool], list[Piece]] = {}
        self.examples = len(source)
        order = grain.MapDataset.range(len(source))
        if seed is not None:
            order = order.seed(seed + number).shuffle()
        self._order = order.repeat(epochs, reseed_each_epoch=True)
        self._length = len(self._order)

    def __len__(self) -> int:
        return self._length

    def pieces(self, index: int) -> list[Piece]:
        """The pieces of example `index` of the stream, as they lie in it; none where the line is skipped."""
        row, dropped = int(self._order[index]), self._is_dropped(index)
        if (row, dropped) in self._long:
            return self._long[row, dropped]
        try:
            pieces = self._prepare(self._source.read(row), row, dropped)
        except DataError as error:
            if not self._skip_errors:
                raise
            self._skipped.add("unusable", (self._number, row), str(error))
            return []
        if len(pieces) > 1:
            self._keep((row, dropped), pieces)
        return pieces

    def _keep(self, key: tuple[int, bool], pieces: list[Piece]) -> None:
        """Books are slow to tokenize, and several lanes may read one, each in its own order."""
        self._long[key] = pieces
        if len(self._long) > _LONG_KEPT:
            del self._long[next(iter(self._long))]

    def reading_order(self, index: int, pieces: int) -> Sequence[int]:
        """In which order the pieces are read: shuffled, so that lanes that read one book are not at one place."""
        if self._seed is None or pieces == 1:
            return range(pieces)
        return np.random.default_rng((self._seed, self._number, index)).permutation(pieces)


class Lane:
    """Rows for one line of the batch, from a mixture of streams; exact to resume between any two rows."""

    def __init__(
        self,
        number: int,
        count: int,
        streams: Sequence[Stream],
        weights: Sequence[float] | None,
        seq_len: int,
        open_rows: int,
    ):
        self._number, self._count, self._streams = number, count, streams
        self._weights = weights
        self._seq_len, self._most_open = seq_len, open_rows
        self._next_example = [0] * len(streams)  # of this lane, in each stream
        self._next_piece = [0] * len(streams)  # of that example, in reading order
        self._tokens = [0] * len(streams)
        self._reading: list[list[Piece] | None] = [None] * len(streams)  # the pieces of that example, so ordered
        self._open: list[list[Piece]] = []
        self._fault: Exception | None = None
        self._rows = self._make_rows()

    def next_row(self) -> list[Piece] | None:
        """The pieces of the next row; None when every stream has ended. An error comes again at every later call."""
        if self._fault is not None:
            raise self._fault
        try:
            return next(self._rows, None)
        except Exception as error:
            self._fault = error  # the generator has ended with it, which must not pass for the end of the data
            raise

    def get_state(self) -> dict:
        """Counts and origins only, all JSON."""
        return {
            "next_example": list(self._next_example),
            "next_piece": list(self._next_piece),
            "tokens": list(self._tokens),
            "open": [[number for piece in row for number in piece.origin] for row in self._open],
        }

    def set_state(self, state: dict) -> None:
        """Go on from `get_state`: the pieces of the half-filled rows are read again."""
        self._next_example = list(state["next_example"])
        self._next_piece = list(state["next_piece"])
        self._tokens = list(state["tokens"])
        self._reading = [None] * len(self._streams)
        self._fault = None
        examples: dict[tuple[int, int], list[Piece]] = {}
        self._open = [
            [self._find(tuple(row[i : i + 3]), examples) for i in range(0, len(row), 3)] for row in state["open"]
        ]
        self._rows = self._make_rows()

    def _find(self, origin: tuple[int, int, int], examples: dict) -> Piece:
        stream, index, piece = origin
        if (stream, index) not in examples:
            examples[stream, index] = self._located(stream, index)
        return examples[stream, index][piece]

    def _make_rows(self) -> Iterator[list[Piece]]:
        return first_fit(self._pieces(), self._seq_len, self._open, self._most_open)

    def _pieces(self) -> Iterator[Piece]:
        """Pieces of the stream that is furthest behind its share, one by one.

        A piece is given after the counts include it, so between any two pieces the counts say where to go on.
        """
        while True:
            waiting = [s for s, reading in enumerate(self._reading) if reading or self._current(s)]
            if not waiting:
                return
            s = min(waiting, key=self._share_used)
            pieces = self._reading[s]
            piece = pieces[self._next_piece[s]]
            self._tokens[s] += len(piece)
            self._next_piece[s] += 1
            if self._next_piece[s] == len(pieces):
                self._next_piece[s], self._next_example[s], self._reading[s] = 0, self._next_example[s] + 1, None
            yield piece

    def _share_used(self, s: int) -> float:
        """Tokens taken of stream s for its weight; without weights, examples taken for its number of examples."""
        if self._weights is not None:
            return self._tokens[s] / self._weights[s]
        return (self._next_example[s] + self._next_piece[s] / len(self._reading[s])) / self._streams[s].examples

    def _current(self, s: int) -> bool:
        """Have an example of stream s at hand; false at its end."""
        stream, unusable = self._streams[s], 0
        while self._reading[s] is None:
            index = self._number + self._count * self._next_example[s]
            if index >= len(stream):
                return False
            pieces = self._located(s, index)
            if pieces:
                self._reading[s] = [pieces[number] for number in stream.reading_order(index, len(pieces))]
                break
            self._next_example[s] += 1
            unusable += 1
            if unusable > stream.examples:
                raise DataError(f"none of the {stream.examples} examples of source {s} can be used")
        return True

    def _located(self, s: int, index: int) -> list[Piece]:
        return [
            Piece(piece.example, piece.start, piece.stop, piece.weight, (s, index, number))
            for number, piece in enumerate(self._streams[s].pieces(index))
        ]
