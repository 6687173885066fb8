"""A published model that writes: its weights, its tokenizer and its chat template together."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax

from ringjax.inference import room
from ringjax.inference.chat_template import BUILT_IN, ChatTemplate, Message, special_tokens
from ringjax.inference.sampling import Sampling
from ringjax.inference.session import Session
from ringjax.inference.stop_tokens import stop_token_ids
from ringjax.inference.streaming import stream_text
from ringjax.inference.vocabulary import Vocabulary
from ringjax.interop.published import Published
from ringjax.interop.runs import open_model
from ringjax.models.cache import CacheType
from ringjax.models.parallel import Parallel
from ringjax.models.transformer import Transformer, for_decoding

_ONE_DEVICE = Parallel()


@dataclasses.dataclass(frozen=True)
class TextModel:
    """A model with what it takes to talk to it. `stop_ids` end an answer; `context` is what it was trained for."""

    model: Transformer
    vocabulary: Vocabulary
    template: ChatTemplate | None
    stop_ids: tuple[int, ...]
    context: int
    parallel: Parallel = _ONE_DEVICE

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        parallel: Parallel = _ONE_DEVICE,
        dtype: str | None = None,
        template: str | None = None,
        changes: Mapping[str, object] | None = None,
        stage: str | None = None,
        adapter: str | Path | None = None,
    ) -> "TextModel":
        """The model at `path` in `dtype` (None: bfloat16, but float32 on CPUs, which are slower with less).

        `stage` is of a run, and `adapter` a folder in PEFT's form, which is merged in. `template` is a file with a
        chat template or one of `chatml` and `lwm`; None: the model's own. `changes` replace fields of its config that
        alter no shape (rope_theta, rope_scaling, window, …). Raises FileNotFoundError, ValueError or
        NotImplementedError where a part is missing, damaged or not supported.
        """
        dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        published = open_model(path, stage, adapter)
        vocabulary = Vocabulary.of(published)
        found = _template(template, published)
        size = published.description.config.vocab_size
        beyond = [name for name, i in vocabulary.specials.items() if i >= size]
        if beyond:
            raise ValueError(f"{path}: tokens {', '.join(beyond[:4])} are beyond the model's vocabulary of {size}")
        model = for_decoding(published.load(parallel, dtype=dtype, param_dtype=dtype, **(changes or {})))
        stops = published.description.eos_ids
        return cls(model, vocabulary, found, stops, published.description.context, parallel)

    def session(
        self, capacity: int | None = None, *, option: str = "--context", cache_type: CacheType | None = None
    ) -> Session:
        """An empty cache with room for at least so many tokens (None: the model's context, or what of it fits well).

        Raises ValueError for a cache that does not fit into memory, saying what would; `option` is how people ask
        for less.
        """
        step = 2 * self.parallel.ring_size  # what every layout can cut
        if capacity is None:
            fits = room.comfortable(self.model.config, self.parallel, cache_type)
            capacity = self.context if fits is None else max(step, min(self.context, fits))
        capacity = -(-capacity // step) * step
        return Session(self.model, capacity, self.parallel, option=option, cache_type=cache_type)

    def write(
        self,
        session: Session,
        ids: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        stops: Sequence[str] = (),
        stop_tokens: Sequence[str] = (),
    ) -> Iterator[str]:
        """The text after `ids` in pieces, up to a text of `stops`, a special token of `stop_tokens` or the model's end.

        What the session holds of the beginning already is not computed again.
        """
        stop_ids = (*self.stop_ids, *self.stops_of(stop_tokens))
        kept = session.rewind(min(_common(session.ids, ids), len(ids) - 1))
        tokens = session.generate(ids[kept:], max_new_tokens=max_new_tokens, stop_ids=stop_ids, sampling=sampling)
        return stream_text(tokens, self.vocabulary.whole_text, stops)

    def stops_of(self, names: Sequence[str]) -> tuple[int, ...]:
        """The ids of special tokens; raises ValueError for one that the tokenizer doesn't have."""
        return stop_token_ids(names, self.vocabulary.specials)

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """A conversation up to where the answer begins. Raises ValueError without a chat template."""
        if self.template is None:
            raise ValueError(
                f"this model has no chat template; name one: --template {' | '.join(BUILT_IN)}, or a file of its own"
            )
        contents = [message["content"] for message in messages]
        return self.vocabulary.encode_template(self.template.render(messages), contents)


def _template(wanted: str | None, published: Published) -> ChatTemplate | None:
    if wanted is None:
        try:
            return ChatTemplate.of(published.settings)
        except ValueError as error:
            raise ValueError(f"{published.path}: {error}") from None
    tokens = special_tokens(published.settings)
    if wanted in BUILT_IN:
        return ChatTemplate(BUILT_IN[wanted], tokens)
    if not Path(wanted).is_file():
        raise FileNotFoundError(f"template {wanted!r} is neither {' nor '.join(BUILT_IN)} nor a file")
    try:
        return ChatTemplate(Path(wanted).read_text("utf-8"), tokens)
    except UnicodeDecodeError as error:
        raise ValueError(f"template {wanted} is not UTF-8 text (byte {error.start})") from None


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids at the beginning are the same."""
    for place, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return place
    return min(len(a), len(b))
