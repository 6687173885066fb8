"""Arrays on disk by orbax (OCDBT, readable on any mesh), under their dotted names; no checkpoint is known here."""

import functools
import inspect
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says which one, why and what is left."""


@functools.cache
def orbax():
    """Orbax's API, quiet about what it gives up after a failure."""
    # Its errors reach us as exceptions, which we report in one line; its own logging prints each of them many times.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    import orbax.checkpoint.experimental.v1 as ocp

    sys.unraisablehook = functools.partial(_without_given_up, sys.unraisablehook)
    logging.getLogger("asyncio").addFilter(_is_not_of_a_failed_load)
    return ocp


def _is_not_of_a_failed_load(record: logging.LogRecord) -> bool:
    """Of all reads that were under way when one failed, the first is reported as the error; asyncio logs the others."""
    text = record.getMessage()
    return "exception was never retrieved" not in text or not ("orbax" in text or "OCDBT" in text)


def _without_given_up(report: Callable[[Any], None], raised: Any) -> None:
    """`report`s an unraisable exception (`sys.unraisablehook`), but not of what orbax gave up after a failure.

    Where a save fails, tensorstore tells the rest of its futures to a loop that is gone, and prints each. Where a load
    fails, orbax's coroutines that were under way, or not begun, are collected some time later, and each says so.
    """
    given_up = inspect.iscoroutine(raised.object) and "orbax" in Path(raised.object.cr_code.co_filename).parts
    if not given_up and str(raised.exc_value) != "Event loop is closed":
        report(raised)


def start_saving(path: Path, named: dict[str, Any]):
    """Orbax's own limits are by the wall clock, which may jump in the meantime: a save that hangs is found by ours.

    Making folders in another thread is waited for with a limit that cannot be set, so it is not asked for.
    """
    ocp = orbax()
    options = ocp.options.AsyncOptions(timeout_secs=14 * 86400, create_directories_asynchronously=False)
    with ocp.Context(async_options=options):
        return ocp.save_checkpointables_async(path, named)


def flatten_named(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their dotted paths: a flat dict survives changes of container classes."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def unflatten_like(tree: Any, named: dict[str, Any]) -> Any:
    """The inverse of `flatten_named`, with the structure of `tree`."""
    return jax.tree.unflatten(jax.tree.structure(tree), [named[name] for name in flatten_named(tree)])


def describe_arrays(tree: Any) -> dict[str, str]:
    """Name -> "float32[2,256]" of every array, to compare two models."""
    return {
        name: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for name, leaf in flatten_named(tree).items()
    }  # fmt: skip


def check_same_arrays(saved: dict[str, str], wanted: dict[str, str], where: str, what: str = "model") -> None:
    """Raises CheckpointError that lists what differs between a checkpoint and this run's arrays."""
    lines = [f"{n} is {saved[n]} there and {wanted[n]} here" for n in wanted if n in saved and saved[n] != wanted[n]]
    lines += [f"{n} is only in the checkpoint" for n in saved if n not in wanted]
    lines += [f"{n} is only in this {what}" for n in wanted if n not in saved]
    if lines:
        more = f"; and {len(lines) - 8} more" if len(lines) > 8 else ""
        said = "; ".join(line[:300] for line in lines[:8])
        raise CheckpointError(f"{where} is of another {what}: {said}{more}; use another run_dir")


def load_arrays(path: Path, name: str, abstract: Any) -> Any:
    """The arrays `name` ("params" or "optimizer") of a checkpoint, placed by the shardings of `abstract`."""
    try:
        loaded = orbax().load_checkpointables(path.absolute(), {name: flatten_named(abstract)})[name]
        return unflatten_like(abstract, loaded)
    except Exception as error:  # orbax and tensorstore raise errors of many kinds
        raise CheckpointError(f"{path}: the arrays {name!r} cannot be read: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """An error of any kind in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
