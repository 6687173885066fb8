"""`ringjax tokenize --executor ray`: the shards of one data set, made on all machines of a Ray cluster.

Inputs and output lie on storage that all nodes share, at the same path; what travels through Ray Data is where lines
lie, and what became of them. A shard is written aside, moved to its name when it is whole, and noted; so a run that was
stopped, or a node that died, costs the shards that were being made:

    .NAME.unfinished-0123456789abcdef/      the same name for the same inputs and options
        00000.array_record  …
        made/00000.json  …                  what became of shard 0: counts, checksum
        making/…                            shards that are not whole
"""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ringjax.data.bundles import Bundle, Line, Part
from ringjax.data.errors import DataError
from ringjax.data.records import Shard, file_digest
from ringjax.data.tokenize_shard import Recipe, ShardResult, start_worker, work

MADE, MAKING = "made", "making"
# Portions of a worker that are one task of Ray: enough to share out evenly, few enough to keep track of.
TASKS_EACH = 8
# Portions whose places are in memory at once.
AT_ONCE = 4096


def require_ray() -> Any:
    """The library; raises ImportError that says how to get it."""
    try:
        import ray
        import ray.data
    except ImportError:
        raise ImportError("executor ray needs Ray, which is not installed: pip install 'ringjax[ray]'") from None
    return ray


def resumable_folder(output: Path, identity: dict[str, Any]) -> Path:
    """Where the data set is made: a hidden folder beside the output, the same for the same `identity`."""
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = output.parent / f".{output.name}.unfinished-{name}"
    for part in (MADE, MAKING):
        (folder / part).mkdir(parents=True, exist_ok=True)
    return folder


def tidy(folder: Path) -> None:
    """Leave what a data set has: its shards."""
    for part in (MADE, MAKING):
        shutil.rmtree(folder / part, ignore_errors=True)


def made_before(folder: Path, count: int) -> dict[int, ShardResult]:
    """Shards of an earlier run that are whole, by number; others are made again."""
    found = {}
    for number in range(count):
        note = folder / MADE / f"{number:05d}.json"
        if not note.is_file():
            continue
        try:
            result = _result(json.loads(note.read_text("utf-8")))
        except (ValueError, TypeError, KeyError):
            continue
        shard = result.shard
        if shard is None or _is_whole(folder / shard.file, shard):
            found[number] = result
    return found


def _is_whole(path: Path, shard: Shard) -> bool:
    return path.is_file() and path.stat().st_size == shard.bytes and file_digest(path) == shard.sha256


def ray_results(
    recipe: Recipe, portions: Sequence[tuple[Bundle, ...]], workers: int | None
) -> Iterator[tuple[int, ShardResult]]:
    """Number and result of every portion, those of an earlier run first, then as they come.

    `workers` None: one a CPU of the cluster. Raises DataError for a line that cannot be used where those are not
    skipped, RuntimeError where a node's files are not seen here.
    """
    folder = Path(recipe.folder)
    done = made_before(folder, len(portions))
    yield from done.items()
    todo = [number for number in range(len(portions)) if number not in done]
    if not todo:
        return
    ray = require_ray()
    if not ray.is_initialized():
        # RAY_ADDRESS names a cluster; without it one is started on this machine.
        ray.init(include_dashboard=False, log_to_driver=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    size = min(len(todo), workers or max(1, int(ray.cluster_resources().get("CPU", 1))))
    for first in range(0, len(todo), AT_ONCE):
        some = todo[first : first + AT_ONCE]
        yield from _made(ray, recipe, {number: portions[number] for number in some}, min(size, len(some)))


def _made(
    ray, recipe: Recipe, portions: Mapping[int, tuple[Bundle, ...]], size: int
) -> Iterator[tuple[int, ShardResult]]:
    """The portions by `size` workers, as they come."""
    folder = Path(recipe.folder)
    items = [{"number": number, "portion": _portion_text(portion)} for number, portion in portions.items()]
    rows = ray.data.from_items(items, override_num_blocks=min(len(items), TASKS_EACH * size)).map(
        RayWorker, fn_constructor_args=(recipe, os.getcwd()), compute=ray.data.ActorPoolStrategy(size=size), num_cpus=1
    )
    for row in rows.iter_rows():
        if row["error"]:
            raise DataError(row["error"])
        number, result = int(row["number"]), _result(json.loads(row["result"]))
        if result.shard is not None and not (folder / result.shard.file).is_file():
            raise RuntimeError(
                f"{folder / result.shard.file} was made on {row['host']} and is not here: the output must lie on"
                " storage that all nodes share, at the same path"
            )
        yield number, result


class RayWorker:
    """One process of the cluster; holds the tokenizers. A row of Ray Data is a portion."""

    def __init__(self, recipe: Recipe, cwd: str):
        os.chdir(cwd)  # names of inputs and tokenizers may be relative, and stand so in what is told of lines
        self._folder = Path(recipe.folder)
        self._aside = Path(tempfile.mkdtemp(dir=self._folder / MAKING))
        start_worker(dataclasses.replace(recipe, folder=str(self._aside)))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        number, told = int(row["number"]), {"number": row["number"], "host": os.uname().nodename}
        try:
            result = work(number, _portion(row["portion"]))
        except DataError as error:
            return told | {"result": "", "error": str(error)}
        text = json.dumps(dataclasses.asdict(result))
        if result.shard is not None:
            os.replace(self._aside / result.shard.file, self._folder / result.shard.file)
        note = self._aside / f"{number:05d}.json"
        note.write_text(text, encoding="utf-8")
        os.replace(note, self._folder / MADE / note.name)
        return told | {"result": text, "error": ""}


def _result(fields: dict[str, Any]) -> ShardResult:
    shard = None if fields["shard"] is None else Shard(**fields["shard"])
    return ShardResult(**{**fields, "shard": shard, "skipped": tuple(fields["skipped"])})


def _portion_text(portion: Sequence[Bundle]) -> str:
    """Bundles as JSON, each line once."""
    lines = {part.line: None for bundle in portion for part in bundle.parts}
    places = {line: place for place, line in enumerate(lines)}
    bundles = [[bundle.needle, [[places[part.line], part.variant] for part in bundle.parts]] for bundle in portion]
    return json.dumps([[dataclasses.astuple(line) for line in lines], bundles])


def _portion(text: str) -> tuple[Bundle, ...]:
    lines, bundles = json.loads(text)
    lines = [Line(*line) for line in lines]
    return tuple(
        Bundle(tuple(Part(lines[place], variant) for place, variant in parts), needle) for needle, parts in bundles
    )
