"""Batches of pictures for a tokenizer's training: any place of the order can be gone back to."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ringjax.data.errors import DataError
from ringjax.data.picture_order import PictureOrder
from ringjax.data.picture_set import DecodedSet, LeftOut, PictureForm, PictureSet, list_files
from ringjax.data.prefetch import Prefetched
from ringjax.training.distributed import row_group
from ringjax.training.image_tokenizer.config import TokenizerStage
from ringjax.training.image_tokenizer.step import BATCH
from ringjax.training.task import Fed


def picture_form(stage: TokenizerStage) -> PictureForm:
    """How files become squares for this run's tokenizer."""
    return PictureForm(stage.vqgan.resolution, stage.vqgan.channels, stage.data.fit, stage.data.background)


def open_sets(stage: TokenizerStage, left_out: LeftOut) -> dict[str, PictureSet]:
    """The training pictures of each source by its path. Raises ValueError, DataError and FileNotFoundError."""
    data, form = stage.data, picture_form(stage)
    files = {s.path: list_files(s.path, "train", data.heldout_share, left_out) for s in data.sources}
    check_memory(stage, sum(file.frames for found in files.values() for file in found))
    kind = DecodedSet if data.keep == "memory" else PictureSet
    sets = {path: kind(found, form, left_out) for path, found in files.items()}
    for path, found in sets.items():
        if not len(found):
            raise ValueError(f"{path} has no picture to train on; leave it out of data.sources")
    return sets


def check_memory(stage: TokenizerStage, count: int) -> None:
    """Raises ValueError where `count` decoded pictures shall be kept and are too many."""
    if stage.data.keep == "stream":
        return
    size = count * int(np.prod(picture_form(stage).shape)) / 1e9
    if size > stage.data.memory_gb:
        raise ValueError(
            f"data: {count} pictures of {stage.vqgan.resolution} × {stage.vqgan.resolution} take {size:.1f} GB in"
            f" memory and data.memory_gb is {stage.data.memory_gb:g}; raise it, or set data.keep to stream"
        )


class PictureFeed(contextlib.AbstractContextManager):
    """Reads one batch ahead, as the transformer's feed does."""

    def __init__(
        self,
        stage: TokenizerStage,
        mesh: Mesh,
        seed: int,
        state: dict[str, Any] | None = None,
        say: Callable[[str], None] = print,
    ):
        """`state`: what `whole_state` returned when the checkpoint was made, None for the beginning."""
        self.mesh = mesh
        self.group = row_group(mesh, stage.training.batch_size)
        self.left_out = LeftOut(stage.data.on_error)
        self.sets = open_sets(stage, self.left_out)
        for line in self.left_out.lines():
            say(line)
        batches = _Batches(stage, list(self.sets.values()), seed, self.group)
        self._batches = Prefetched(batches, stage.data.prefetch) if stage.data.prefetch else batches
        if state is not None:
            self._batches.set_state(state)
        self._ahead: Fed | None = None

    @property
    def skipped(self) -> dict[str, int]:
        """How many files were left out so far."""
        count = len(self.left_out.reasons)
        return {"pictures that cannot be read": count} if count else {}

    def __exit__(self, *error):
        if isinstance(self._batches, Prefetched):
            self._batches.close()

    def next(self) -> Fed:
        """The next batch."""
        self.prepare()
        fed, self._ahead = self._ahead, None
        return fed

    def prepare(self) -> None:
        """Read the batch after the one just given; call while the devices are busy."""
        if self._ahead is None:
            pictures = next(self._batches)
            self._ahead = Fed({"pictures": pictures}, self._batches.get_state())

    def place(self, rows: dict[str, np.ndarray]) -> jax.Array:
        """Pictures of this process as one global array `[B, H, W, C]`."""
        return place_pictures(rows["pictures"], self.mesh, self.group)

    def whole_state(self, fed: Fed) -> dict[str, Any]:
        """The place after `fed`, which is the same on all processes."""
        return fed.loader_state


class _Batches:
    """The endless order in batches; its state is how many pictures were seen."""

    def __init__(self, stage: TokenizerStage, sets: list[PictureSet], seed: int, group: tuple[int, int]):
        weights = [source.weight for source in stage.data.sources]
        self._order = PictureOrder([len(s) for s in sets], None if weights[0] is None else weights, seed)
        self._sets, self._group, self._size = sets, group, stage.training.batch_size
        self._data = {"seed": seed, "data": [s.fingerprint for s in sets], "weights": weights}
        self._seen = 0

    def __iter__(self):
        return self

    def __next__(self) -> np.ndarray:
        index, count = self._group
        rows = np.array_split(self._order.rows(self._seen, self._size), count)[index]
        pictures = np.empty((len(rows), *self._sets[0].form.shape), np.uint8)
        for source, found in enumerate(self._sets):
            mine = rows[:, 0] == source
            if mine.any():
                pictures[mine] = found[rows[mine, 1]]
        self._seen += self._size
        return pictures

    def get_state(self) -> dict[str, Any]:
        return {"pictures": self._seen, **self._data}

    def set_state(self, state: dict[str, Any]) -> None:
        """Raises DataError that names what is not as it was when the state was made."""
        for name, value in self._data.items():
            if state.get(name) != value:
                raise DataError(
                    f"the checkpoint was made with other pictures: {name} changed from {state.get(name)} to {value};"
                    " bring back what it was, or use another run_dir"
                )
        self._seen = state["pictures"]


def place_pictures(pictures: np.ndarray, mesh: Mesh, group: tuple[int, int]) -> jax.Array:
    """A global array `[B, H, W, C]` over the devices from this process's part of it."""
    index, count = group
    first = index * len(pictures)
    shape = (len(pictures) * count, *pictures.shape[1:])

    def part(at: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = at[0].indices(shape[0])
        return pictures[start - first : stop - first]

    return jax.make_array_from_callback(shape, NamedSharding(mesh, BATCH), part)
