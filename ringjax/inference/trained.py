"""A trained run: continues text, puts pictures into words, draws pictures from words."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from ringjax.data.config import DataConfig
from ringjax.data.example import Example
from ringjax.data.fields import FieldEncoder
from ringjax.data.tokenizers import VISION_START, TextTokenizer, load_tokenizer
from ringjax.inference.generate import generate_frames, generate_text
from ringjax.inference.prompts import append_text, text_prompt
from ringjax.inference.sampling import Sampling
from ringjax.models.parallel import Parallel
from ringjax.models.transformer import Transformer
from ringjax.models.vqgan import VQGAN, decode_pictures, encode_pictures, load_vqgan
from ringjax.training.checkpoint import restore_model
from ringjax.training.load import load_config

SAMPLE = "sample"
_ONE_DEVICE = Parallel()
_LIKELIEST = Sampling(temperature=0)
_DIGIT_PIXELS = 28


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A model with the tokenizers that it was trained with.

    The prompts are those of training: `<s>`, then text, or `<vision> codes </vision>`, as the example language of
    `ringjax.data.fields` writes them.
    """

    model: Transformer
    data: DataConfig
    parallel: Parallel = _ONE_DEVICE
    image_tokenizer: str | None = None
    """A VQGAN .safetensors, or `sample` for the digits' own; None: `sample` where the run was trained on the digits."""

    @classmethod
    def load(
        cls, run_dir: str | Path, *, parallel: Parallel = _ONE_DEVICE, image_tokenizer: str | None = None
    ) -> "TrainedRun":
        """The last whole checkpoint of a run.

        Raises CheckpointError where there is none, FileNotFoundError where there is no such folder.
        """
        run_dir = Path(run_dir)
        if not (run_dir / "config.yaml").is_file():
            raise FileNotFoundError(f"{run_dir} is no run folder: it has no config.yaml; train first (ringjax train)")
        config = load_config(run_dir / "config.yaml")
        _, model = restore_model(run_dir, parallel=parallel)
        return cls(model, config.stage_list[-1].data, parallel, image_tokenizer)

    @functools.cached_property
    def tokenizer(self) -> TextTokenizer:
        """Of text."""
        return load_tokenizer(self.data.tokenizer)

    @functools.cached_property
    def vqgan(self) -> VQGAN:
        """The image tokenizer. Raises ValueError where none is named, or it does not fit the run."""
        from ringjax.data import samples

        name = self.image_tokenizer
        if name is None and any(source.path == "sample:digits" for source in self.data.sources):
            name = SAMPLE
        if name is None:
            raise ValueError("the run does not say which image tokenizer made its codes; name it: --image_tokenizer")
        model = load_vqgan(samples.path("digits_vqgan.safetensors") if name == SAMPLE else name)
        config = model.config
        if config.codes_per_picture != self.data.codes_per_frame or config.codes > self.data.vision_codes:
            raise ValueError(
                f"image tokenizer {name!r} has {config.codes_per_picture} codes a picture of {config.codes} and the run"
                f" was trained with codes_per_frame {self.data.codes_per_frame} and vision_codes"
                f" {self.data.vision_codes}; name the one that made its data"
            )
        return model

    def continue_text(self, texts: Sequence[str], *, max_new_tokens: int, sampling: Sampling) -> list[str]:
        """What the model writes after each text, up to the end token."""
        prompts = [text_prompt([self.tokenizer.bos_id, *self.tokenizer.encode(text)]) for text in texts]
        return self._write(prompts, max_new_tokens, sampling)

    def describe(
        self,
        codes: Int[np.ndarray, "n codes"],
        *,
        prompt: str = "",
        max_new_tokens: int = 16,
        sampling: Sampling = _LIKELIEST,
    ) -> list[str]:
        """What the model writes after each picture (and the prompt after it), up to the end token."""
        more = self.tokenizer.encode(prompt) if prompt else []
        prompts = [append_text(self._encoder.encode({"vision": row}, "[vision]"), more) for row in codes]
        return self._write(prompts, max_new_tokens, sampling)

    def draw(self, words: Sequence[str], *, sampling: Sampling) -> Int[np.ndarray, "n codes"]:
        """The codes of a picture for each of `words`; with guidance, compared with a picture without words."""
        start = self.tokenizer.marker(VISION_START)
        prompts = [append_text(self._encoder.encode({"words": text}, "[words]"), start) for text in words]
        wordless = [text_prompt([self.tokenizer.bos_id, *start])] * len(prompts)
        frames = generate_frames(
            self.model, prompts, codes_per_frame=self.data.codes_per_frame, sampling=sampling, unconditional=wordless,
            parallel=self.parallel,
        )  # fmt: skip
        return self._usable(frames[:, 0])

    def to_codes(self, pictures: UInt8[np.ndarray, "n H W *C"]) -> Int[np.ndarray, "n codes"]:
        """Pictures as codes."""
        return encode_pictures(self.vqgan, pictures).reshape(len(pictures), -1)

    def to_pictures(self, codes: Int[np.ndarray, "n codes"]) -> UInt8[np.ndarray, "n H W *C"]:
        """Codes as pictures; the digits' own tokenizer gives them without the border that it puts around them."""
        config = self.vqgan.config
        size = _DIGIT_PIXELS if config.channels == 1 and config.resolution == 32 else None
        return decode_pictures(self.vqgan, codes.reshape(len(codes), config.grid, config.grid), size=size)

    @property
    def _encoder(self) -> FieldEncoder:
        return FieldEncoder(
            self.tokenizer, codes_per_frame=self.data.codes_per_frame, vision_codes=self.data.vision_codes,
            separator=self.data.separator, add_bos=self.data.add_bos, add_eos=False,
        )  # fmt: skip

    def _write(self, prompts: list[Example], max_new_tokens: int, sampling: Sampling) -> list[str]:
        ids = generate_text(
            self.model, prompts, max_new_tokens=max_new_tokens, stop_ids=[self.tokenizer.eos_id], sampling=sampling,
            parallel=self.parallel,
        )  # fmt: skip
        return [self.tokenizer.decode(row.tolist()) for row in ids]

    def _usable(self, codes: Int[np.ndarray, "n codes"]) -> Int[np.ndarray, "n codes"]:
        """Ids past the codebook (the model may have room for more codes than there are) become code 0."""
        return np.where(codes < self.vqgan.config.codes, codes, 0)
