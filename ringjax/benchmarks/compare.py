"""Variants of a config side by side: what packing saves over padding, or a striped ring over a contiguous one.

--bench.compare "data.packing=masked,pad mesh.layout=striped,contiguous"      four rows, each with each
"""

import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ringjax.benchmarks.train import TrainResult

Overrides = tuple[tuple[str, str], ...]
COLUMNS = (
    "variant", "ms a step (min–max)", "slots in use", "tokens/s", "of the first", "MFU", "memory, temporary",
)  # fmt: skip


def combinations(compare: str | None) -> list[Overrides]:
    """The overrides of each variant, in order; one without any where nothing is compared.

    Raises ValueError for a text that says no `section.key=value,value`.
    """
    choices: list[list[tuple[str, str]]] = []
    for word in (compare or "").split():
        key, equals, values = word.partition("=")
        found = values.split(",")
        if not equals or not re.fullmatch(r"\w+(\.\w+)+", key) or "" in found or len(set(found)) < 2:
            raise ValueError(f"compare {word!r} must be section.key=value,value with two values or more")
        choices.append([(key, value) for value in found])
    if len({axis[0][0] for axis in choices}) < len(choices):
        raise ValueError(f"compare {compare!r} names a key twice; give all its values at once")
    return list(itertools.product(*choices))


def label(overrides: Overrides) -> str:
    """What a variant is called: its values."""
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in overrides)


def rows(results: Sequence[tuple[str, "TrainResult"]]) -> list[list[str]]:
    """The columns of each variant; tokens are those that are no padding."""
    first = results[0][1].tokens_per_second
    found = []
    for name, result in results:
        ms = [1e3 * seconds for seconds in (result.median, min(result.seconds), max(result.seconds))]
        temporary = result.memory.get("temporary", 0)
        found.append(
            [
                name, f"{ms[0]:.1f} ({ms[1]:.1f}–{ms[2]:.1f})", f"{100 * result.used:.1f} %",
                f"{result.tokens_per_second:,.0f}", f"{100 * result.tokens_per_second / first:.0f} %",
                "–" if result.mfu is None else f"{100 * result.mfu:.1f} %", f"{temporary / 2**30:.2f} GiB",
            ]
        )  # fmt: skip
    return found
