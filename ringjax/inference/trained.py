"""A trained run: continues text, puts pictures into words, draws from words, and writes both in one stream."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int, UInt8

from ringjax.data.codes import SAMPLE, vision_tokenizer_path
from ringjax.data.config import DataConfig
from ringjax.data.example import Example
from ringjax.data.pictures import Fit
from ringjax.data.tokenizers import VISION_END, VISION_START, TextTokenizer, load_tokenizer
from ringjax.inference import lwm_prompts
from ringjax.inference.generate import generate_frames, generate_text
from ringjax.inference.interleaved import generate_interleaved
from ringjax.inference.lwm_prompts import LwmPrompts
from ringjax.inference.pieces import Piece, Text
from ringjax.inference.run_prompts import RunPrompts
from ringjax.inference.sampling import Sampling
from ringjax.inference.stop_tokens import stop_token_ids
from ringjax.interop.release import is_release, load_release
from ringjax.interop.runs import Checkpoint
from ringjax.models.parallel import Parallel
from ringjax.models.transformer import Transformer
from ringjax.models.vqgan import VQGAN, decode_pictures, encode_pictures, load_vqgan, vqgan_fingerprint
from ringjax.training.run_folder import CODES_OF

_ONE_DEVICE = Parallel()
_LIKELIEST = Sampling(temperature=0)
_DIGIT_PIXELS = 28

PromptForm = Literal["own", "lwm"]


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A model with the tokenizers that it was trained with.

    The prompts are those of training (`ringjax.inference.run_prompts`), or LWM's.
    """

    model: Transformer
    data: DataConfig
    parallel: Parallel = _ONE_DEVICE
    image_tokenizer: str | None = None
    """A VQGAN .safetensors, or `sample` for the digits' own; None: `sample` where the run was trained on the digits."""
    prompt_form: PromptForm = "own"
    """How the model is asked: as it was trained here, or in LWM's words (`ringjax.inference.lwm_prompts`)."""
    codes_of: str | None = None
    """The fingerprint of the image tokenizer that it was trained with; None: not known."""

    @classmethod
    def load(
        cls,
        run_dir: str | Path,
        *,
        stage: str | None = None,
        parallel: Parallel = _ONE_DEVICE,
        image_tokenizer: str | None = None,
        prompt_form: PromptForm = "own",
    ) -> "TrainedRun":
        """The last whole checkpoint of a run, or of its `stage`; or a released model (`ringjax.interop.release`).

        Raises CheckpointError where there is none, FileNotFoundError where there is no such folder, ValueError for a
        stage of a released model.
        """
        if is_release(run_dir):
            if stage is not None:
                raise ValueError(f"stage {stage!r} is for a run, and {run_dir} is a released model; leave it out")
            released = load_release(run_dir, parallel)
            return cls(released.model, released.data, parallel, image_tokenizer, prompt_form, released.codes_of)
        found = Checkpoint.find(run_dir, stage)
        codes_of = found.info.get("notes", {}).get(CODES_OF)
        return cls(found.load(parallel=parallel), found.data, parallel, image_tokenizer, prompt_form, codes_of)

    @functools.cached_property
    def tokenizer(self) -> TextTokenizer:
        """Of text."""
        return load_tokenizer(self.data.tokenizer)

    @functools.cached_property
    def vqgan(self) -> VQGAN:
        """The image tokenizer. Raises ValueError where none is named, or it does not fit the run."""
        self.require_vision()
        name = self.image_tokenizer or self.data.vision_tokenizer
        if name is None and any(source.path == "sample:digits" for source in self.data.sources):
            name = SAMPLE
        if name is None:
            raise ValueError("the run does not say which image tokenizer made its codes; name it: --image_tokenizer")
        model = load_vqgan(vision_tokenizer_path(name))
        config = model.config
        if config.codes_per_picture != self.data.codes_per_frame or config.codes > self.data.vision_codes:
            raise ValueError(
                f"image tokenizer {name!r} has {config.codes_per_picture} codes a picture of {config.codes} and the run"
                f" was trained with codes_per_frame {self.data.codes_per_frame} and vision_codes"
                f" {self.data.vision_codes}; name the one that made its data"
            )
        made = vqgan_fingerprint(model)
        if self.codes_of not in (None, made):
            raise ValueError(
                f"image tokenizer {name!r} ({made[:12]}) is not the one that made the codes of the run's data"
                f" ({self.codes_of[:12]}): it would show and see something else; name that one"
            )
        return model

    @functools.cached_property
    def prompts(self) -> RunPrompts | LwmPrompts:
        """Words and pictures in the form that the model knows."""
        if self.prompt_form == "own":
            return RunPrompts(self.tokenizer, self.data)
        data = self.data
        return LwmPrompts(self.tokenizer, data.codes_per_frame, data.vision_codes, data.bidirectional_frames)

    def continue_text(
        self, texts: Sequence[str], *, max_new_tokens: int, sampling: Sampling, stop_tokens: Sequence[str] = ()
    ) -> list[str]:
        """What the model writes after each text, up to the end token or one of the special `stop_tokens`."""
        return self._text([self.prompts.text(text) for text in texts], max_new_tokens, sampling, stop_tokens)

    def describe(
        self,
        codes: Int[np.ndarray, "n codes"],
        *,
        prompt: str = "",
        max_new_tokens: int = 16,
        sampling: Sampling = _LIKELIEST,
    ) -> list[str]:
        """What the model writes after each picture (and the prompt after it), up to the end token."""
        return self._text([self.prompts.see([row[None]], prompt) for row in codes], max_new_tokens, sampling, ())

    def answer(
        self,
        clips: Sequence[Int[np.ndarray, "frames codes"]],
        *,
        prompt: str = "",
        max_new_tokens: int = 16,
        sampling: Sampling = _LIKELIEST,
        stop_tokens: Sequence[str] = (),
    ) -> str:
        """What the model writes after all of these pictures (of one frame) and clips, and the prompt."""
        return self._text([self.prompts.see(clips, prompt)], max_new_tokens, sampling, stop_tokens)[0]

    def write(
        self,
        texts: Sequence[str],
        *,
        clips: Sequence[Int[np.ndarray, "frames codes"]] = (),
        max_new_tokens: int,
        sampling: Sampling,
        vision_sampling: Sampling | None = None,
        max_frames: int | None = None,
        stop_tokens: Sequence[str] = (),
    ) -> list[list[str | Int[np.ndarray, "frames codes"]]]:
        """Text and pictures after each text (and the `clips` before it), as the model wants them.

        In order: text as `str`, a picture or clip as codes, a frame a row. See `generate_interleaved`.
        """
        self.require_vision()
        prompts = [self.prompts.see(clips, text) if clips else self.prompts.text(text) for text in texts]
        written = generate_interleaved(
            self.model, prompts, max_new_tokens=max_new_tokens, codes_per_frame=self.data.codes_per_frame,
            vision_start=self.tokenizer.marker(VISION_START), vision_end=self.tokenizer.marker(VISION_END),
            max_frames=max_frames, stop_ids=self._stops(stop_tokens), sampling=sampling,
            vision_sampling=vision_sampling, parallel=self.parallel,
        )  # fmt: skip
        return [[self._part(piece) for piece in row.pieces] for row in written]

    def draw(self, words: Sequence[str], *, sampling: Sampling) -> Int[np.ndarray, "n codes"]:
        """The codes of a picture for each of `words`; with guidance, compared with a picture without words."""
        return self.draw_clips(words, 1, sampling=sampling)[:, 0]

    def draw_clips(
        self, words: Sequence[str], frames: int, *, sampling: Sampling, later: Sampling | None = None
    ) -> Int[np.ndarray, "n frames codes"]:
        """The codes of a clip for each of `words`.

        In LWM's form the first frame is drawn as a picture, and the `later` ones after it by settings of their own
        (None: LWM's, with the seed of `sampling`).
        """
        self.require_vision()
        lwm = isinstance(self.prompts, LwmPrompts) and frames > 1
        found = self._frames([self.prompts.picture(text) for text in words], 1 if lwm else frames, sampling)
        if lwm:
            later = later or dataclasses.replace(lwm_prompts.CLIP, seed=sampling.seed)
            begun = [self.prompts.clip(text, first) for text, first in zip(words, found[:, 0])]
            found = np.concatenate([found, self._frames(begun, frames - 1, later)], axis=1)
        return self._usable(found)

    def require_vision(self) -> None:
        """Raises ValueError for a model without pictures."""
        if self.model.vte is None:
            raise ValueError(
                "this run is a model of text (vision_vocab_size 0), which neither sees nor draws pictures; leave them"
                " out, or name a run that was trained on pictures"
            )

    def to_codes(self, pictures: UInt8[np.ndarray, "n H W *C"]) -> Int[np.ndarray, "n codes"]:
        """Pictures as codes."""
        return encode_pictures(self.vqgan, pictures).reshape(len(pictures), -1)

    def to_pictures(self, codes: Int[np.ndarray, "n codes"]) -> UInt8[np.ndarray, "n H W *C"]:
        """Codes as pictures; the digits' own tokenizer gives them without the border that it puts around them."""
        grid = self.vqgan.config.grid
        return decode_pictures(self.vqgan, codes.reshape(len(codes), grid, grid), size=self._size)

    @property
    def fit(self) -> Fit:
        """How a picture becomes what the image tokenizer takes: the digits' own is for small ones as they are."""
        return "crop" if self._size is None else "centre"

    @property
    def _size(self) -> int | None:
        config = self.vqgan.config
        return _DIGIT_PIXELS if config.channels == 1 and config.resolution == 32 else None

    def _text(
        self, prompts: list[Example], max_new_tokens: int, sampling: Sampling, stop_tokens: Sequence[str]
    ) -> list[str]:
        ids = generate_text(
            self.model, prompts, max_new_tokens=max_new_tokens, stop_ids=self._stops(stop_tokens), sampling=sampling,
            parallel=self.parallel,
        )  # fmt: skip
        return [self.tokenizer.decode(row.tolist()) for row in ids]

    def _stops(self, names: Sequence[str]) -> list[int]:
        return [self.tokenizer.eos_id, *stop_token_ids(names, self.tokenizer.specials)]

    def _frames(self, prompts: list[Example], frames: int, sampling: Sampling) -> Int[np.ndarray, "n frames codes"]:
        return generate_frames(
            self.model, prompts, codes_per_frame=self.data.codes_per_frame, frames=frames, sampling=sampling,
            unconditional=[self.prompts.wordless()] * len(prompts), parallel=self.parallel,
        )  # fmt: skip

    def _part(self, piece: Piece) -> str | Int[np.ndarray, "frames codes"]:
        if isinstance(piece, Text):
            return self.tokenizer.decode(piece.ids.tolist())
        return self._usable(piece.codes)

    def _usable(self, codes: Int[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
        """Ids past the codebook (the model may have room for more codes than there are) become code 0."""
        return np.where(codes < self.vqgan.config.codes, codes, 0)
