"""The methods by name, over one loaded model: its weights are shared, its config differs.

exact    ntk  yarn  linear    window  sinks    flat  hnsw  lsh
"""

import dataclasses
import math
from typing import Literal

from ringjax.evaluation.question import Cell, Task
from ringjax.evaluation.reading import WholeContext
from ringjax.evaluation.retrieval import INDEXES, Chunks, ModelEmbedding, Retrieval, SentenceEncoder
from ringjax.evaluation.rope_change import KINDS, rope_changes
from ringjax.inference.text_model import TextModel
from ringjax.models.transformer import with_config

Method = Literal["exact", "ntk", "yarn", "linear", "window", "sinks", "flat", "hnsw", "lsh"]


@dataclasses.dataclass(frozen=True)
class MethodOptions:
    """What the methods need beside their name."""

    window: int = 1024
    sinks: int = 4
    rope_factor: float | None = None
    """Of ntk, yarn and linear; None: as much as a length needs."""
    chunks: Chunks = dataclasses.field(default_factory=Chunks)
    embed: str = "model"
    """`model`, or a sentence encoder."""
    allow_beyond: bool = False
    """Whether lengths beyond the context are read anyhow."""


class Methods:
    """Opens a method at a length. `context` is what the model can read; inf where the user has taken care of it."""

    def __init__(self, model: TextModel, options: MethodOptions, context: float):
        self.model, self.options, self.context = model, options, context
        self._embedding = None

    def check(self, method: Method, length: int) -> None:
        """Raises ValueError where a prompt is beyond what the model was trained for, with the ways out."""
        options, chunks = self.options, self.options.chunks
        needed, what = length, f"length {length}"
        if method in INDEXES:
            needed = chunks.top * chunks.chunk_tokens
            what = f"top {chunks.top} chunks of {chunks.chunk_tokens} tokens"
        if method == "window":
            needed, what = min(options.window, length), f"window {options.window}"
        context = self.context * (self._factor(length) if method in KINDS else 1)
        if needed > context and not options.allow_beyond:
            raise ValueError(
                f"{what} is beyond the model's context of {context:g} tokens (method {method}); stretch its RoPE"
                " (--method ntk, yarn or linear, or --rope_theta / --rope_scaling for every method), or see what"
                " happens with --allow_beyond true"
            )

    def model_for(self, method: Method, length: int) -> TextModel:
        """The model whose attention is the method's."""
        options = self.options
        changes: dict[str, object] = {}
        if method in KINDS:
            changes = rope_changes(self.model.model.config, self.model.context, method, self._factor(length))
        elif method == "window":
            changes = {"window": options.window}
        elif method == "sinks":
            changes = {"window": options.window, "sinks": options.sinks}
        if not changes:
            return self.model
        return dataclasses.replace(self.model, model=with_config(self.model.model, **changes))

    def open(self, method: Method, length: int, task: Task, cell: Cell):
        """A reader with `read` and `force`; `cell` is one of those that it will be asked."""
        model = self.model_for(method, length)
        if method not in INDEXES:
            return WholeContext(model, length, task.max_new_tokens)
        question = task.ask(cell)
        words = 2 * (len(question.before) + len(question.after))  # names differ in length
        return Retrieval(model, method, self._embed(), self.options.chunks, words, task.max_new_tokens)

    def _factor(self, length: int) -> float:
        if self.options.rope_factor is not None:
            return self.options.rope_factor
        return max(1.0, float(math.ceil(length / self.model.context)))

    def _embed(self):
        if self._embedding is None:
            name = self.options.embed
            width = self.options.chunks.chunk_tokens
            model = self.model
            self._embedding = ModelEmbedding(model, width) if name == "model" else SentenceEncoder(name, model)
        return self._embedding
