"""What may come next in a stream of text and pictures, so that it is what training reads (`ringjax.data.fields`).

    text text <vision>   c c c c eof   c c c c eov   </vision>   text text …

    next         where                                     who says which
    -----------  ----------------------------------------  ---------------------------------------------------------
    text         everywhere else                           the text head
    a code       after <vision>, and within a frame        the vision head, codes only
    an end mark  after `codes_per_frame` codes             the vision head, end of frame or of vision; the latter
                                                           where `max_frames` is reached
    </vision>    after the end of the vision               nobody: training never has anything else there

`<vision>` and `</vision>` may be several text ids each, as in LWM. A state is a few numbers a row and depends on the
stream alone: `state_after` reads it off a prompt, `advance` takes it a token further.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from ringjax.data.example import Example

_NOTHING = -1


@dataclasses.dataclass(frozen=True)
class Grammar:
    """The rules. Raises ValueError where they contradict each other."""

    vision_start: tuple[int, ...]
    """The text ids that open vision."""
    vision_end: tuple[int, ...]
    """The text ids after it."""
    codes_per_frame: int
    end_of_frame: int
    end_of_vision: int
    max_frames: int | None = None
    """Frames of one clip at most; None: the model alone says when it ends."""

    def __post_init__(self):
        for name in ("vision_start", "vision_end"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; give the text ids that training puts around vision")
        size, end = len(self.vision_start), self.vision_end
        if any(end[i : i + size] == self.vision_start for i in range(len(end) - size + 1)):
            raise ValueError(f"vision_end {end} holds vision_start {self.vision_start}: vision would open again")
        for name in ("codes_per_frame", "max_frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} must be at least 1")


class State(NamedTuple):
    """Where each row of a batch is in its stream."""

    tail: Int[Array, "B k"]
    """The last text ids, as many as open vision; −1: none, or a vision id."""
    codes: Int[Array, " B"]
    """Codes of the frame that has begun; −1: in text."""
    frames: Int[Array, " B"]
    """Whole frames of the clip that has begun."""
    closing: Int[Array, " B"]
    """Ids of `</vision>` that come next."""

    @property
    def in_vision(self) -> Bool[Array, " B"]:
        """Whether the next token is a vision id."""
        return self.codes >= 0

    @property
    def in_text(self) -> Bool[Array, " B"]:
        """Whether the next token is text that the model chooses."""
        return (self.codes < 0) & (self.closing == 0)


def advance(state: State, token: Int[Array, " B"], grammar: Grammar) -> State:
    """The state after `token`, which is of the modality that the state says."""
    vision, ended = state.in_vision, state.in_vision & (token == grammar.end_of_vision)
    marked = vision & (state.codes == grammar.codes_per_frame)
    later = jnp.concatenate([state.tail[:, 1:], token[:, None]], axis=1)
    tail = jnp.where(vision[:, None], _NOTHING, later)
    opened = jnp.all(tail == jnp.asarray(grammar.vision_start), axis=1)
    inside = jnp.where(ended, -1, jnp.where(marked, 0, state.codes + 1))
    return State(
        tail=tail,
        codes=jnp.where(vision, inside, jnp.where(opened, 0, -1)),
        frames=jnp.where(vision & ~ended, state.frames + marked, 0),
        closing=jnp.where(ended, len(grammar.vision_end), jnp.maximum(state.closing - 1, 0)),
    )


def forced_text(state: State, grammar: Grammar) -> Int[Array, " B"]:
    """The id of `</vision>` that is next; of use where `closing` is above 0."""
    end = jnp.asarray(grammar.vision_end, jnp.int32)
    return end[jnp.clip(len(end) - state.closing, 0, len(end) - 1)]


def allowed_vision(state: State, ids: Int[Array, " V"], grammar: Grammar) -> Bool[Array, "B V"]:
    """Which vision ids may be next, of use where the row is in vision: codes, or the two end marks."""
    at_mark = (state.codes == grammar.codes_per_frame)[:, None]
    full = jnp.zeros_like(at_mark)
    if grammar.max_frames is not None:
        full = (state.frames + 1 >= grammar.max_frames)[:, None]
    marks = (ids == grammar.end_of_vision) | ((ids == grammar.end_of_frame) & ~full)
    return jnp.where(at_mark, marks, ids < grammar.end_of_frame)


def state_after(prompts: Sequence[Example], grammar: Grammar) -> State:
    """Where each prompt leaves its stream. Raises ValueError for one that ends within a frame that is too long."""
    rows = [_state_of(prompt, grammar, f"prompt {number}") for number, prompt in enumerate(prompts)]
    return State(*(np.array(field, np.int32) for field in zip(*rows)))


def _state_of(prompt: Example, grammar: Grammar, name: str) -> tuple[list[int], int, int, int]:
    start, run = grammar.vision_start, last_run(prompt)
    nothing = [_NOTHING] * len(start)
    if prompt.modality[-1]:
        if run[-1] == grammar.end_of_vision:
            return nothing, -1, 0, len(grammar.vision_end)
        marks = np.flatnonzero(run >= grammar.end_of_frame)
        codes = len(run) - 1 - marks[-1] if len(marks) else len(run)
        if codes > grammar.codes_per_frame:
            raise ValueError(
                f"{name} ends with {codes} codes and no end mark, and a frame has {grammar.codes_per_frame}; put the"
                " marks into it, or set codes_per_frame"
            )
        return nothing, int(codes), len(marks), 0
    closing, before = 0, len(prompt) - len(run) - 1
    if before >= 0 and prompt.tokens[before] == grammar.end_of_vision:
        closing = max(0, len(grammar.vision_end) - len(run))
        if tuple(run) != grammar.vision_end[: len(run)]:
            closing = 0  # it goes on in its own way
    tail = [*nothing, *run.tolist()][-len(start) :]
    return tail, 0 if tuple(tail) == start else -1, 0, closing


def last_run(prompt: Example) -> Int[np.ndarray, " n"]:
    """The tokens at the end that are of one modality."""
    changes = np.flatnonzero(np.diff(prompt.modality))
    return prompt.tokens[changes[-1] + 1 if len(changes) else 0 :]
