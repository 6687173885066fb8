"""The prompts and settings by which LWM's models are asked (Liu et al. 2024, arXiv:2402.08268; its released code).

    chat       <s>You are a helpful assistant. USER: {question} ASSISTANT:
    see        <s>You are a helpful assistant. USER: {question}\\n<vision> codes </vision> ASSISTANT:
    picture    <s>You are a helpful assistant. USER: Generate an image of {words} ASSISTANT: <vision>
    clip       <s>You are a helpful assistant. USER: Generate a video of {words} ASSISTANT: <vision> first frame
    wordless   <s><vision>                          what guidance compares with
    needle     <s>You are a helpful assistant. USER: {context} {question} Don't give … ASSISTANT:

`<s>` is the tokenizer's begin token, once, in front. `<vision>` and `</vision>` are no tokens of their own: LWM has
LLaMA's 32,000 text ids, and the words `<vision>` are encoded as text, alone, which gives the ids that they have behind
`ASSISTANT:` too. Vision ids are of the other table: 256 codes a frame, 8192 after every frame but the last, 8193 after
the last. The released code puts `<s>` before every part that it encodes; here it stands at the beginning only, as in
this library's data.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from ringjax.data.example import Example, see_whole_frames
from ringjax.data.tokenizers import VISION_END, VISION_START, TextTokenizer
from ringjax.inference.prompts import append_text, append_vision, drawn_after, text_prompt
from ringjax.inference.sampling import Sampling

ASSISTANT = "You are a helpful assistant. USER: "
ANSWER = " ASSISTANT:"
BRIEF = (
    "Don't give information outside the document or repeat your findings. Keep your response short and direct."
)  # fmt: skip

CHAT = Sampling(temperature=0.2)
PICTURE = Sampling(temperature=1.0, top_k=8192, guidance=5.0)
CLIP = Sampling(temperature=1.0, top_k=1000, guidance=1.0)
"""The frames after the first, which is drawn as a picture: without guidance the batch is not doubled."""
NEEDLE = Sampling(temperature=0)


@dataclasses.dataclass(frozen=True)
class LwmPrompts:
    """The forms in the ids of a tokenizer."""

    tokenizer: TextTokenizer
    codes_per_frame: int = 256
    end_of_frame: int = 8192
    bidirectional: bool = False
    """Whether the tokens of a frame that is looked at see all of it, as the run was trained."""

    def text(self, question: str) -> Example:
        """A question."""
        return self._begin(ASSISTANT + question + ANSWER)

    def see(self, clips: Sequence[Int[np.ndarray, "frames codes"]], question: str) -> Example:
        """A question about pictures (one frame) and clips."""
        prompt = self._begin(f"{ASSISTANT}{question}\n")
        for clip in clips:
            prompt = append_text(prompt, self.tokenizer.marker(VISION_START))
            prompt = append_vision(prompt, clip, self.end_of_frame)
            prompt = append_text(prompt, self.tokenizer.marker(VISION_END))
        if self.bidirectional:
            prompt = see_whole_frames(prompt, self.end_of_frame)
        return append_text(prompt, self.tokenizer.encode(ANSWER))

    def picture(self, words: str) -> Example:
        """What a picture is drawn after."""
        return self._open(f"{ASSISTANT}Generate an image of {words}{ANSWER}")

    def clip(self, words: str, first: Int[np.ndarray, " codes"]) -> Example:
        """What the frames of a clip after the first are drawn after."""
        return append_vision(self._film(words), first[None], self.end_of_frame, ends=False)

    def drawn(self, words: str, clip: Int[np.ndarray, "frames codes"]) -> Example:
        """A picture (one frame) or clip after the words that it is drawn after; its codes bear loss."""
        return drawn_after(self.picture(words) if len(clip) == 1 else self._film(words), clip, self.end_of_frame)

    def wordless(self) -> Example:
        """What guidance compares with."""
        return self._open("")

    def needle(self, context: str, question: str) -> Example:
        """A question about a long text."""
        return self._begin(f"{ASSISTANT}{context} {question} {BRIEF}{ANSWER} ")

    def _film(self, words: str) -> Example:
        return self._open(f"{ASSISTANT}Generate a video of {words}{ANSWER}")

    def _begin(self, text: str) -> Example:
        return text_prompt([self.tokenizer.bos_id, *(self.tokenizer.encode(text) if text else [])])

    def _open(self, text: str) -> Example:
        return append_text(self._begin(text), self.tokenizer.marker(VISION_START))
