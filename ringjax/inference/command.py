"""`ringjax generate MODEL`: text after text, words for a picture, a picture from words."""

import dataclasses
from pathlib import Path
from typing import Literal

from ringjax.inference.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Continue a text, put a picture into words (--picture), or draw a picture from words (--draw)."""

    run_dir: str
    """The folder of a run that `ringjax train` made, a Hugging Face folder, or a .gguf file."""
    prompt: str = ""
    """The words to begin with, or to draw."""
    prompt_file: str | None = None
    """A text file to begin with, in place of `prompt`."""
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
    min_p: float | None = None
    """Only tokens at least this likely, as a share of the likeliest one."""
    stop: str | None = None
    """Published models: text that ends the answer; it is not printed."""
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
        if self.prompt and self.prompt_file is not None:
            raise ValueError("prompt and prompt_file both say how to begin; give one of them")
        if self.picture is None and self.draw is None and not self.prompt and self.prompt_file is None:
            raise ValueError("nothing to begin with; give --prompt, --prompt_file or --picture")
        if self.stop == "":
            raise ValueError("stop '' would end every answer at once; give some text, or leave it out")
        if self.guidance is not None and self.draw is None:
            raise ValueError(f"guidance {self.guidance} is for drawing only; leave it out, or give --draw")

    def sampling(self) -> Sampling:
        """The settings for sampling, with the task's defaults."""
        temperature = self.temperature
        if temperature is None:
            temperature = 0.0 if self.picture is not None else 0.7
        guidance = 1.0 if self.draw is None else 2.0 if self.guidance is None else self.guidance
        return Sampling(temperature, self.top_k, self.top_p, guidance, self.seed, self.min_p)

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


def run_generate(config: GenerateConfig) -> str:
    """Do what the config asks; gives what to print.

    Raises ValueError for a wrong or damaged picture, FileNotFoundError for a folder without a run.
    """
    from ringjax.inference.trained import TrainedRun
    from ringjax.interop.published import is_published

    sampling = config.sampling()
    if is_published(config.run_dir):
        return _continue(config, sampling)
    if config.stop is not None:
        raise ValueError(f"stop {config.stop!r} is for published models; a run's answers end at its end token")
    run = TrainedRun.load(config.run_dir, image_tokenizer=config.image_tokenizer)
    if config.draw is not None:
        return _draw(run, config, sampling)
    if config.picture is None:
        prompt = config.text()
        text = run.continue_text([prompt], max_new_tokens=config.max_new_tokens, sampling=sampling)[0]
        return prompt + text
    return _describe(run, config, sampling)


def _continue(config: GenerateConfig, sampling: Sampling) -> str:
    """Text by a published model, after the prompt as it is (a chat template is `ringjax chat`'s)."""
    from ringjax.inference.text_model import TextModel

    if config.picture is not None or config.draw is not None or config.image_tokenizer is not None:
        raise NotImplementedError(f"{config.run_dir} is a model of text; pictures need a run that was trained on them")
    prompt = config.text()
    model = TextModel.load(config.run_dir)
    ids = model.vocabulary.prompt(prompt)
    session = model.session(len(ids) + config.max_new_tokens)
    stops = () if config.stop is None else (config.stop,)
    pieces = model.write(session, ids, max_new_tokens=config.max_new_tokens, sampling=sampling, stops=stops)
    return prompt + "".join(pieces)


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
