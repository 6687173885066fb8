"""The image tokenizer as the training loop sees it: pictures in, reconstructions out."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ringjax.data.picture_set import LeftOut, PictureSet, list_files
from ringjax.data.pictures import spread
from ringjax.models.vqgan import save_vqgan, vqgan_fingerprint
from ringjax.training.distributed import is_main
from ringjax.training.image_tokenizer.config import TokenizerStage
from ringjax.training.image_tokenizer.evaluate import TokenizerEvaluator, draw_pairs
from ringjax.training.image_tokenizer.feed import PictureFeed, check_memory, picture_form
from ringjax.training.image_tokenizer.perceptual import load_features
from ringjax.training.image_tokenizer.step import TokenizerTrainer, compile_trainer
from ringjax.training.mesh import resolve_shape
from ringjax.training.progress import format_count
from ringjax.training.task import Measured, Task

TOKENIZER, PAIRS, LEFT_OUT = "tokenizer.safetensors", "reconstructions.png", "left_out.txt"
_SHOWN = 16

# Key of the record, label, and how the number is written.
_WORDS = (
    ("loss", "loss", "{:.4f}"), ("reconstruction_loss", "pixels", "{:.4f}"),
    ("perceptual_loss", "perceptual", "{:.4f}"), ("adversarial_loss", "adversarial", "{:.3f}"),
    ("discriminator_loss", "discriminator", "{:.3f}"), ("usage", "codes used", "{:.1%}"),
    ("perplexity", "perplexity", "{:.0f}"),
)  # fmt: skip


class ImageTokenizerTask(Task):
    """The one stage of an image tokenizer's run."""

    stage: TokenizerStage
    plot_lines = (
        ("reconstruction_loss", "pixels", "tab:blue"),
        ("perceptual_loss", "perceptual", "tab:orange"),
        ("discriminator_loss", "discriminator", "tab:green"),
    )
    plot_label = "loss"

    # ------------------------------------------------------------------ before anything runs

    def check_devices(self, device_count: int) -> None:
        dp, fsdp, *_ = resolve_shape(self.mesh_shape, device_count)
        size = self.stage.training.batch_size
        if size % (dp * fsdp):
            raise ValueError(
                f"training.batch_size {size} pictures cannot be divided over dp {dp} · fsdp {fsdp} ="
                f" {dp * fsdp} devices"
            )

    def check_data(self) -> None:
        data = self.stage.data
        left_out = LeftOut(data.on_error)
        files = [list_files(s.path, "train", data.heldout_share, left_out) for s in data.sources]
        check_memory(self.stage, sum(file.frames for found in files for file in found))
        if self.stage.training.eval_every:
            held = [list_files(s.path, "heldout", data.heldout_share, left_out) for s in data.sources]
            if not any(held):
                raise ValueError(
                    f"no caption falls into data.heldout_share {data.heldout_share}; raise it, or set eval_every to 0"
                )
        self._features()

    def data_facts(self) -> dict[str, str]:
        data, found = self.stage.data, {}
        for split in ("train", "heldout")[: 2 if self.stage.training.eval_every else 1]:
            for source in data.sources:
                files = list_files(source.path, split, data.heldout_share, LeftOut(data.on_error))
                found[f"{split} pictures of {source.path}"] = (
                    PictureSet(files, picture_form(self.stage), LeftOut(data.on_error)).fingerprint
                )
        return found

    def _features(self) -> dict[str, np.ndarray] | None:
        losses = self.stage.losses
        if losses.perceptual_weights is None or not losses.perceptual:
            return None
        return load_features(losses.perceptual_weights, losses.perceptual_layers)

    # ------------------------------------------------------------------ what the loop runs

    def trainer(self, mesh: Mesh, seed: int, start: int) -> TokenizerTrainer:
        stage = dataclasses.replace(self.stage, data=self.stage.data.variations())
        trainer = compile_trainer(stage, mesh, seed, start)
        features = self._features()
        if features is not None:
            dtype = jnp.dtype(self.stage.training.dtype)
            everywhere = NamedSharding(mesh, PartitionSpec())
            features = {name: jax.device_put(x.astype(dtype), everywhere) for name, x in features.items()}
        return trainer._replace(step=functools.partial(_step, trainer.step, features))

    def feed(self, mesh: Mesh, seed: int, state: dict[str, Any] | None, say: Callable[[str], None]) -> PictureFeed:
        feed = PictureFeed(self.stage, mesh, seed, state, say)
        counts = ", ".join(f"{len(found)} from {path}" for path, found in feed.sets.items())
        say(f"pictures and frames to train on: {counts}")
        return feed

    def evaluator(self, trainer: TokenizerTrainer, feed: PictureFeed, seed: int) -> TokenizerEvaluator:
        return TokenizerEvaluator(self.stage, trainer, feed)

    # ------------------------------------------------------------------ in words

    def amount(self) -> str:
        stage, losses = self.stage, self.stage.losses
        size, vqgan = stage.vqgan.resolution, stage.vqgan
        seen = f"perceptual × {losses.perceptual:g}" if losses.perceptual_weights else "no perceptual loss (no weights)"
        kind = "adaptive" if losses.adaptive else "fixed"
        played = (
            f"adversarial × {losses.adversarial:g} ({kind}) from step {losses.adversarial_start}"
            if losses.adversarial
            else "no adversarial loss"
        )
        return (
            f"{stage.training.batch_size} pictures of {size} × {size} a step in {stage.training.dtype}, to"
            f" {vqgan.codes_per_picture} of {vqgan.codes} codes ({stage.codebook.method}); {losses.reconstruction},"
            f" {seen}, {played}"
        )

    def readable(self, metrics: dict[str, float]) -> Measured:
        found: Measured = dict(metrics)
        if metrics.get("adversarial_weight") == 0:  # the game has not begun
            found |= dict.fromkeys(("adversarial_loss", "discriminator_loss", "adversarial_weight"))
        return found

    def speed(self, parameters: int, seconds: float, rows: dict[str, np.ndarray]) -> Measured:
        return {"pictures_per_second": self.stage.training.batch_size / seconds}

    def describe(self, record: dict[str, Any]) -> str:
        parts = [f"{label} {form.format(record[key])}" for key, label, form in _WORDS if record.get(key) is not None]
        if record.get("pictures_per_second"):
            parts.append(f"{format_count(record['pictures_per_second'])} pictures/s")
        return "  ".join(parts)

    def describe_evaluation(self, results: dict[str, Measured]) -> str:
        lines = []
        for source, found in results.items():
            similarity = "" if found["ssim"] is None else f", SSIM {found['ssim']:.4f}"
            lines.append(f"{source} PSNR {found['psnr']:.2f} dB{similarity}, codes used {found['usage']:.1%}")
        return f"held-out {'; '.join(lines)}"

    # ------------------------------------------------------------------ at the end

    def finish(self, folder: Path, trainer: TokenizerTrainer, feed: PictureFeed, params: Any) -> list[str]:
        """tokenizer.safetensors of the averaged weights, reconstructions.png, and the names of what was left out."""
        evaluator = TokenizerEvaluator(self.stage, trainer, feed)
        originals = _some(list(evaluator.pictures.values()) or list(feed.sets.values()))
        shown = evaluator.run(params, originals).shown
        if not is_main():
            return []
        draw_pairs(folder / PAIRS, originals, shown)
        model = nnx.merge(trainer.graph, jax.device_get(params["average"]))
        save_vqgan(model, folder / TOKENIZER)
        said = [f"{folder / TOKENIZER}: fingerprint {vqgan_fingerprint(model)}", f"pictures: {folder / PAIRS}"]
        if reasons := feed.left_out.reasons:
            (folder / LEFT_OUT).write_text("".join(f"{line}\n" for line in reasons.values()), "utf-8")
            said.append(f"{len(reasons)} files left out: {folder / LEFT_OUT}")
        return said


def _some(sets: Sequence) -> np.ndarray:
    """Pictures to show, from all sets alike."""
    each = max(1, _SHOWN // len(sets))
    return np.concatenate([found[spread(len(found), each)] for found in sets])


def _step(step: Callable, features: Any, state: Any, pictures: Any):
    return step(state, pictures, features)
