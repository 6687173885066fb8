"""Reading what a compiled program does: its collectives, how often they run, and the shapes it holds."""

import collections
import re

HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
TRIPS = re.compile(r'known_trip_count\\?":\s*\{\\?"n\\?":\\?"(\d+)')


def computations(text: str) -> dict[str, list[str]]:
    """The instructions of each computation of an HLO module, by name; the entry is called ''."""
    found, name = collections.defaultdict(list), None
    for line in text.splitlines():
        header = HEADER.match(line)
        if header:
            name = "" if line.startswith("ENTRY") else header[1]
        elif line == "}":
            name = None
        elif name is not None:
            found[name].append(line)
    return found


def executed(text: str, operation: str) -> list[str]:
    """The result types of every `operation` that one run executes: once for each trip of the loops around it."""
    parts = computations(text)

    def walk(name: str) -> list[str]:
        types = []
        for line in parts.get(name, []):
            if match := re.search(rf"= (.*?) {operation}(?:-start)?\(", line):
                types.append(match[1])
            for body in re.findall(r"body=%?([\w.\-]+)", line):
                inside = walk(body)
                if inside:
                    types += inside * int(TRIPS.search(line)[1])
            for called in re.findall(r"(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)", line):
                types += walk(called)
            for branches in re.findall(r"branch_computations=\{([^}]*)\}", line):
                types += [t for branch in branches.split(",") for t in walk(branch.strip().lstrip("%"))]
        return types

    return walk("")


def dimensions(text: str) -> set[int]:
    """Every dimension of every array of the program."""
    return {int(d) for dims in re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", text) for d in dims.split(",")}


def permuted_pairs(text: str) -> list[set[tuple[int, int]]]:
    """Who sends to whom, of each collective-permute of the text (a loop's stands once)."""
    found = re.findall(r"= [^=]*? collective-permute(?:-start)?\(.*?source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}", text)
    return [{tuple(map(int, pair.split(","))) for pair in re.findall(r"(\d+,\d+)", pairs)} for pairs in found]
