"""`ringjax tokenize`: text, pictures and clips to a data set of records, with several worker processes.

The lines of all inputs, in order (or joined, see bundles.py), are cut into shards of `examples_per_shard`; a shard is
the work of one process at a time, so the data set has the same bytes for any number of workers. It is written into a
hidden folder beside the output, which gets its name when all is done: an interrupted run leaves nothing that looks
like a data set.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import multiprocessing
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from ringjax.data.bundles import Bundle, Line, Lines, Portions, plan
from ringjax.data.errors import DataError
from ringjax.data.heldout import heldout
from ringjax.data.jsonl import JsonLines
from ringjax.data.records import FORMAT, META, file_digest
from ringjax.data.tokenize_config import CODES, TokenizeConfig, TokenizeReport
from ringjax.data.tokenize_shard import PictureEncoder, Recipe, ShardResult, ShardWriter, start_worker, work
from ringjax.data.tokenizers import load_tokenizer

_log = logging.getLogger(__name__)
SKIPPED = "skipped.txt"
# What changes no byte of a data set.
_IMMATERIAL = ("inputs", "output", "workers", "executor", "overwrite", "progress")


def run_tokenize(config: TokenizeConfig) -> TokenizeReport:
    """Make the data set.

    Raises:
        FileNotFoundError: an input or a tokenizer is missing.
        FileExistsError: the output exists and `overwrite` is off.
        ValueError: an input is empty or of no known kind, a line cannot be used (`on_error: stop`), or none can.
        RuntimeError: a worker process died.
    """
    output = Path(config.output)
    if _occupied(output) and not config.overwrite:
        raise FileExistsError(f"{output} exists; give another output, or set overwrite")
    if _occupied(output) and not (output / META).is_file():
        raise FileExistsError(f"{output} is no data set, so it is not overwritten; give another output")
    lines, inputs = _lines(config)
    bundles = plan(
        lines, variants=config.variants, least=config.join_least or config.join, most=config.join,
        join_as=config.join_as, seed=config.seed,
    )  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    portions = Portions(bundles, config.examples_per_shard)
    recipe, made_with = _recipe(config)
    made_with |= {"inputs": inputs}
    make = _make_on_ray if config.executor == "ray" else _make_here
    with _progress_bar(config.progress, len(bundles)) as advance:
        results = make(config, output, recipe, portions, made_with, advance)
    return _report(output, results)


def _make_here(config: TokenizeConfig, output: Path, recipe: Recipe, portions, made_with: dict, advance) -> list:
    _mention_leftovers(output)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{output.name}.unfinished-", dir=output.parent))
    recipe = dataclasses.replace(recipe, folder=str(unfinished))
    results = []
    try:
        for portion, result in zip(portions, _results(recipe, portions, _workers(config)), strict=True):
            results.append(result)
            advance(len(portion))
        _write_meta(unfinished, results, made_with)
        _put_in_place(unfinished, output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return results


def _make_on_ray(config: TokenizeConfig, output: Path, recipe: Recipe, portions, made_with: dict, advance) -> list:
    """The same on a Ray cluster; what was made stays when a run is stopped, and the same command goes on from it."""
    from ringjax.data.tokenize_ray import ray_results, require_ray, resumable_folder, tidy

    require_ray()
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in _IMMATERIAL}
    unfinished = resumable_folder(output.absolute(), settings | made_with)
    _mention_leftovers(output, but=unfinished.name)
    recipe = dataclasses.replace(recipe, folder=str(unfinished))
    found: dict[int, ShardResult] = {}
    for number, result in ray_results(recipe, portions, config.workers):
        found[number] = result
        advance(len(portions[number]))
    results = [found[number] for number in range(len(portions))]
    tidy(unfinished)
    _write_meta(unfinished, results, made_with)
    _put_in_place(unfinished, output)
    return results


def _lines(config: TokenizeConfig) -> tuple[Lines, list[dict]]:
    files, inputs = [], []
    for name in config.inputs:
        path = Path(name)
        if path.suffix == ".txt":
            if config.split != "all":
                raise ValueError(f"split {config.split} is by captions, and {name} has none; tokenize it by itself")
            if not path.is_file():
                raise FileNotFoundError(f"input {name} does not exist")
            files.append((1, functools.partial(_text, name, path.stat().st_size)))
            inputs.append({"name": path.name, "sha256": file_digest(path)})
        elif path.suffix in (".jsonl", ".ndjson", ".json"):
            rows = JsonLines(path)
            wanted = range(len(rows))
            if config.split != "all":
                wanted = np.array([row for row in wanted if _is_in_split(rows, row, config)], np.int64)
            files.append((len(wanted), functools.partial(_line, name, rows, wanted)))
            inputs.append({"name": path.name, "sha256": rows.fingerprint})
        else:
            raise ValueError(f"input {name} is of no known kind; give .jsonl or .txt files")
    lines = Lines(files)
    if not lines:
        raise ValueError(
            f"split {config.split} has no line at heldout_share {config.heldout_share}; change one of them"
        )
    return lines, inputs


def _text(name: str, size: int, place: int) -> Line:
    return Line(name, 0, size, None)


def _line(name: str, rows: JsonLines, wanted: Sequence[int], place: int) -> Line:
    row = int(wanted[place])
    return Line(name, *rows.span(row), int(rows.line_index[row]))


def _is_in_split(rows: JsonLines, row: int, config: TokenizeConfig) -> bool:
    """A line that cannot be read is in every split: what is wrong with it is told when its turn comes."""
    try:
        caption = rows[row].get(config.caption_key)
    except DataError:
        return True
    return not isinstance(caption, str) or heldout(caption, config.heldout_share) == (config.split == "heldout")


def _recipe(config: TokenizeConfig) -> tuple[Recipe, dict]:
    """What the workers need, and what the data set says of its making. Faulty tokenizers are found here."""
    codes_per_frame, vision_codes, vision_fingerprint = config.codes_per_frame, config.vision_codes or CODES, None
    if config.vision_tokenizer is not None:
        encoder = PictureEncoder(config.vision_tokenizer)
        codes_per_frame, vision_fingerprint = encoder.config.codes_per_picture, encoder.fingerprint
        vision_codes = config.vision_codes or encoder.config.codes
        if encoder.config.codes > vision_codes:
            raise ValueError(
                f"vision_tokenizer {config.vision_tokenizer} has {encoder.config.codes} codes, more than vision_codes "
                f"{vision_codes}; set vision_codes to at least that"
            )
    names = "separator", "add_bos", "add_eos", "max_frames", "fit", "mirror", "join_as", "caption_words"
    shared = {name: getattr(config, name) for name in names}
    recipe = Recipe(
        folder="",  # the caller knows
        fields=config.fields,
        tokenizer=config.tokenizer,
        vision_tokenizer=config.vision_tokenizer,
        codes_per_frame=codes_per_frame,
        vision_codes=vision_codes,
        picture_key=config.picture_key,
        caption_key=config.caption_key,
        background=config.background,
        truncate=config.long_captions == "truncate",
        skip_errors=config.on_error == "skip",
        **shared,
    )
    return recipe, shared | {
        "format": FORMAT,
        "fields": config.fields,
        "tokenizer": config.tokenizer,
        "tokenizer_fingerprint": load_tokenizer(config.tokenizer).fingerprint,
        "vision_tokenizer": config.vision_tokenizer,
        "vision_tokenizer_fingerprint": vision_fingerprint,
        "codes_per_frame": codes_per_frame,
        "vision_codes": vision_codes,
        **{name: getattr(config, name) for name in ("background", "split", "heldout_share", "variants", "join")},
        "join_least": config.join_least or config.join,
    }


def _workers(config: TokenizeConfig) -> int:
    if config.workers is not None:
        return config.workers
    if config.vision_tokenizer is not None:
        import jax

        if jax.default_backend() != "cpu":
            return 0
    return os.cpu_count() or 1


def _results(recipe: Recipe, portions: Sequence[tuple[Bundle, ...]], workers: int) -> Iterator[ShardResult]:
    """The result of every portion, in order."""
    workers = min(workers, len(portions))
    if workers == 0:
        writer = ShardWriter(recipe, threads=os.cpu_count() or 1)
        yield from (writer.write(number, portion) for number, portion in enumerate(portions))
        return
    # Forking a process that has JAX threads can hang it.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker, initargs=(recipe,))
    try:
        yield from _in_order(pool, portions, ahead=2 * workers)
    except BrokenProcessPool:
        raise RuntimeError("a worker process died, perhaps for lack of memory; use fewer workers") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, portions: Iterable[tuple[Bundle, ...]], ahead: int) -> Iterator[ShardResult]:
    waiting = deque()
    for number, portion in enumerate(portions):
        waiting.append(pool.submit(work, number, portion))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@contextlib.contextmanager
def _progress_bar(show: bool, total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = TextColumn("tokenizing"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not (show and console.is_terminal)) as progress:
        task = progress.add_task("tokenizing", total=total)
        yield lambda count: progress.advance(task, count)


def _write_meta(folder: Path, results: list[ShardResult], made_with: dict) -> None:
    shards = [result.shard for result in results if result.shard is not None]
    skipped = _skipped(results)
    if not shards:
        raise DataError(f"no line can be used; the first: {skipped[0]}")
    meta = made_with | {
        "has_vision": any(result.vision_tokens for result in results),
        "examples": sum(shard.examples for shard in shards),
        "tokens": sum(result.tokens for result in results),
        "vision_tokens": sum(result.vision_tokens for result in results),
        "longest": max(result.longest for result in results),
        "skipped": len(skipped),
        "truncated": sum(result.truncated for result in results),
        "shards": [dataclasses.asdict(shard) for shard in shards],
    }
    if skipped:
        (folder / SKIPPED).write_text("".join(f"{fault}\n" for fault in skipped), encoding="utf-8")
    (folder / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _mention_leftovers(output: Path, but: str = "") -> None:
    left = [path for path in sorted(output.parent.glob(f".{output.name}.unfinished-*")) if path.name != but]
    if left:
        _log.warning(
            "%s is left from a run that was killed, or belongs to one still going; delete it in the first case", left[0]
        )


def _occupied(output: Path) -> bool:
    return output.exists() and not (output.is_dir() and not any(output.iterdir()))


def _put_in_place(unfinished: Path, output: Path) -> None:
    unfinished.chmod(0o755)  # mkdtemp makes it private
    old = None
    if _occupied(output):
        old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old-", dir=output.parent))
        os.replace(output, old)
    os.replace(unfinished, output)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _report(output: Path, results: list[ShardResult]) -> TokenizeReport:
    return TokenizeReport(
        folder=output,
        examples=sum(result.shard.examples for result in results if result.shard),
        tokens=sum(result.tokens for result in results),
        vision_tokens=sum(result.vision_tokens for result in results),
        skipped=_skipped(results),
        truncated=sum(result.truncated for result in results),
    )


def _skipped(results: list[ShardResult]) -> tuple[str, ...]:
    """What was wrong with the lines left out, once each however many examples they were to be in."""
    return tuple(dict.fromkeys(fault for result in results for fault in result.skipped))
