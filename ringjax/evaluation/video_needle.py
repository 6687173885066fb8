"""A needle in a video: a clip of another concept somewhere in a long video of a few, asked for by its name.

    <s> <vision> cat cat dog cat … dog [umbrella] cat dog … cat </vision> What else appears in the video?
        an umbrella | a boat | a horse | …                   ten captions, of which only the needle's is in the video

Which of them is likeliest: by sum, by mean (per token), and by lift, here over the likelihood after the same video with
the first clip again in the needle's place: what the needle alone has changed. The video is read once for all
captions, on a mesh by ring attention.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from ringjax.evaluation.choices import MEASURES, Choices, Judge, choice_record
from ringjax.evaluation.eval_progress import EvalProgress
from ringjax.evaluation.heldout import HeldOut, Line, same_words
from ringjax.evaluation.question import Cell
from ringjax.evaluation.reading import peak_bytes
from ringjax.evaluation.results import Results
from ringjax.evaluation.vision_config import VideoNeedleConfig

PART = "video needle"


class Video(NamedTuple):
    """A question: the video with its needle, the same without, and the captions."""

    frames: Int[np.ndarray, "frames codes"]
    without: Int[np.ndarray, "frames codes"]
    choices: Choices


@dataclasses.dataclass(frozen=True)
class VideoNeedleTask:
    """Makes the videos. Raises ValueError for too few different clips."""

    config: VideoNeedleConfig
    needles: HeldOut
    haystack: HeldOut
    """The same, or a set of its own."""

    def __post_init__(self):
        needed, found = self.config.choices, len(self.needles.captions("clips"))
        own = self.haystack is self.needles
        if own:
            needed += self.config.concepts
        if found < needed:
            of_them = f" and {self.config.concepts} concepts of the video" if own else ""
            raise ValueError(
                f"{' '.join(self.config.data)} has {found} different captions of clips, and {self.config.choices}"
                f" choices{of_them} need {needed}; give more, fewer --choices or --concepts, or a --haystack of its own"
            )
        # In the worst case the choices of a question are captions of the haystack, and cannot be in its video.
        found, needed = len(self.haystack.captions("clips")), self.config.choices + self.config.concepts
        if not own and found < needed:
            raise ValueError(
                f"haystack {' '.join(self.config.haystack)} has {found} different captions of clips;"
                f" {self.config.concepts} of them beside {self.config.choices} choices need {needed}"
            )

    def cells(self, length: int) -> list[Cell]:
        """Depth by depth."""
        return [
            Cell(PART, length, float(depth), i) for depth in self.config.depths for i in range(self.config.per_cell)
        ]

    def ask(self, cell: Cell) -> Video:
        """The video of a cell, always the same. Raises ValueError where the needle alone fills it."""
        rng = cell.rng(self.config.seed)
        order = [self.needles.lines[i] for i in rng.permutation(len(self.needles.lines))]
        needle, *others = _different(order)[: self.config.choices]
        taken = {same_words(line.caption) for line in (needle, *others)}
        hay = [self.haystack.lines[i] for i in rng.permutation(len(self.haystack.lines))]
        hay = [line for line in _different(hay) if same_words(line.caption) not in taken][: self.config.concepts]
        right = int(rng.integers(self.config.choices))
        captions = [line.caption for line in others]
        choices = Choices((*captions[:right], needle.caption, *captions[right:]), right)
        clips = [self._hay_codes[line.index] for line in hay]
        frames, without = self._video(cell, self._needle_codes[needle.index], clips, rng)
        return Video(frames, without, choices)

    @functools.cached_property
    def _needle_codes(self) -> dict[int, np.ndarray]:
        return _all_codes(self.needles)

    @functools.cached_property
    def _hay_codes(self) -> dict[int, np.ndarray]:
        return self._needle_codes if self.haystack is self.needles else _all_codes(self.haystack)

    def _video(
        self, cell: Cell, needle: np.ndarray, clips: Sequence[np.ndarray], rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """The needle among clips in any order, and the same with more of them in its place."""
        count = self.frames_at(cell.length) - len(needle)
        if count < 1:
            raise ValueError(
                f"length {cell.length}: the needle's {len(needle)} frames alone fill the video; ask for more"
            )
        shortest = min(len(clip) for clip in clips)
        picked = [clips[i] for i in rng.integers(len(clips), size=-(-count // shortest))]
        hay = np.concatenate(picked)
        starts = np.cumsum([0, *(len(clip) for clip in picked)])
        starts = np.append(starts[starts < count], count)
        place = int(starts[np.argmin(np.abs(starts - cell.depth / 100 * count))])
        instead = np.resize(picked[0], needle.shape)
        return tuple(np.concatenate([hay[:place], part, hay[place:count]]) for part in (needle, instead))

    def frames_at(self, length: int) -> int:
        """Frames of a video that leaves room for the question, and for the longest answer."""
        run, codes = self.needles.run, self.needles.run.data.codes_per_frame
        words = len(run.prompts.see([np.zeros((1, codes), np.int32)], self.config.prompt)) - (codes + 1)
        answers = (run.tokenizer.encode(caption) for caption in self.needles.captions("clips"))
        return (length - words - 1 - max(map(len, answers))) // (codes + 1)


def run_video_needle(config: VideoNeedleConfig, task: VideoNeedleTask, results: Results) -> None:
    """Asks what `results` do not hold yet, length by length."""
    cells = [cell for length in config.lengths for cell in task.cells(length)]
    missing = {cell: [by for by in MEASURES if not results.has(by, cell)] for cell in cells}
    judge, opened = Judge(task.needles.run, config.prompt), None
    with EvalProgress(config.progress, len(cells), sum(not by for by in missing.values())) as shown:
        for cell in (cell for cell in cells if missing[cell]):
            records = _asked(judge, config, task, cell, compiled=cell.length != opened)
            opened = cell.length
            for record in records:
                if record["method"] in missing[cell]:
                    results.add(record)
            found = ", ".join(record["method"] for record in records if record["score"]) or "none"
            shown.step(f"{cell.length} {cell.depth:g} %", f"right by {found}")


def _asked(
    judge: Judge, config: VideoNeedleConfig, task: VideoNeedleTask, cell: Cell, compiled: bool
) -> list[dict[str, Any]]:
    """Lines of the results, one a measure: the measures are the methods of the table."""
    video, see = task.ask(cell), judge.run.prompts.see
    start = time.perf_counter()
    prompt = see([video.frames], config.prompt)
    verdict = judge.after(prompt, video.choices.captions, alone=see([video.without], config.prompt))
    seconds = time.perf_counter() - start
    more = {"tokens": len(prompt), "frames": len(video.frames), "peak_bytes": peak_bytes()}
    return [choice_record(by, cell, video.choices, verdict, by, seconds, compiled) | more for by in MEASURES]


def _all_codes(heldout: HeldOut) -> dict[int, np.ndarray]:
    return {line.index: codes for line, codes in zip(heldout.lines, heldout.codes(heldout.lines))}


def _different(lines: Sequence[Line]) -> list[Line]:
    """The first line of each caption."""
    found: dict[str, Line] = {}
    for line in lines:
        found.setdefault(same_words(line.caption), line)
    return list(found.values())
