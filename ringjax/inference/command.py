"""`ringjax generate RUN_DIR`: text after text, words for a picture, a picture from words."""

import dataclasses
from pathlib import Path
from typing import Literal

from ringjax.inference.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Continue a text, put a picture into words (--picture), or draw a picture from words (--draw)."""

    run_dir: str
    """The folder of a run that `ringjax train` made."""
    prompt: str = ""
    """The words to begin with, or to draw."""
    picture: str | None = None
    """A picture file that comes before the prompt."""
    draw: str | None = None
    """Draw a picture from the prompt and write it to this .png file."""
    max_new_tokens: int = 64
    """Text tokens to write at most."""
    temperature: float | None = None
    """Logits are divided by it, 0: always the most likely token; null: 0 for pictures in words, otherwise 0.7."""
    top_k: int | None = None
    """Only the k most likely tokens."""
    top_p: float | None = None
    """Only the most likely tokens that together reach this probability."""
    guidance: float | None = None
    """For drawing: how much the words count, 1: as in training; null: 2."""
    seed: int = 0
    """Of the random numbers."""
    image_tokenizer: str | None = None
    """A VQGAN .safetensors, or `sample` for the digits' own (the default of runs trained on them)."""
    fit: Literal["crop", "pad", "centre"] = "centre"
    """How a picture becomes square: its middle, padded, or left at its size (no larger than the tokenizer's)."""

    def __post_init__(self):
        if self.picture is not None and self.draw is not None:
            raise ValueError("picture and draw are two different tasks; give one of them")
        if self.draw is not None and not self.prompt:
            raise ValueError("draw needs a prompt: the words to draw, for instance --prompt seven")
        if self.draw is not None and Path(self.draw).suffix.lower() != ".png":
            raise ValueError(f"draw {self.draw!r} must be the name of a .png file")
        if self.picture is None and self.draw is None and not self.prompt:
            raise ValueError("nothing to begin with; give --prompt, or --picture")
        if self.guidance is not None and self.draw is None:
            raise ValueError(f"guidance {self.guidance} is for drawing only; leave it out, or give --draw")

    def sampling(self) -> Sampling:
        """The settings for sampling, with the task's defaults."""
        temperature = self.temperature
        if temperature is None:
            temperature = 0.0 if self.picture is not None else 0.7
        guidance = 1.0 if self.draw is None else 2.0 if self.guidance is None else self.guidance
        return Sampling(temperature, self.top_k, self.top_p, guidance, self.seed)


def run_generate(config: GenerateConfig) -> str:
    """Do what the config asks; gives what to print.

    Raises ValueError for a wrong or damaged picture, FileNotFoundError for a folder without a run.
    """
    from ringjax.inference.trained import TrainedRun

    sampling = config.sampling()
    run = TrainedRun.load(config.run_dir, image_tokenizer=config.image_tokenizer)
    if config.draw is not None:
        return _draw(run, config, sampling)
    if config.picture is None:
        text = run.continue_text([config.prompt], max_new_tokens=config.max_new_tokens, sampling=sampling)[0]
        return config.prompt + text
    return _describe(run, config, sampling)


def _describe(run, config: GenerateConfig, sampling: Sampling) -> str:
    from ringjax.data.pictures import read_frames

    size = run.vqgan.config
    frames = read_frames(config.picture, size.resolution, channels=size.channels, fit=config.fit, max_frames=1)
    codes = run.to_codes(frames)
    words = run.describe(codes, prompt=config.prompt, max_new_tokens=config.max_new_tokens, sampling=sampling)
    return words[0].strip()


def _draw(run, config: GenerateConfig, sampling: Sampling) -> str:
    from PIL import Image

    picture = run.to_pictures(run.draw([config.prompt], sampling=sampling))[0]
    Image.fromarray(picture).save(config.draw)
    return f"{config.draw}: {picture.shape[1]} × {picture.shape[0]} pixels"
