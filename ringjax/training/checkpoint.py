"""Checkpoints: orbax writes the arrays while training goes on; a manifest written last says that one is whole.

    run_dir/checkpoints/step_00000500/
        params/, optimizer/      orbax (OCDBT), readable on any mesh
        ringjax.json             step, stage, loader state, config, parameter shapes, checksums (manifest.py)

A checkpoint without a valid manifest does not count: resuming takes the last whole one and says what it left out. An
older one is removed only after a newer one is whole.
"""

import dataclasses
import math
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from ringjax import disk
from ringjax.json_text import brief
from ringjax.models.config import ModelConfig
from ringjax.models.transformer import Transformer
from ringjax.training import distributed, peers
from ringjax.training.arrays import (
    CheckpointError,
    check_same_arrays,
    describe_arrays,
    flatten_named,
    load_arrays,
    one_line,
    start_saving,
)
from ringjax.training.config import CheckpointConfig, RunConfig
from ringjax.training.manifest import NAME, DamagedCheckpoint, read_manifest, write_manifest
from ringjax.training.typed import build
from ringjax.training.yaml_tree import to_item

FOLDER = "checkpoints"
_TEMPORARY = ".orbax-checkpoint-tmp"
SAVE_SECONDS = 3600
"""A save that takes longer hangs."""


class DiskError(CheckpointError):
    """A checkpoint could not be written because of the disk: it is full, read-only or broken."""


def step_folders(folder: Path) -> list[tuple[int, Path]]:
    """Step and path of every checkpoint folder, newest first, whole or not."""
    found = [(re.fullmatch(r"step_(\d{1,12})", path.name), path) for path in folder.glob("step_*") if path.is_dir()]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def last_whole(folder: Path, verify: bool = True, say: Callable[[str], None] = print) -> tuple[Path, dict] | None:
    """The newest whole checkpoint and its manifest; `say`s which newer ones are left out and why."""
    for _, path in step_folders(folder):
        try:
            return path, read_manifest(path, verify)
        except DamagedCheckpoint as error:
            say(f"checkpoint {error}; falling back to the one before it")
    return None


def best_of_stages(folder: Path, say: Callable[[str], None]) -> dict[int, tuple[float, int]]:
    """Held-out loss and step of each stage's whole checkpoint with the lowest; `say`s which manifests are damaged."""
    best: dict[int, tuple[float, int]] = {}
    for step, path in step_folders(folder):
        try:
            info = read_manifest(path, verify=False)
        except DamagedCheckpoint as error:
            if (path / NAME).exists():
                say(f"checkpoint {error}; left out")
            continue
        if isinstance(loss := info.get("held_out_loss"), float) and math.isfinite(loss):
            stage = info["stage"]
            best[stage] = min(best.get(stage, (loss, step)), (loss, step))
    return best


class CheckpointStore:
    """Saves, keeps and finds the checkpoints of one run. All processes call it alike; process 0 writes the manifest."""

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        say: Callable[[str], None] = print,
        stage_ends: Collection[int] = (),
    ):
        self.folder = Path(run_dir).absolute() / FOLDER
        self._stage_ends = frozenset(stage_ends if config.keep_stages else ())
        self._config, self._say = config, say
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._newest: int | None = None
        self._bytes = 0
        self._begun = 0.0

    def tidy(self) -> None:
        """Put aside what a kill left behind, so that its step can be saved again. Process 0, before training."""
        for path in self.folder.glob(f"*{_TEMPORARY}*"):
            shutil.rmtree(path, ignore_errors=True)
        for _, path in step_folders(self.folder):
            try:
                read_manifest(path, self._config.verify)
                return
            except DamagedCheckpoint:
                if (path / NAME).exists():  # kept to be looked at; the newest replaces an older one of the same step
                    shutil.rmtree(path.with_suffix(".damaged"), ignore_errors=True)
                    path.rename(path.with_suffix(".damaged"))
                else:
                    shutil.rmtree(path, ignore_errors=True)

    def save(self, step: int, arrays: dict[str, Any], info: dict[str, Any]) -> None:
        """Start saving `arrays` (name -> pytree) and `info`; returns while the files are being written.

        The step that was saved last is not saved again.
        Raises CheckpointError when the save before this one, or the start of this one, failed.
        """
        self.wait()
        path = self.folder / f"step_{step:08d}"
        if step == self._newest:
            return
        self._newest = step
        named = {name: flatten_named(tree) for name, tree in arrays.items()}
        self._bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(named))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            response = start_saving(path, named)
        except Exception as error:
            self._failure = error
            self.poll()
        arguments = (response, path, info)
        self._thread = threading.Thread(target=self._finish, args=arguments, name="checkpoint", daemon=True)
        self._begun = time.monotonic()
        self._thread.start()
        if not self._config.asynchronous:
            self.wait()

    def _finish(self, response, path: Path, info: dict[str, Any]) -> None:
        try:
            response.result()
            if jax.process_index() == 0:
                write_manifest(path, info)
                self._prune()
        except BaseException as error:
            self._failure = error

    def best(self, stage: int) -> float | None:
        """The lowest held-out loss of this stage's whole checkpoints; the same on all processes."""
        loss, _ = distributed.same_on_all(lambda: best_of_stages(self.folder, self._say).get(stage, (None, None)))
        return loss

    def _prune(self) -> None:
        whole = [(step, path) for step, path in step_folders(self.folder) if (path / NAME).exists()]
        best = best_of_stages(self.folder, say=lambda line: None) if self._config.keep_best else {}
        kept = {step for _, step in best.values()}
        for step, path in whole[self._config.keep_last :]:
            if step in self._stage_ends or (self._config.keep_every and step % self._config.keep_every == 0):
                continue
            if step in kept:
                continue
            (path / NAME).unlink()  # first: what is half removed must not look whole
            shutil.rmtree(path, ignore_errors=True)

    def poll(self) -> None:
        """Raises CheckpointError if a save has failed, or hangs; cheap, called every step."""
        if self._thread is not None and self._thread.is_alive() and time.monotonic() - self._begun > SAVE_SECONDS:
            self._thread = None
            peers.end_at_once()  # the thread can't be ended
            raise DiskError(
                f"saving a checkpoint to {self.folder} has not ended for {SAVE_SECONDS / 60:.0f} minutes; does its disk"
                " answer? The same command goes on from the last whole one"
            )
        if self._failure is None:
            return
        failure, self._failure = self._failure, None
        reason = self._reason(failure)  # first: it says what is free while the unfinished files are there
        if jax.process_index() == 0:
            self._remove_unfinished()
        left = next((p for _, p in step_folders(self.folder) if (p / NAME).exists()), None)
        last = f"the last whole checkpoint is {left}" if left else "there is no whole checkpoint yet"
        kind = CheckpointError if disk.problem(failure) is None else DiskError
        raise kind(f"saving a checkpoint failed: {reason}; {last}") from failure

    def _reason(self, error: BaseException) -> str:
        """One line for what went wrong; what is wrong with a disk is named as such."""
        problem = disk.problem(error)
        if problem is None:
            return one_line(error)
        what = disk.named(error) or f"step_{self._newest:08d}"
        try:
            room = disk.free(self.folder)
        except OSError as second:
            room = f"what is free cannot be told: {second}"
        out = "free some space" if "full" in problem else "mend that"
        return (
            f"the disk of {self.folder} {problem}; {out} and run the same command again: {what} of a checkpoint of"
            f" {disk.megabytes(self._bytes)} could not be written ({room})"
        )

    def _remove_unfinished(self) -> None:
        for path in self.folder.glob(f"*{_TEMPORARY}*"):
            shutil.rmtree(path, ignore_errors=True)
        for _, path in step_folders(self.folder):
            if not (path / NAME).exists():
                shutil.rmtree(path, ignore_errors=True)

    def wait(self) -> None:
        """Wait for the running save, and raise CheckpointError if it failed."""
        if self._thread is not None:
            self._thread.join(max(0.0, self._begun + SAVE_SECONDS + 1 - time.monotonic()))
            if not self._thread.is_alive():
                self._thread = None
        self.poll()


def find_checkpoint(
    run_dir: str | Path, *, step: int | None = None, stage: str | None = None, say: Callable[[str], None] = print
) -> tuple[Path, dict[str, Any]]:
    """A run's last whole checkpoint (of the stage called `stage`, or that of `step`) and its manifest. Reads only.

    Of a run with `checkpoint.keep_best` it is the one with the lowest held-out loss of the stage, where that is whole.
    Raises CheckpointError when there is none.
    """
    folder = Path(run_dir).absolute() / FOLDER
    if step is not None:
        path = folder / f"step_{step:08d}"
        try:
            return path, read_manifest(path)
        except DamagedCheckpoint as error:
            have = ", ".join(str(s) for s, _ in step_folders(folder)) or "none"
            raise CheckpointError(f"{error}; steps in {folder}: {have}") from None
    if stage is None:
        found = last_whole(folder, say=say)
        if found is None:
            raise CheckpointError(f"{run_dir} holds no whole checkpoint; train first (ringjax train CONFIG)")
    else:
        found = _last_of_stage(run_dir, folder, stage, say)
    return best_or(found, folder, say)


def best_or(found: tuple[Path, dict[str, Any]], folder: Path, say: Callable[[str], None]) -> tuple[Path, dict]:
    """The best checkpoint of the stage of the one that was found, if the run keeps such and it is whole."""
    info = found[1]
    if not (info.get("config") or {}).get("checkpoint", {}).get("keep_best"):
        return found
    _, step = best_of_stages(folder, say).get(info["stage"], (None, info["step"]))
    if step == info["step"]:
        return found
    path = folder / f"step_{step:08d}"
    try:
        return path, read_manifest(path)
    except DamagedCheckpoint as error:
        say(f"checkpoint {error}, the best one; the last one is taken")
        return found


def _last_of_stage(run_dir: str | Path, folder: Path, stage: str, say: Callable[[str], None]) -> tuple[Path, dict]:
    have: dict[str, int] = {}
    for number, path in step_folders(folder):
        try:
            info = read_manifest(path, verify=False)
            name = run_of(info, path).stage_list[info["stage"]].name
        except DamagedCheckpoint as error:
            say(f"checkpoint {error}; left out")
            continue
        if name == stage:
            return path, read_manifest(path)
        have.setdefault(name, number)
    kept = ", ".join(f"{name} (step {number})" for name, number in have.items()) or "none"
    raise CheckpointError(
        f"{run_dir} holds no whole checkpoint of stage {stage!r}; it holds those of {kept}. checkpoint.keep_stages"
        " keeps the last one of each stage"
    )


def run_of(info: dict[str, Any], path: Path) -> RunConfig:
    """The config of the transformer's run that a checkpoint is of, from its manifest."""
    saved, stage = info.get("config"), info.get("stage")
    if saved is None or stage is None:
        raise CheckpointError(f"{path} does not say of which run and stage it is; it is no checkpoint of a run")
    if "vqgan" in saved:
        raise CheckpointError(f"{path} is of an image tokenizer's run; load its tokenizer.safetensors")
    run = build(RunConfig, to_item(saved, f"{path.name}/{NAME}"))
    if not 0 <= stage < len(run.stage_list):
        raise CheckpointError(f"{path} is of stage {brief(stage)}, and its run has {len(run.stage_list)}")
    return run


def restore_model(
    run_dir: str | Path, *, step: int | None = None, stage: str | None = None, parallel: Any = None, say=print
):
    """`(ModelConfig, model)` of the checkpoint that `find_checkpoint` finds, for inference.

    The parameters are placed by `parallel.param_shardings`, or on the first device without one. Raises CheckpointError
    for a run of adapters alone, too: `ringjax.interop.runs` knows how to read what they belong to.
    """
    path, info = find_checkpoint(run_dir, step=step, stage=stage, say=say)
    model_config = for_inference(run_of(info, path).stage_list[info["stage"]].model)
    if "base" in info:
        raise CheckpointError(f"{path} holds adapters alone; use ringjax.interop.runs.load_run, which reads their base")
    return model_config, restore_params(path, info, Transformer.abstract(model_config), parallel)


def for_inference(config: ModelConfig) -> ModelConfig:
    """The config of a run's model without what only saves time in training."""
    return dataclasses.replace(config, shifted_group=None)


def restore_params(path: Path, info: dict[str, Any], model: Any, parallel: Any = None) -> Any:
    """The abstract `model` (or another module) with the parameters of a checkpoint."""
    graph, abstract = nnx.split(model)
    check_same_arrays(info.get("parameters", {}), describe_arrays(abstract), str(path))
    return nnx.merge(graph, load_arrays(path, "params", placed(abstract, parallel)))


def read_notes(run_dir: str | Path) -> dict[str, Any]:
    """What the last whole checkpoint of a run says of its data, empty where there is none; no file but its list."""
    found = last_whole(Path(run_dir).absolute() / FOLDER, verify=False, say=lambda line: None)
    return {} if found is None else found[1].get("notes", {})


def placed(abstract: Any, parallel: Any) -> Any:
    """Abstract parameters with their places: those of `parallel`, or the first device."""
    if parallel is None or parallel.mesh is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        parallel.param_shardings(abstract),
    )
