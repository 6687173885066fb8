"""`ringjax tokenize`: text, pictures and clips to a data set of records, with several worker processes.

The lines of all inputs, in order, are cut into shards of `examples_per_shard`; a shard is the work of one process at
a time, so the data set has the same bytes for any number of workers. It is written into a hidden folder beside the
output, which gets its name when all is done: an interrupted run leaves nothing that looks like a data set.
"""

import contextlib
import dataclasses
import json
import logging
import multiprocessing
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Literal

from ringjax.data.errors import DataError
from ringjax.data.fields import parse
from ringjax.data.jsonl import JsonLines
from ringjax.data.records import FORMAT, META, file_digest
from ringjax.data.tokenize_shard import Line, PictureEncoder, Recipe, ShardResult, ShardWriter, start_worker, work
from ringjax.data.tokenizers import load_tokenizer

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TokenizeConfig:
    """Tokenize text, pictures and clips into a data set that training reads."""

    inputs: tuple[str, ...]
    """.jsonl files (the example language of docs/data.md) and .txt files (a document each), in order."""
    output: str
    """The folder to make."""
    fields: str | tuple[str, ...] | None = None
    """The example language for lines without `fields` of their own; a list: one is chosen a line."""
    tokenizer: str = "sample"
    """`sample`, `bytes`, a tokenizer.json (or its folder), a SentencePiece .model, or a .gguf file."""
    vision_tokenizer: str | None = None
    """A VQGAN .safetensors, or `sample` for the digits': turns the picture a line names into its field `vision`."""
    picture_key: str = "file"
    """The field that names a picture or clip, relative to the .jsonl's folder."""
    fit: Literal["crop", "pad", "centre"] = "crop"
    """How a picture becomes square: its middle, padded, or left at its size."""
    background: str = "white"
    """What lies behind transparent and padded places."""
    codes_per_frame: int = 256
    """Codes of a frame in lines that hold codes; with a vision_tokenizer, its own number is used."""
    vision_codes: int = 8192
    """Codes of the codebook: the id of the end of a frame, as the model will have it."""
    max_frames: int | None = None
    """Clips with more frames keep this many, evenly spread; null: all."""
    separator: str = " "
    """What `+` puts between two fields."""
    add_bos: bool = True
    """Begin every example with the tokenizer's begin token."""
    add_eos: bool = True
    """End every example with the tokenizer's end token."""
    examples_per_shard: int = 512
    """Lines in a file of the data set, and in a worker's portion."""
    workers: int | None = None
    """Processes; null: one a core, or 0 for pictures where there is an accelerator; 0: this process, which encodes
    pictures on its default device."""
    on_error: Literal["stop", "skip"] = "stop"
    """A line that cannot be used ends the run, or is left out and counted."""
    overwrite: bool = False
    """Replace a data set of that name."""
    progress: bool = True
    """Show a progress bar on a terminal."""

    def __post_init__(self):
        if not self.inputs:
            raise ValueError("inputs is empty; name at least one .jsonl or .txt file")
        if not self.output:
            raise ValueError("output is empty; name the folder to make")
        for name in ("codes_per_frame", "vision_codes", "examples_per_shard", "max_frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers {self.workers} must be at least 0; 0 works in this process")
        for spec in (self.fields,) if isinstance(self.fields, str) else self.fields or ():
            parse(spec)


@dataclasses.dataclass(frozen=True)
class TokenizeReport:
    """What a run made."""

    folder: Path
    examples: int
    tokens: int
    vision_tokens: int
    skipped: tuple[str, ...]
    """Of every line left out, its place and fault."""

    def __str__(self) -> str:
        text = f"{self.folder}: {self.examples} examples, {self.tokens} tokens ({self.vision_tokens} of vision)"
        if self.skipped:
            text += f"; {len(self.skipped)} lines skipped, the first: {self.skipped[0]}"
        return text


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
    output.parent.mkdir(parents=True, exist_ok=True)
    _mention_leftovers(output)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{output.name}.unfinished-", dir=output.parent))
    try:
        recipe, made_with = _recipe(config, unfinished)
        portions = [
            tuple(lines[i : i + config.examples_per_shard]) for i in range(0, len(lines), config.examples_per_shard)
        ]
        results = []
        with _progress_bar(config.progress, len(lines)) as advance:
            for portion, result in zip(portions, _results(recipe, portions, _workers(config)), strict=True):
                results.append(result)
                advance(len(portion))
        _write_meta(unfinished, results, made_with | {"inputs": inputs})
        _put_in_place(unfinished, output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return _report(output, results)


def _lines(config: TokenizeConfig) -> tuple[list[Line], list[dict]]:
    lines, inputs = [], []
    for name in config.inputs:
        path = Path(name)
        if path.suffix == ".txt":
            if not path.is_file():
                raise FileNotFoundError(f"input {name} does not exist")
            lines.append(Line(name, 0, path.stat().st_size, None))
            inputs.append({"name": path.name, "sha256": file_digest(path)})
        elif path.suffix in (".jsonl", ".ndjson", ".json"):
            rows = JsonLines(path)
            lines += [Line(name, *rows.span(row), int(rows.line_index[row])) for row in range(len(rows))]
            inputs.append({"name": path.name, "sha256": rows.fingerprint})
        else:
            raise ValueError(f"input {name} is of no known kind; give .jsonl or .txt files")
    return lines, inputs


def _recipe(config: TokenizeConfig, folder: Path) -> tuple[Recipe, dict]:
    """What the workers need, and what the data set says of its making. Faulty tokenizers are found here."""
    codes_per_frame, vision_codes, vision_fingerprint = config.codes_per_frame, config.vision_codes, None
    if config.vision_tokenizer is not None:
        encoder = PictureEncoder(config.vision_tokenizer)
        codes_per_frame, vision_fingerprint = encoder.config.codes_per_picture, encoder.fingerprint
        if encoder.config.codes > vision_codes:
            raise ValueError(
                f"vision_tokenizer {config.vision_tokenizer} has {encoder.config.codes} codes, more than vision_codes "
                f"{vision_codes}; set vision_codes to at least that"
            )
    shared = {name: getattr(config, name) for name in ("separator", "add_bos", "add_eos", "max_frames", "fit")}
    recipe = Recipe(
        folder=str(folder),
        fields=config.fields,
        tokenizer=config.tokenizer,
        vision_tokenizer=config.vision_tokenizer,
        codes_per_frame=codes_per_frame,
        vision_codes=vision_codes,
        picture_key=config.picture_key,
        background=config.background,
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
        "background": config.background,
    }


def _workers(config: TokenizeConfig) -> int:
    if config.workers is not None:
        return config.workers
    if config.vision_tokenizer is not None:
        import jax

        if jax.default_backend() != "cpu":
            return 0
    return os.cpu_count() or 1


def _results(recipe: Recipe, portions: list[tuple[Line, ...]], workers: int) -> Iterator[ShardResult]:
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


def _in_order(pool: ProcessPoolExecutor, portions: Iterable[tuple[Line, ...]], ahead: int) -> Iterator[ShardResult]:
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
    skipped = [fault for result in results for fault in result.skipped]
    if not shards:
        raise DataError(f"no line can be used; the first: {skipped[0]}")
    meta = made_with | {
        "has_vision": any(result.vision_tokens for result in results),
        "examples": sum(shard.examples for shard in shards),
        "tokens": sum(result.tokens for result in results),
        "vision_tokens": sum(result.vision_tokens for result in results),
        "longest": max(result.longest for result in results),
        "skipped": len(skipped),
        "shards": [dataclasses.asdict(shard) for shard in shards],
    }
    (folder / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _mention_leftovers(output: Path) -> None:
    left = sorted(output.parent.glob(f".{output.name}.unfinished-*"))
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
        skipped=tuple(fault for result in results for fault in result.skipped),
    )
