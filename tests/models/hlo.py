"""Reading compiled programs."""

import math
import re
from collections import defaultdict

_KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


def collectives(text: str) -> dict[str, list[int]]:
    """The number of elements of the largest result of every collective in a compiled program, by kind."""
    found = defaultdict(list)
    for shapes, kind in re.findall(rf"= (\(?[^=]*?) ({_KINDS})(?:-start)?\(", text):
        sizes = [math.prod(int(n) for n in dims.split(",") if n) for dims in re.findall(r"\w+\[([\d,]*)\]", shapes)]
        found[kind].append(max(sizes))
    return dict(found)
