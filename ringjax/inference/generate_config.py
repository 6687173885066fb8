"""The options of `ringjax generate`, checked before anything is loaded."""

import dataclasses
from pathlib import Path
from typing import Literal

from ringjax.data.pictures import Fit
from ringjax.inference import lwm_prompts
from ringjax.inference.on_mesh import OnMesh
from ringjax.inference.pictures_out import check_name
from ringjax.inference.sampling import Sampling
from ringjax.models.cache import CacheType

TEXT_TOKENS, STREAM_TOKENS = 64, 1024


@dataclasses.dataclass(frozen=True)
class GenerateConfig(OnMesh):
    """Go on with a text, answer about pictures (--image), draw (--draw), or write text and pictures (--interleaved)."""

    run_dir: str
    """The folder of a run that `ringjax train` made or `ringjax convert` wrote, `sample:any-to-any`, a Hugging Face
    folder (LLaVA-1.5 too), a .gguf file, or an LWM stream (.msgpack)."""
    prompt: str = ""
    """The words to begin with, or to draw."""
    prompt_file: str | None = None
    """A text file to begin with, in place of `prompt`."""
    image: tuple[str, ...] = ()
    """A picture, a clip (animated WebP or GIF) or a folder of frames that comes before the prompt; the option may be
    repeated."""
    draw: str | None = None
    """Draw the prompt and write it to this .png file (.webp for a clip)."""
    frames: int = 1
    """For drawing: frames of the clip, 1: a picture."""
    interleaved: bool = False
    """Runs trained on pictures: the model says itself where pictures and clips belong; they are written to `output`."""
    output: str = "generated"
    """The folder of the pictures and clips of --interleaved."""
    max_frames: int | None = None
    """Frames of a clip at most, of one that --image names (evenly spread) and of those that --interleaved writes."""
    fps: float = 4.0
    """Frames a second of the clips that are written."""
    max_new_tokens: int | None = None
    """Tokens to write at most; null: 64, or 1024 with --interleaved, where a picture is hundreds of them."""
    temperature: float | None = None
    """Logits are divided by it, 0: always the most likely token; null: 0 for words about pictures, otherwise 0.7, or
    LWM's own with its prompts."""
    top_k: int | None = None
    """Only the k most likely tokens; null: all, or LWM's own with its prompts."""
    top_p: float | None = None
    """Only the most likely tokens that together reach this probability."""
    min_p: float | None = None
    """Only tokens at least this likely, as a share of the likeliest one."""
    repetition_penalty: float = 1.0
    """Tokens of the prompt and of what was written become less likely above 1."""
    stop: str | None = None
    """Published models: text that ends the answer; it is not printed."""
    cache: CacheType | None = None
    """Published models of text: int8 keeps keys and values in half of bfloat16's memory, a little less exact."""
    stop_tokens: tuple[str, ...] = ()
    """Special tokens that end the answer too, such as <|im_end|>; the option may be repeated."""
    guidance: float | None = None
    """For drawing: how much the words count, 1: as in training; null: 2, or LWM's own with its prompts."""
    prompt_form: Literal["own", "lwm"] = "own"
    """`own`: the prompt as a run was trained, or as it is; `lwm`: in the words of LWM's tasks, with its settings."""
    seed: int = 0
    """Of the random numbers."""
    image_tokenizer: str | None = None
    """A VQGAN .safetensors, or `sample` for the digits' own (the default of runs trained on them)."""
    fit: Fit | None = None
    """How a picture becomes square: its middle (crop), padded, or left at its size (centre, no larger than the
    tokenizer's); null: crop, but centre for the digits' own tokenizer."""

    stage: str | None = None
    """Runs: the stage whose last checkpoint writes; null: the last."""
    adapter: str | None = None
    """Published models of text: a folder with a LoRA adapter in PEFT's form, or `sample:smollm2-128k`, merged into the
    model; null: none."""
    tokenizer: str | None = None
    """LWM streams, which have none: LLaMA's tokenizer.model, or a tokenizer.json."""
    rope_theta: float | None = None
    """LWM streams, which don't say: RoPE's base, 5e7 for the 1M-token models."""
    heads: int | None = None
    """LWM streams of another size than LWM's: query heads."""

    def __post_init__(self):
        self.check_mesh()
        self._check_task()
        if self.prompt and self.prompt_file is not None:
            raise ValueError("prompt and prompt_file both say how to begin; give one of them")
        if not (self.prompt or self.prompt_file or self.image):
            raise ValueError("nothing to begin with; give --prompt, --prompt_file or --image")
        if self.stop == "":
            raise ValueError("stop '' would end every answer at once; give some text, or leave it out")
        for name in ("frames", "max_frames", "max_new_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if not 0 < self.fps <= 1000:
            raise ValueError(f"fps {self.fps} must be above 0 and at most 1000")
        self.sampling()

    def facts(self) -> dict[str, str]:
        """Fingerprints of the model and of every file that is read."""
        from ringjax.interop.fingerprints import file_facts, model_fingerprint

        files = [self.prompt_file, *self.image, self.adapter, self.tokenizer, self.image_tokenizer]
        return {"model": model_fingerprint(self.run_dir, self.stage), **file_facts(files)}

    def _check_task(self) -> None:
        tasks = {"image": bool(self.image), "draw": self.draw is not None, "interleaved": self.interleaved}
        if tasks["draw"] and (tasks["image"] or tasks["interleaved"]):
            other = "image" if tasks["image"] else "interleaved"
            raise ValueError(f"draw and {other} are two different tasks; give one of them")
        if self.draw is not None and not (self.prompt or self.prompt_file):
            raise ValueError("draw needs a prompt: the words to draw, for instance --prompt seven")
        if self.draw is not None:
            check_name(self.draw, self.frames)
        for name, value in (("guidance", self.guidance), ("frames", None if self.frames == 1 else self.frames)):
            if value is not None and self.draw is None:
                raise ValueError(f"{name} {value} is for drawing only; leave it out, or give --draw")
        if self.max_frames is not None and not (tasks["image"] or tasks["interleaved"]):
            raise ValueError(f"max_frames {self.max_frames} is for --image and --interleaved; for drawing, use frames")

    @property
    def new_tokens(self) -> int:
        """`max_new_tokens`, or the task's default."""
        return self.max_new_tokens or (STREAM_TOKENS if self.interleaved else TEXT_TOKENS)

    def sampling(self) -> Sampling:
        """The settings for sampling, with the task's defaults."""
        lwm, draws = self.prompt_form == "lwm", self.draw is not None
        if lwm:
            return self._over(lwm_prompts.PICTURE if draws else lwm_prompts.CHAT)
        likeliest = bool(self.image) and not self.interleaved
        return self._over(Sampling(temperature=0.0 if likeliest else 0.7, guidance=2.0 if draws else 1.0))

    def later_sampling(self) -> Sampling:
        """Of a clip's frames after the first in LWM's form: its own settings, but for what is given; no guidance."""
        return dataclasses.replace(self._over(lwm_prompts.CLIP), guidance=lwm_prompts.CLIP.guidance)

    def vision_sampling(self) -> Sampling:
        """Of the pictures within text: as the text, but LWM's own with its prompts, without guidance."""
        return self.later_sampling() if self.prompt_form == "lwm" else self.sampling()

    def _over(self, defaults: Sampling) -> Sampling:
        given = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "min_p", "guidance")}
        given = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(defaults, **given, seed=self.seed, repetition_penalty=self.repetition_penalty)

    def text(self) -> str:
        """The words to begin with. Raises FileNotFoundError or ValueError for a file that is not there or not text."""
        if self.prompt_file is None:
            return self.prompt
        try:
            text = Path(self.prompt_file).read_text("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.prompt_file} is not UTF-8 text: {error}") from None
        if not text.strip():
            raise ValueError(f"{self.prompt_file} is empty; there is nothing to begin with")
        return text
