"""An order of a TPU slice's chips in which each is next to the one before it, and the last to the first.

A mesh axis that covers several axes of a slice is filled row by row, and where a row ends the next chip is not a
neighbour. The rotations of a ring then cross several links, and XLA for v5e starts none of them ahead: on 16 × 16 chips
no rotation is hidden (docs/results/planning.md). Here 4 × 4 chips, of which a column is kept for the way back:

    row by row   0  1  2  3        neighbours   0  1  2  3
                 4  5  6  7                    15  6  5  4
                 8  9 10 11                    14  7  8  9
                12 13 14 15                    13 12 11 10
"""

import itertools

import numpy as np
from jaxtyping import Int


def ring_order(coords: Int[np.ndarray, "R dims"]) -> Int[np.ndarray, " R"] | None:
    """The places of the chips at `coords` in such an order; None where they have it, or no such order is known.

    Known are boxes of at least two axes longer than 1, one of them even.
    """
    coords = np.asarray(coords)
    values = [sorted(set(column)) for column in coords.T.tolist()]
    if len(coords) != np.prod([len(v) for v in values]) or _is_cycle(coords):
        return None
    box = cycle(tuple(len(v) for v in values))
    if box is None:
        return None
    place = {tuple(coord): index for index, coord in enumerate(coords.tolist())}
    return np.array([place[tuple(v[i] for v, i in zip(values, at))] for at in box])


def cycle(sizes: tuple[int, ...]) -> list[tuple[int, ...]] | None:
    """A closed walk through every cell of a box, each step to a neighbour; None where there is no room for one.

    All axes but one are walked as a snake, which makes of the box a rectangle of `rows` by `columns`, rows even: down
    and up its rows without the first column, and back through that.
    """
    long = [axis for axis, size in enumerate(sizes) if size > 1]
    for last in long[::-1]:
        others = [axis for axis in long if axis != last]
        path = _snake([sizes[axis] for axis in others])
        if len(path) > 1 and len(path) % 2 == 0:
            break
    else:
        return None
    columns = range(1, sizes[last])
    walk = [(row, column) for row in range(len(path)) for column in (columns if row % 2 == 0 else columns[::-1])]
    walk += [(row, 0) for row in range(len(path))[::-1]]
    return [_cell(len(sizes), others, path[row], last, column) for row, column in walk]


def _snake(sizes: list[int]) -> list[tuple[int, ...]]:
    """A walk through every cell of a box, each step to a neighbour."""
    if not sizes:
        return [()]
    inner = _snake(sizes[1:])
    return [(row, *cell) for row in range(sizes[0]) for cell in (inner if row % 2 == 0 else inner[::-1])]


def _cell(dims: int, others: list[int], where: tuple[int, ...], last: int, column: int) -> tuple[int, ...]:
    cell = [0] * dims
    for axis, index in itertools.chain(zip(others, where), [(last, column)]):
        cell[axis] = index
    return tuple(cell)


def _is_cycle(coords: np.ndarray) -> bool:
    return bool((np.abs(coords - np.roll(coords, 1, axis=0)).sum(axis=1) <= 1).all())
