"""Held-out pictures through the averaged weights: PSNR, SSIM, how many codes they use; and a picture of some."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from ringjax.data.picture_set import DecodedSet, LeftOut, list_files
from ringjax.data.pictures import spread
from ringjax.training.image_tokenizer.config import TokenizerStage
from ringjax.training.image_tokenizer.feed import PictureFeed, picture_form, place_pictures
from ringjax.training.image_tokenizer.step import Quality, TokenizerTrainer
from ringjax.training.task import Measured


class TokenizerEvaluator:
    """Called with the parameters of a state; the same pictures every time."""

    def __init__(self, stage: TokenizerStage, trainer: TokenizerTrainer, feed: PictureFeed):
        self._stage, self._trainer, self._feed = stage, trainer, feed
        self._pictures: dict[str, np.ndarray] | None = None

    def __call__(self, params: Any) -> dict[str, Measured]:
        """Source -> {"psnr", "ssim", "usage", "perplexity", "pictures"}."""
        return {name: self.measure(params, pictures) for name, pictures in self.pictures.items()}

    @property
    def pictures(self) -> dict[str, np.ndarray]:
        """Held-out pictures of each source that has some, decoded the first time they are wanted."""
        if self._pictures is None:
            found = {source.path: self._held_out(source.path) for source in self._stage.data.sources}
            self._pictures = {path: pictures for path, pictures in found.items() if len(pictures)}
        return self._pictures

    def _held_out(self, path: str) -> np.ndarray:
        data, most = self._stage.data, self._stage.training.eval_pictures
        left_out = LeftOut(data.on_error)
        files = list_files(path, "heldout", data.heldout_share, left_out)
        rows = [(file, frame) for file in files for frame in range(file.frames)]
        chosen = [rows[i] for i in spread(len(rows), most)]
        decoded = DecodedSet(dict.fromkeys(file for file, _ in chosen), picture_form(self._stage), left_out)
        wanted = {(file.path, frame) for file, frame in chosen}
        places = [(decoded.where(i), i) for i in range(len(decoded))]
        return decoded[[i for (file, frame), i in places if (file.path, frame) in wanted]]

    def measure(self, params: Any, pictures: np.ndarray) -> Measured:
        """Means over pictures `[n, H, W, C]`."""
        quality = self.run(params, pictures)
        counts = np.bincount(quality.codes.reshape(-1), minlength=self._stage.vqgan.codes)
        share = counts[counts > 0] / counts.sum()
        similarity = float(np.mean(quality.ssim, dtype=np.float64))
        return {
            "psnr": float(np.mean(quality.psnr, dtype=np.float64)),
            "ssim": None if np.isnan(similarity) else similarity,
            "usage": float(np.mean(counts > 0)),
            "perplexity": float(np.exp(-share @ np.log(share))),
            "pictures": len(pictures),
        }

    def run(self, params: Any, pictures: np.ndarray) -> Quality:
        """Every picture's quality, in batches of one shape; the last one is filled up."""
        size, parts = self._stage.training.batch_size, []
        for start in range(0, len(pictures), size):
            batch = pictures[start : start + size]
            filled = np.concatenate([batch, np.repeat(batch[:1], size - len(batch), axis=0)])
            index, count = self._feed.group
            placed = place_pictures(np.array_split(filled, count)[index], self._feed.mesh, self._feed.group)
            quality = jax.device_get(self._trainer.evaluate(params["average"], placed))
            parts.append(Quality(*(x[: len(batch)] for x in quality)))
        return Quality(*(np.concatenate(x) for x in zip(*parts)))


def draw_pairs(path: Path, originals: np.ndarray, shown: np.ndarray, columns: int = 8) -> None:
    """A PNG of originals, each above its reconstruction."""
    gap, size = 4, originals.shape[1]
    rows = -(-len(originals) // columns)
    height, width = rows * (2 * size + 3 * gap), min(columns, len(originals)) * (size + gap) + gap
    sheet = np.full((height, width, 3), 128, np.uint8)
    for i, pair in enumerate(zip(originals, shown)):
        top, left = gap + i // columns * (2 * size + 3 * gap), gap + i % columns * (size + gap)
        for k, picture in enumerate(pair):
            sheet[top + k * (size + gap) :, left:][:size, :size] = picture
    Image.fromarray(sheet).save(path)
