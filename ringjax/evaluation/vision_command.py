"""`ringjax eval captions | drawings | gallery | video_needle RUN`: from options to a report."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from ringjax.evaluation.captions import run_captions
from ringjax.evaluation.choice_report import choice_lines, choice_markdown, write_choices
from ringjax.evaluation.choices import require_choices
from ringjax.evaluation.drawings import require_same_pictures, run_drawings
from ringjax.evaluation.eval_report import write_report
from ringjax.evaluation.gallery import write_gallery
from ringjax.evaluation.heldout import HeldOut
from ringjax.evaluation.results import Results
from ringjax.evaluation.summary import markdown, summarise
from ringjax.evaluation.video_needle import VideoNeedleTask, run_video_needle
from ringjax.evaluation.vision_config import (
    CaptionsConfig,
    ChoiceConfig,
    DrawingsConfig,
    GalleryConfig,
    VideoNeedleConfig,
    VisionConfig,
)
from ringjax.inference.trained import TrainedRun
from ringjax.interop.fingerprints import model_fingerprint
from ringjax.interop.published import is_published
from ringjax.interop.release import ABOUT, is_release, release_folder
from ringjax.interop.runs import Checkpoint
from ringjax.interop.tensors import read_json
from ringjax.models.config import RopeScaling
from ringjax.models.parallel import Parallel
from ringjax.models.transformer import with_config
from ringjax.training import distributed

VISION_KINDS: Mapping[str, type[VisionConfig]] = {
    "captions": CaptionsConfig, "drawings": DrawingsConfig, "gallery": GalleryConfig,
    "video_needle": VideoNeedleConfig,
}  # fmt: skip
# What may differ when an evaluation goes on: results depend on neither the mesh nor names of files, and count can grow.
_FREE = (
    "model", "output", "data", "kinds", "count", "caption_key", "picture_key", "image_tokenizer", "judge",
    "judge_image_tokenizer", "mesh", "layout", "simulated_devices", "progress", "dtype", "fit", "lengths", "depths",
    "per_cell", "allow_beyond",
)  # fmt: skip


def run_vision(config: VisionConfig) -> str:
    """Asks what was not answered yet, writes the report; gives what to print.

    Raises ValueError, FileNotFoundError or CheckpointError before the first question where something is wrong.
    """
    parallel = config.parallel()
    run = open_run(config, config.model, config.image_tokenizer, parallel)
    heldout = HeldOut.open(run, config)
    if isinstance(config, GalleryConfig):
        return "\n".join(write_gallery(config, heldout))
    if isinstance(config, VideoNeedleConfig):
        return _find_needles(config, heldout)
    return _choose(config, heldout, parallel)


def open_run(config: VisionConfig, folder: str, image_tokenizer: str | None, parallel: Parallel) -> TrainedRun:
    """A run's last whole checkpoint, or a released model, in the type of the config.

    Raises ValueError for a model without pictures.
    """
    if Path(folder).exists() and is_published(folder) and not is_release(folder):
        raise ValueError(
            f"{folder} is a published model, which knows no codes of pictures; give a run of ringjax train"
        )
    run = TrainedRun.load(folder, parallel=parallel, image_tokenizer=image_tokenizer, prompt_form=config.prompt_form)
    run.require_vision()
    changes = {} if config.dtype is None else {"dtype": config.dtype}
    if isinstance(config, VideoNeedleConfig):
        changes |= _longer(config)
    return dataclasses.replace(run, model=with_config(run.model, **changes)) if changes else run


def _longer(config: VideoNeedleConfig) -> dict[str, Any]:
    """What changes of the model's RoPE. Raises ValueError for lengths beyond what the model was trained for."""
    context = _context(config.model)
    reached, changes = context * (config.rope_factor or 1), {}
    beyond = max(config.lengths)
    if beyond > reached and config.rope_theta is None and not config.allow_beyond:
        raise ValueError(
            f"length {beyond} is beyond the rows of {reached:g} tokens that {config.model} was trained on; stretch its"
            " RoPE (--rope_theta, or --rope_scaling and --rope_factor), or see what happens with --allow_beyond true"
        )
    if config.rope_theta is not None:
        changes["rope_theta"] = config.rope_theta
    if config.rope_scaling is not None:
        original = None if config.rope_scaling == "linear" else context
        changes["rope_scaling"] = RopeScaling(config.rope_scaling, config.rope_factor, original)
    return changes


def _find_needles(config: VideoNeedleConfig, heldout: HeldOut) -> str:
    haystack = heldout
    if config.haystack:
        haystack = HeldOut.open(
            heldout.run, dataclasses.replace(config, data=config.haystack, split=config.haystack_split)
        )
    task = VideoNeedleTask(config, heldout, haystack)
    for length in config.lengths:  # what would fail hours later
        task.ask(task.cells(length)[0])
    asked = {"evaluation": "video_needle", **_asked(config, heldout), "haystack": haystack.fingerprint}
    with Results(config.output, asked, _about(config)) as results:
        run_video_needle(config, task, results)
    title = f"needle in a video: {Path(config.model).name}"
    files = distributed.same_on_all(lambda: [str(file) for file in write_report(results, title)])
    return "\n".join([markdown(summarise(results.records)), "", str(results.path), *files])


def _choose(config: ChoiceConfig, heldout: HeldOut, parallel: Parallel) -> str:
    kind = next(name for name, cls in VISION_KINDS.items() if isinstance(config, cls))
    lines = heldout.chosen(config.count)
    require_choices(heldout, lines, config.choices)
    judge = heldout.run
    if isinstance(config, DrawingsConfig):
        if config.judge is not None:
            judge = open_run(config, config.judge, config.judge_image_tokenizer or config.image_tokenizer, parallel)
        require_same_pictures(heldout.run, judge, config.see)
    codes = heldout.codes(lines)
    asked = {"evaluation": kind, **_asked(config, heldout)}
    with Results(config.output, asked, _about(config)) as results:
        if results.dropped and distributed.is_main():
            print(f"{results.path}: the last line was cut; what it held is asked again", flush=True)
        if isinstance(config, DrawingsConfig):
            run_drawings(config, heldout, judge, lines, codes, results)
        else:
            run_captions(config, heldout, lines, codes, results)
    title = f"{kind}: {Path(config.model).name}"
    files = distributed.same_on_all(lambda: [str(file) for file in write_choices(results, title, config.by)])
    table = choice_markdown(choice_lines(results.records), config.by)
    return "\n".join([table, "", str(results.path), *files])


def _asked(config: VisionConfig, heldout: HeldOut) -> dict[str, Any]:
    """What decides the answers."""
    asked = {name: value for name, value in dataclasses.asdict(config).items() if name not in _FREE}
    asked |= {"run": model_fingerprint(config.model), "dtype": heldout.run.model.config.dtype}
    asked["heldout"] = heldout.fingerprint
    if isinstance(config, DrawingsConfig):
        # A drawing's random numbers are those of its place in its batch.
        asked |= {"count": config.count, "kinds": config.kinds}
        asked["judge"] = model_fingerprint(config.judge or config.model)
    return asked


def _context(folder: str) -> int:
    """Tokens of the rows that a run's last checkpoint, or a released model, was trained on."""
    if is_release(folder):
        return read_json(release_folder(folder) / ABOUT)["context"]
    return Checkpoint.find(folder).stage.training.seq_len


def _about(config: VisionConfig) -> dict[str, Any]:
    from ringjax import __version__

    device = jax.devices()[0]
    return {"ringjax": __version__, "device": device.device_kind, "options": dataclasses.asdict(config)}
