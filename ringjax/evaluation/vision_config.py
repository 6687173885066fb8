"""The options of `ringjax eval captions | drawings | gallery | video_needle`: how well a run sees and draws."""

import dataclasses
from pathlib import Path
from typing import Literal

from ringjax.data.heldout import SHARE, Split
from ringjax.data.heldout import heldout as is_heldout
from ringjax.data.pictures import Fit
from ringjax.inference import lwm_prompts
from ringjax.inference.on_mesh import OnMesh
from ringjax.inference.sampling import Sampling

Kind = Literal["pictures", "clips"]
By = Literal["sum", "mean", "lift"]
ByCodes = Literal["sum", "mean", "lift", "codes"]
# The guidance of drawings where none is given: words count more than in training, as in every published sampler.
GUIDANCE = 3.0


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True)
class VisionConfig(OnMesh):
    """What all of them are told."""

    model: str
    """The folder of a run that `ringjax train` made, of a model with a vision table; or of a released one."""
    output: str = "runs/eval_vision"
    """Folder for results.jsonl, picture and report; an evaluation that was interrupted goes on there."""
    data: tuple[str, ...] = ()
    """Held-out pictures and clips: .jsonl files with a caption, and codes (`vision`) or a picture's name (`file`), a
    line; none: the held-out digits, for runs that were trained on the others."""
    kinds: tuple[Kind, ...] = ("pictures", "clips")
    """Which of them; a clip is what has more than one frame."""
    split: Split = "all"
    """Which lines of `data`: all, or those whose captions `ringjax tokenize` keeps aside (heldout) or trains on."""
    heldout_share: float = SHARE
    """Share of the captions that is kept aside, as it was for `ringjax tokenize`."""
    count: int | None = None
    """Pictures, and clips, at most, drawn with the seed; null: all."""
    caption_key: str = "caption"
    """The field that holds the caption."""
    picture_key: str = "file"
    """The field that names a picture or clip, relative to the .jsonl's folder."""
    fit: Fit | None = None
    """How a picture becomes square (crop, pad, centre); null: crop, but centre for the digits' own tokenizer."""
    image_tokenizer: str | None = None
    """A VQGAN .safetensors, or `sample` for the digits' own (the default of runs trained on them)."""
    prompt_form: Literal["own", "lwm"] = "own"
    """`own`: as a run was trained; `lwm`: in the words of LWM's tasks."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of activations and products; null: the run's."""
    seed: int = 0
    """Of what is drawn: which captions stand beside the right one, which pictures, and their codes."""
    progress: Literal["auto", "rich", "plain", "none"] = "auto"
    """What is shown meanwhile: a bar on a terminal, lines elsewhere."""

    def __post_init__(self):
        self.check_mesh()
        _require(bool(self.kinds), "kinds: name pictures, clips, or both")
        _require(len(set(self.kinds)) == len(self.kinds), f"kinds {' '.join(self.kinds)}: each once")
        is_heldout("", self.heldout_share)
        _require(self.count is None or self.count >= 1, f"count {self.count} must be at least 1")
        _require(0 <= self.seed < 2**31, f"seed {self.seed} must be in [0, 2^31)")

    def facts(self) -> dict[str, str]:
        """Fingerprints of the models and of every file that is read."""
        from ringjax.interop.fingerprints import file_facts, model_fingerprint

        found = {f"model {name}": model_fingerprint(name) for name in self.models()}
        return found | file_facts([*self.data, self.image_tokenizer])

    def models(self) -> tuple[str, ...]:
        """All that are asked."""
        return (self.model,)


@dataclasses.dataclass(frozen=True)
class ChoiceConfig(VisionConfig):
    """What evaluations are told in which a model picks one of several captions."""

    choices: int = 10
    """Captions to pick from: the right one, and others of held-out pictures (of clips for a clip), all different."""
    by: By = "sum"
    """What is compared. sum: log p(caption | picture); mean: that per token; lift: less log p(caption) without the
    picture. All three are reported; this one decides what counts as right."""
    prompt: str = ""
    """Words between a picture and its caption, as in the run's training data."""

    def __post_init__(self):
        super().__post_init__()
        _require(self.choices >= 2, f"choices {self.choices} must be at least 2: the right caption and another")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawingWords:
    """What a model is told to draw."""

    words: str = "{caption}"
    """What a picture is drawn after; the caption goes where {caption} is."""
    clip_words: str = "{caption}"
    """What a clip is drawn after."""

    def check_words(self) -> None:
        """Raises ValueError for words without a place for the caption."""
        for name in ("words", "clip_words"):
            text = getattr(self, name)
            _require("{caption}" in text, f"{name} {text!r} must hold {{caption}}: what is drawn")

    def asked(self, caption: str, frames: int) -> str:
        """The words for a drawing of so many frames."""
        return (self.words if frames == 1 else self.clip_words).replace("{caption}", caption)


@dataclasses.dataclass(frozen=True)
class CaptionsConfig(DrawingWords, ChoiceConfig):
    """Does a model know what it sees? The right caption of a held-out picture or clip among ten, by likelihood."""

    output: str = "runs/eval_captions"
    """Folder for results.jsonl, picture and report; an evaluation that was interrupted goes on there."""
    by: ByCodes = "sum"
    """What is compared. sum: log p(caption | picture); mean: that per token; lift: less log p(caption) without the
    picture; codes: log p(picture | caption), of the words it is drawn after. All are reported; this one decides what
    counts as right."""

    def __post_init__(self):
        super().__post_init__()
        self.check_words()


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawingOptions(DrawingWords):
    """How codes are drawn."""

    temperature: float = 1.0
    """Logits are divided by it, 0: always the most likely code."""
    top_k: int | None = None
    """Only the k most likely codes; null: all."""
    top_p: float | None = None
    """Only the most likely codes that together reach this probability."""
    guidance: float = GUIDANCE
    """Classifier-free guidance: how much the words count, 1: as in training."""
    batch: int = 32
    """Drawings at a time (with guidance twice as many rows)."""

    def check_drawing(self) -> None:
        """Raises ValueError for what cannot be sampled."""
        self.check_words()
        _require(self.batch >= 1, f"batch {self.batch} must be at least 1")
        self.sampling(0)

    def sampling(self, seed: int) -> Sampling:
        """Of pictures, and of clips in a run's own form."""
        return Sampling(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, guidance=self.guidance, seed=seed
        )

    def later_sampling(self, seed: int) -> Sampling:
        """Of a clip's frames after the first in LWM's form, which draws them without guidance."""
        return dataclasses.replace(self.sampling(seed), guidance=lwm_prompts.CLIP.guidance)


@dataclasses.dataclass(frozen=True)
class DrawingsConfig(DrawingOptions, ChoiceConfig):
    """Can a model draw what it is told? Drawings from held-out captions, recognised by a captioner among ten; and real
    pictures through the same judge."""

    output: str = "runs/eval_drawings"
    """Folder for results.jsonl, picture and report; an evaluation that was interrupted goes on there."""
    judge: str | None = None
    """The run that picks the captions; null: the one that draws."""
    judge_image_tokenizer: str | None = None
    """The judge's; null: the one that draws has the same."""
    per_caption: int = 1
    """Drawings of each caption; every one counts."""
    see: Literal["pixels", "codes"] = "pixels"
    """What the judge gets. pixels: the picture, decoded and encoded again, real ones too; codes: the codes drawn."""

    def __post_init__(self):
        super().__post_init__()
        self.check_drawing()
        _require(
            1 <= self.per_caption <= self.batch,
            f"per_caption {self.per_caption} must be 1 to batch {self.batch}: drawings of one batch differ",
        )
        if self.judge is None and self.judge_image_tokenizer is not None:
            raise ValueError(
                f"judge_image_tokenizer {self.judge_image_tokenizer} without a judge; name one with --judge, or leave"
                " it out"
            )

    def models(self) -> tuple[str, ...]:
        return (self.model,) if self.judge is None else (self.model, self.judge)

    def facts(self) -> dict[str, str]:
        from ringjax.interop.fingerprints import file_facts

        return super().facts() | file_facts([self.judge_image_tokenizer])


@dataclasses.dataclass(frozen=True)
class VideoNeedleConfig(VisionConfig):
    """A needle in a video: a clip of another concept in a long video of a few; is its caption found among ten?"""

    output: str = "runs/eval_video_needle"
    """Folder for results.jsonl, pictures and report; an evaluation that was interrupted goes on there."""
    kinds: tuple[Kind, ...] = ("clips",)
    """Clips alone."""
    haystack: tuple[str, ...] = ()
    """Other .jsonl files, whose clips make the long video; none: clips of `data`."""
    haystack_split: Split = "all"
    """Which lines of `haystack`."""
    lengths: tuple[int, ...] = (4096, 8192, 16384, 32768)
    """Tokens of a prompt at most, video and question; met to the frame."""
    depths: tuple[float, ...] = (0, 25, 50, 75, 100)
    """Percent of the video before the needle, to the nearest clip."""
    per_cell: int = 4
    """Videos at each length and depth."""
    concepts: int = 4
    """Different clips that the long video is made of, again and again in any order."""
    choices: int = 10
    """Captions to pick from: the needle's, and others of clips that are not in the video."""
    prompt: str = "What else appears in the video?"
    """What is asked after the video."""
    rope_theta: float | None = None
    """RoPE's base; null: the run's."""
    rope_scaling: Literal["yarn", "linear"] | None = None
    """RoPE's rule; null: the run's."""
    rope_factor: float | None = None
    """Of rope_scaling: new context over that of training."""
    allow_beyond: bool = False
    """Whether lengths beyond the rows of training are asked as they are."""

    def __post_init__(self):
        super().__post_init__()
        _require(self.kinds == ("clips",), f"kinds {' '.join(self.kinds)}: a video is made of clips alone")
        _require(self.count is None, f"count {self.count}: say how many with --per_cell")
        _require(
            bool(self.haystack) or self.haystack_split == "all",
            f"haystack_split {self.haystack_split} without a haystack; name it, or use --split",
        )
        _require(bool(self.lengths) and min(self.lengths) >= 2, f"lengths {self.lengths} must be numbers of at least 2")
        _require(
            bool(self.depths) and all(0 <= depth <= 100 for depth in self.depths),
            f"depths {self.depths} must be percents, 0 to 100",
        )
        for name in ("lengths", "depths"):
            given = getattr(self, name)
            _require(len(set(given)) == len(given), f"{name} {' '.join(map(str, given))}: each once")
        for name, least in (("per_cell", 1), ("concepts", 1), ("choices", 2)):
            _require(getattr(self, name) >= least, f"{name} {getattr(self, name)} must be at least {least}")
        _require(
            (self.rope_scaling is None) == (self.rope_factor is None),
            f"rope_scaling {self.rope_scaling} and rope_factor {self.rope_factor} belong together; set both or neither",
        )
        _require(
            self.rope_factor is None or self.rope_factor >= 1, f"rope_factor {self.rope_factor} must be at least 1"
        )

    def facts(self) -> dict[str, str]:
        from ringjax.interop.fingerprints import file_facts

        return super().facts() | file_facts(self.haystack)


@dataclasses.dataclass(frozen=True)
class GalleryConfig(DrawingOptions, VisionConfig):
    """Pictures for people: caption, real and drawn side by side, chosen by the seed; clips as an animated WebP."""

    output: str = "runs/gallery.png"
    """The picture; clips go beside it, into NAME_clips.webp."""
    pictures: int = 24
    """How many pictures are shown."""
    clips: int = 8
    """How many clips."""
    columns: int = 3
    """Cards side by side."""
    tile: int = 112
    """Pixels of a picture's side."""
    fps: float = 6.0
    """Frames a second of the clips."""

    def __post_init__(self):
        super().__post_init__()
        self.check_drawing()
        _require(Path(self.output).suffix.lower() == ".png", f"output {self.output!r} must be the name of a .png file")
        for name, least in (("pictures", 0), ("clips", 0), ("columns", 1), ("tile", 16)):
            _require(getattr(self, name) >= least, f"{name} {getattr(self, name)} must be at least {least}")
        _require(self.pictures + self.clips >= 1, "pictures 0 and clips 0: nothing to show")
        _require(self.count is None, f"count {self.count}: a gallery has --pictures and --clips")
        _require(0 < self.fps <= 100, f"fps {self.fps} must be above 0 and at most 100")

    @property
    def clips_output(self) -> Path:
        """Where the clips go."""
        path = Path(self.output)
        return path.with_name(f"{path.stem}_clips.webp")
