"""A published LLaVA that answers questions about pictures."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from ringjax.attention import Reach, layouts
from ringjax.data.pictures import flatten, open_picture
from ringjax.inference.prompts import PromptBatch, batch_prompts, text_prompt
from ringjax.inference.sampling import Sampling, sample
from ringjax.inference.session import Session
from ringjax.inference.vocabulary import Vocabulary
from ringjax.interop.llava import load_llava, read_folder_preprocessing, read_llava
from ringjax.interop.published import Published
from ringjax.models.cache import KVCache
from ringjax.models.clip import Preprocessing
from ringjax.models.features import Features, feature_index
from ringjax.models.llava import Llava, check_images
from ringjax.models.parallel import Parallel
from ringjax.models.transformer import for_decoding

IMAGE = "<image>"
_ONE_DEVICE = Parallel()
_GREEDY = Sampling(temperature=0)

Picture = str | Path | Image.Image | UInt8[np.ndarray, "H W 3"]


@dataclasses.dataclass(frozen=True)
class LlavaModel:
    """A LLaVA with what it takes to ask it. `stop_ids` end an answer; `context` is what it was trained for."""

    model: Llava
    prepare: Preprocessing
    vocabulary: Vocabulary
    stop_ids: tuple[int, ...]
    context: int
    parallel: Parallel = _ONE_DEVICE

    @classmethod
    def load(
        cls, path: str | Path, *, parallel: Parallel = _ONE_DEVICE, dtype: str | None = None
    ) -> "LlavaModel":
        """The model of a Hugging Face folder in `dtype` (None: bfloat16, but float32 on CPUs).

        Raises FileNotFoundError, ValueError or NotImplementedError where a part is missing, damaged or not supported.
        """
        path = Path(path)
        dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        described = read_llava(path)
        vocabulary = Vocabulary.of(Published(path, described.text, path, _not_loaded))
        found, wanted = vocabulary.encode_template(IMAGE, []), [described.config.image_token]
        if found != wanted:
            raise ValueError(f"{path}: {IMAGE} is ids {found} in the tokenizer and {wanted} in config.json")
        prepare = read_folder_preprocessing(path, described.config)
        model = load_llava(path, parallel, dtype=dtype, param_dtype=dtype)
        model.language = for_decoding(model.language)
        return cls(model, prepare, vocabulary, described.text.eos_ids, described.text.context, parallel)

    def answer(
        self, images: Sequence[Picture], prompt: str, *, max_new_tokens: int = 256, sampling: Sampling = _GREEDY
    ) -> str:
        """What the model says to a question about pictures, in LLaVA-1.5's turns: `USER: … ASSISTANT:`.

        `prompt` may say where the pictures are, an `<image>` for each; without, they come first. Raises ValueError for
        a file that is no picture, marks that are not as many as pictures, a text that holds a special token or
        is too long. The answer ends at `max_new_tokens`, or where the context is full.
        """
        if IMAGE not in prompt:
            prompt = f"{IMAGE}\n" * len(images) + prompt
        return self.complete(images, f"USER: {prompt} ASSISTANT:", max_new_tokens=max_new_tokens, sampling=sampling)

    def complete(
        self, images: Sequence[Picture], text: str, *, max_new_tokens: int = 256, sampling: Sampling = _GREEDY
    ) -> str:
        """What comes after `text`, in which an `<image>` stands for each picture; raises as `answer` does."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {max_new_tokens} must be at least 1")
        if sampling.guidance != 1:
            raise ValueError(f"guidance {sampling.guidance} is not for answers about pictures; use 1")
        ids = self.prompt_ids(text, len(images))
        room = self.context - len(ids)
        if room < 1:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, {self.model.config.features} of them a picture, which leave no room"
                f" in the context of {self.context}; ask about fewer pictures, or with fewer words"
            )
        pixels = [self.prepare(read_picture(image, i)) for i, image in enumerate(images)]
        tokens = self._generate(ids, pixels, min(max_new_tokens, room), sampling)
        return self.vocabulary.decode(tokens).strip()

    def prompt_ids(self, text: str, pictures: int) -> list[int]:
        """The ids of a text, with the image tokens of each picture where its `<image>` is."""
        parts = text.split(IMAGE)
        if len(parts) - 1 != pictures:
            raise ValueError(f"the prompt has {len(parts) - 1} {IMAGE} for {pictures} pictures; give one for each")
        ids = self.vocabulary.encode_template(text, parts)
        bos, image = self.vocabulary.bos_id, self.model.config.image_token
        begin = [] if bos is None else [bos]
        return begin + [i for token in ids for i in [token] * (self.model.config.features if token == image else 1)]

    def _generate(self, ids: list[int], pixels: list[np.ndarray], new: int, sampling: Sampling) -> list[int]:
        """Tokens after `ids`, less the one of `stop_ids` that ends them."""
        rows = self.parallel.size("dp", "fsdp")  # every group of devices has the same row
        batch, capacity = batch_prompts([text_prompt(ids)] * rows, new, self.parallel)
        check_images(batch.tokens, self.model.config, [len(pixels)] * rows)
        index = feature_index(batch.tokens, self.model.config.image_token)
        graph, params = nnx.split(self.model)
        pictures = np.stack([np.stack(pixels)] * rows) if pixels else None
        token, cache = _prefill(
            params, batch, index, pictures, graph=graph, capacity=capacity, sampling=sampling, parallel=self.parallel
        )
        session = Session(self.model.language, capacity, self.parallel)
        found = list(session.adopt(
            ids, cache, token, max_new_tokens=new, stop_ids=self.stop_ids, sampling=sampling
        ))  # fmt: skip
        return found[:-1] if found[-1] in self.stop_ids else found


def read_picture(image: Picture, place: int = 0) -> UInt8[np.ndarray, "H W 3"]:
    """A picture upright in RGB on white, from a file, Pillow's or an array; raises ValueError for anything else."""
    if isinstance(image, str | Path):
        return np.asarray(open_picture(image, 3, "white"))
    if isinstance(image, Image.Image):
        return np.asarray(flatten(image, 3, "white"))
    if isinstance(image, np.ndarray):
        return image
    raise ValueError(f"image {place} is a {type(image).__name__}; give a path, a PIL image or uint8 [H, W, 3]")


def _not_loaded(*_):
    raise NotImplementedError("a LLaVA is loaded by load_llava")


@functools.partial(jax.jit, static_argnames=("graph", "capacity", "sampling", "parallel"))
def _prefill(
    params, batch: PromptBatch, index: Int[Array, "B T"], pixels: Float[Array, "B I H W C"] | None, *, graph,
    capacity: int, sampling: Sampling, parallel: Parallel,
) -> tuple[Int[Array, "1 1"], KVCache]:  # fmt: skip
    """The first token of a row (all are one), and its cache."""
    model, order = nnx.merge(graph, params), layouts.get(parallel.layout)
    place = jnp.broadcast_to(jnp.arange(batch.size, dtype=jnp.int32), batch.tokens.shape)
    in_order = batch.tokens, batch.modality, place, index
    tokens, modality, positions, index = (order.permute(x, parallel.ring_size, axis=1) for x in in_order)
    features = None if pixels is None else Features(model.image_features(pixels, parallel), index)
    reach = Reach(positions, jnp.zeros_like(positions), max_ahead=0)
    hidden, cache = model.language.prefill(
        tokens, modality, positions, reach, cache_length=capacity, lengths=batch.lengths, features=features,
        parallel=parallel,
    )  # fmt: skip
    at_end = positions == batch.lengths[:, None] - 1
    last = jnp.sum(jnp.where(at_end[..., None], hidden, 0), axis=1)
    cache = cache.with_arrays((x[:, :1] for x in cache.arrays), cache.lengths[:1])
    # The place of the token, as in a session: answers depend on the seed and nothing else.
    key = jax.random.fold_in(jax.random.key(sampling.seed), cache.lengths[0])
    return sample(model.language.text_logits(last[:1]), key[None], sampling)[None], cache
