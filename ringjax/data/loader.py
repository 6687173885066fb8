"""From sources to batches: shuffled, mixed, packed, permuted to the layout, and resumable to the exact batch.

    sources ── order of the epoch (grain) ── lanes: mix, cut, pack ── batch ── layout ── prefetch ──▶

Everything is a function of the config, the seed and the batch's number; neither the number of hosts nor the time
anything takes plays a part. With `epochs: null` each host reads only what its own lines of the batch need. With a
number of epochs (and for evaluation) one lane feeds all lines in turn and every host reads everything, so that all
hosts see the same last batch.
"""

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence

import grain

from ringjax.attention import layouts
from ringjax.data.config import DataConfig
from ringjax.data.errors import DataError, SkippedLines
from ringjax.data.example import Example, see_whole_frames
from ringjax.data.guidance import Unconditional, is_dropped
from ringjax.data.lanes import Lane, Stream
from ringjax.data.packing import Batch, Piece, assemble, cut
from ringjax.data.prefetch import Prefetched
from ringjax.data.sources import Source, open_sources
from ringjax.data.tokenizers import load_tokenizer

STATE_FORMAT = 1


def make_loader(
    config: DataConfig,
    *,
    seq_len: int,
    batch_size: int,
    layout: str = "contiguous",
    ring_size: int = 1,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    split: str = "train",
) -> "Loader":
    """Batches of `[batch_size / process_count, seq_len]`: the lines of the global batch that this process feeds.

    Processes whose devices hold different parts of the same rows (a ring across hosts) must give the same
    `process_index` and count only once in `process_count`. `split="heldout"` goes once, in order.

    Raises:
        FileNotFoundError: a file or folder of the config is missing.
        ValueError: sizes do not fit each other, or a source cannot be used.
    """
    layouts.get(layout).validate(seq_len, ring_size)
    if batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} cannot be shared evenly by {process_count} processes")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not in 0 … {process_count - 1}")
    rows = batch_size // process_count
    lines = range(process_index * rows, (process_index + 1) * rows)
    batches = _Batches(config, seq_len=seq_len, batch_size=batch_size, lines=lines, seed=seed, split=split)
    return Loader(batches, layout, ring_size, config.prefetch)


class Loader:
    """An iterator of batches (dicts of `[rows, seq_len]` arrays in layout order) with a state.

    `get_state()` is a small JSON-able dict that describes the place after the last batch given, whatever the
    background thread has made ahead; `set_state` goes on from there, bit for bit.
    """

    def __init__(self, batches: "_Batches", layout: str, ring_size: int, prefetch: int):
        self._batches = batches
        permuted = batches.map(functools.partial(_permute, layout=layouts.get(layout), ring_size=ring_size))
        self._iterator = Prefetched(iter(permuted), prefetch) if prefetch else iter(permuted)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    @property
    def fingerprint(self) -> str:
        """Changes when the data, the tokenizer or anything else that decides the batches changes; not with layout,
        ring or hosts."""
        return hashlib.sha256(json.dumps(self._batches.identity, sort_keys=True).encode()).hexdigest()

    @property
    def skipped(self) -> dict[str, int]:
        """How many lines this process has left out so far, by reason."""
        return self._batches.skipped.counts

    @property
    def first_skipped(self) -> dict[str, str]:
        """What was wrong with the first of them, by reason."""
        return self._batches.skipped.first

    def get_state(self) -> dict:
        return {"format": STATE_FORMAT, "identity": self._batches.identity, **self._iterator.get_state()}

    def set_state(self, state: dict) -> None:
        """Go on after the batch at which `get_state` was called, in this process or another.

        The state of a run with another number of processes can be used when it holds all lanes: see `merge_states`.

        Raises:
            ValueError: data or settings have changed since, or the state lacks lanes of this process.
        """
        _check_identity(state, self._batches.identity)
        missing = [lane for lane in self._batches.lanes if str(lane) not in state["lanes"]]
        if missing:
            raise ValueError(
                f"the saved place holds lanes {', '.join(state['lanes'])} but this process needs {missing[0]}: "
                "the number of processes has changed; merge the states of all of them (merge_states)"
            )
        self._iterator.set_state({"batches": state["batches"], "lanes": state["lanes"]})

    def close(self) -> None:
        """Stop the background thread."""
        self._iterator.close()


def merge_states(states: Sequence[dict]) -> dict:
    """One state from those of all processes after the same batch: fit for any number of processes."""
    if len({(json.dumps(state["identity"], sort_keys=True), state["batches"]) for state in states}) != 1:
        raise ValueError(
            "the states are not of one run after one batch; give those of all processes from one checkpoint"
        )
    merged = {lane: place for state in states for lane, place in state["lanes"].items()}
    return {**states[0], "lanes": dict(sorted(merged.items(), key=lambda item: int(item[0])))}


class _Batches(grain.IterDataset):
    """Batches in ascending order of the sequence."""

    def __init__(self, config: DataConfig, *, seq_len: int, batch_size: int, lines: range, seed: int, split: str):
        super().__init__()
        sources, chosen = open_sources(config, split)
        self.config, self.seq_len, self.batch_size, self.lines = config, seq_len, batch_size, lines
        self.skipped = SkippedLines()
        self.weights = None if chosen[0].weight is None else [source.weight for source in chosen]
        train = split == "train"
        self.endless = train and config.epochs is None
        self.lanes = lines if self.endless else range(1)
        self._unconditional = Unconditional(load_tokenizer(config.tokenizer))
        rate = config.drop_captions if train else 0.0
        self.streams = [
            Stream(
                number,
                source,
                seed=seed if train and config.shuffle else None,
                epochs=config.epochs if train else 1,
                skip_errors=config.on_error == "skip",
                skipped=self.skipped,
                prepare=functools.partial(self._prepare, number, source),
                is_dropped=functools.partial(is_dropped, rate, seed, number),
            )
            for number, source in enumerate(sources)
        ]
        self.identity = _identity(config, chosen, sources, seq_len, batch_size, seed, split)

    def _prepare(self, number: int, source: Source, example: Example, row: int, dropped: bool) -> list[Piece]:
        config = self.config
        if dropped:
            example = self._unconditional.of(example) or example
        if example.pairs > self.seq_len and config.long_examples != "split":
            message = (
                f"{source.place(row)}: {example.pairs + 1} tokens are more than a row of seq_len {self.seq_len} takes; "
                "use long_examples: split or skip, or longer rows"
            )
            if config.long_examples == "refuse":
                raise ValueError(message)
            self.skipped.add("too long", (number, row), message)
            return []
        if config.bidirectional_frames:
            example = see_whole_frames(example, config.vision_codes)
        return cut(example, self.seq_len, vision_codes=config.vision_codes, weights=config.weights)

    def __iter__(self) -> "_BatchIterator":
        return _BatchIterator(self)


class _BatchIterator(grain.DatasetIterator):
    def __init__(self, batches: _Batches):
        super().__init__()
        self._batches, self._made = batches, 0
        count = batches.batch_size if batches.endless else 1
        most_open = 0 if batches.config.packing == "pad" else batches.config.open_rows
        self._lanes = {
            lane: Lane(lane, count, batches.streams, batches.weights, batches.seq_len, most_open)
            for lane in batches.lanes
        }

    def __next__(self) -> Batch:
        batches = self._batches
        if batches.endless:
            rows = [lane.next_row() for lane in self._lanes.values()]
        else:
            dealt = [self._lanes[0].next_row() for _ in range(batches.batch_size)]
            if dealt[0] is None:
                raise StopIteration
            rows = [dealt[line] for line in batches.lines]
        self._made += 1
        return assemble((row or () for row in rows), len(rows), batches.seq_len, window=batches.config.window)

    def get_state(self) -> dict:
        return {"batches": self._made, "lanes": {str(number): lane.get_state() for number, lane in self._lanes.items()}}

    def set_state(self, state: dict) -> None:
        self._made = state["batches"]
        for number, lane in self._lanes.items():
            lane.set_state(state["lanes"][str(number)])


def _permute(batch: Batch, *, layout: layouts.Layout, ring_size: int) -> Batch:
    return {name: layout.permute(array, ring_size, axis=1) for name, array in batch.items()}


# Settings that change how batches are made ready, not what is in them.
_IMMATERIAL = ("sources", "heldout", "tokenizer", "vision_tokenizer", "on_error", "prefetch")


def _identity(config: DataConfig, chosen, sources, seq_len: int, batch_size: int, seed: int, split: str) -> dict:
    """Everything that decides the content of the batches, by name; JSON-able."""
    settings = {name: value for name, value in vars(config).items() if name not in _IMMATERIAL}
    described = {
        f"source {number} ({described.path})": [source.fingerprint, described.weight, described.fields]
        for number, (described, source) in enumerate(zip(chosen, sources, strict=True))
    }
    run = {"seq_len": seq_len, "batch_size": batch_size, "seed": seed, "split": split}
    identity = {**described, "tokenizer": load_tokenizer(config.tokenizer).fingerprint, **settings, **run}
    return json.loads(json.dumps(identity))


def _check_identity(state: dict, identity: dict) -> None:
    if not isinstance(state, dict) or state.get("format") != STATE_FORMAT:
        raise ValueError("the saved place in the data was written by another version; start the stage anew")
    saved = state["identity"]
    changed = [name for name in (saved | identity) if saved.get(name) != identity.get(name)]
    if changed:
        raise DataError(
            f"the data is not what it was when the run was saved: {', '.join(changed)} changed; put it back, or begin "
            "a new stage or run with the new data"
        )


__all__ = ["Batch", "DataError", "Loader", "make_loader", "merge_states"]
