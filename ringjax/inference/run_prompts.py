"""The prompts of a run, in the form in which it was trained: the example language of `ringjax.data.fields`.

text       <s> words
see        <s> <vision> codes </vision> … words
picture    <s> words <vision>                    a clip alike: its frames come one after the other
drawn      <s> words <vision> codes              what is learned of it
wordless   <s> <vision>                          what guidance compares with
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from ringjax.data.config import DataConfig
from ringjax.data.example import Example, see_whole_frames
from ringjax.data.fields import FieldEncoder
from ringjax.data.tokenizers import VISION_START, TextTokenizer
from ringjax.inference.prompts import append_text, drawn_after, text_prompt


@dataclasses.dataclass(frozen=True)
class RunPrompts:
    """The forms in the ids of a run's tokenizer."""

    tokenizer: TextTokenizer
    data: DataConfig

    def text(self, words: str) -> Example:
        """What goes on."""
        return text_prompt([self.tokenizer.bos_id, *(self.tokenizer.encode(words) if words else [])])

    def see(self, clips: Sequence[Int[np.ndarray, "frames codes"]], words: str) -> Example:
        """Pictures (one frame) and clips, and words after them."""
        row = {f"vision{number}": clip.ravel() for number, clip in enumerate(clips)}
        seen = self._encoder.encode(row, ",".join(f"[{name}]" for name in row))
        if self.data.bidirectional_frames:
            seen = see_whole_frames(seen, self.data.vision_codes)
        return append_text(seen, self.tokenizer.encode(words) if words else [])

    def picture(self, words: str) -> Example:
        """What a picture or clip is drawn after."""
        return append_text(self._encoder.encode({"words": words}, "[words]"), self.tokenizer.marker(VISION_START))

    def drawn(self, words: str, clip: Int[np.ndarray, "frames codes"]) -> Example:
        """A picture (one frame) or clip after the words that it is drawn after; its codes bear loss."""
        return drawn_after(self.picture(words), clip, self.data.vision_codes)

    def wordless(self) -> Example:
        """What guidance compares with."""
        return append_text(self.text(""), self.tokenizer.marker(VISION_START))

    @property
    def _encoder(self) -> FieldEncoder:
        return FieldEncoder(
            self.tokenizer, codes_per_frame=self.data.codes_per_frame, vision_codes=self.data.vision_codes,
            separator=self.data.separator, add_bos=self.data.add_bos, add_eos=False,
        )  # fmt: skip
