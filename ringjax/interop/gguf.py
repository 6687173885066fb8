"""llama.cpp's GGUF: one file with metadata, the places of the tensors, and the tensors, most of them quantised.

`ringjax.data.gguf_header` reads what comes before the tensors; the library dequantises.
"""

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ringjax.data.gguf_header import GgufHeader, explained
from ringjax.interop.tensors import Index, listed
from ringjax.models.config import ModelConfig, RopeScaling

SPLIT_HALVES = {"llama": False, "qwen2": True}
"""The architectures that are read, and whether a head's pairs lie apart (llama.cpp's converter joins LLaMA's)."""

_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a tensor lies in the file. `kind` is the library's type, whose `block` numbers take `block_bytes`."""

    shape: tuple[int, ...]
    kind: Any
    block: int
    block_bytes: int
    start: int

    @property
    def size(self) -> int:
        return math.prod(self.shape) // self.block * self.block_bytes


class GgufSource:
    """The tensors and the metadata of a GGUF file; shapes are [out, in], numpy's order, which is GGUF's reversed.

    Raises ImportError without the library, ValueError for a cut or tampered file, and for a type of quantisation that
    the library cannot undo.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._library = _library()
        header = GgufHeader.read(self.path)
        self.metadata, self._bytes = header.metadata, header.content
        with explained(self.path):
            self._places = self._placed(header.tensors, header.size, len(self._bytes))
        self.shapes: dict[str, tuple[int, ...]] = {name: place.shape for name, place in self._places.items()}
        self._check_kinds()
        parts = self.metadata.get("split.count", 1)
        if type(parts) is not int or parts > 1:
            raise ValueError(f"{self.path} is one of {parts} parts; join them: llama-gguf-split --merge")

    def read(self, name: str, index: Index) -> np.ndarray:
        """The part of tensor `name` at `index`, one slice an axis; float32 where it is quantised.

        Only the blocks that the part touches are dequantised; they lie along the last axis.
        """
        place = self._places[name]
        raw = self._bytes[place.start : place.start + place.size]
        if place.kind.name in _FLOATS:
            return np.array(raw.view(_FLOATS[place.kind.name]).reshape(place.shape)[index])
        kept = [range(size)[axis] for axis, size in zip(index, place.shape, strict=True)]
        if not all(kept):
            return np.zeros([len(axis) for axis in kept], np.float32)
        least, most = min(kept[-1]), max(kept[-1])
        first, last = least // place.block, most // place.block + 1
        blocks = raw.reshape(*place.shape[:-1], -1, place.block_bytes)[(*index[:-1], slice(first, last))]
        part = self._library.quants.dequantize(blocks.reshape(*blocks.shape[:-2], -1), place.kind)
        start = first * place.block
        return part[..., least - start : most + 1 - start][..., :: kept[-1].step]

    def _placed(self, infos: dict[str, tuple], end_of_header: int, end: int) -> dict[str, _Place]:
        """Places in the file: the tensors follow each other, each at the next multiple of the alignment."""
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment {alignment!r} is not a power of two")
        start = _aligned(end_of_header, alignment)
        expected, places = 0, {}
        for name, (shape, kind, offset) in infos.items():
            place = self._place(name, shape, kind, start + offset)
            if offset != expected:
                raise ValueError(f"tensor {name} is at offset {offset}, and the one before it ends at {expected}")
            if place.start + place.size > end:
                raise ValueError(
                    f"tensor {name}, bytes {place.start} to {place.start + place.size}, goes past the end {end}"
                )
            expected, places[name] = _aligned(offset + place.size, alignment), place
        return places

    def _place(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> _Place:
        constants = self._library.constants
        try:
            known = constants.GGMLQuantizationType(kind)
        except ValueError:
            raise ValueError(f"tensor {name} has type {kind}, unknown to this version of gguf") from None
        block, block_bytes = constants.GGML_QUANT_SIZES[known]
        if not all(shape) or shape[-1] % block:
            raise ValueError(f"tensor {name} is {shape}, and its rows are whole blocks of {block} ({known.name})")
        return _Place(shape, known, block, block_bytes, start)

    def _check_kinds(self) -> None:
        """Raises ValueError for tensors that the library cannot turn into floats."""
        examples = {place.kind: place for place in self._places.values() if place.kind.name not in _FLOATS}
        for kind, place in examples.items():
            try:
                self._library.quants.dequantize(np.zeros((1, place.block_bytes), np.uint8), kind)
            except NotImplementedError:
                names = [name for name, place in self._places.items() if place.kind == kind]
                raise ValueError(
                    f"{self.path}: {kind.name} cannot be turned into floats ({listed(names)}); take a file in another"
                    " quantisation, such as Q8_0 or Q4_K"
                ) from None


def gguf_config(source: GgufSource) -> tuple[ModelConfig, int]:
    """The model that the metadata describe, in float32, and the tokens of the context that it was trained for.

    Raises ValueError for a key that is missing or wrong, NotImplementedError for one that this library does not have,
    or does not know: it may change what the model computes.
    """
    fields = _Fields(source)
    fields.check_known()
    heads = fields.same("attention.head_count")
    with _named(source.path):
        config = ModelConfig(
            width=fields.get("embedding_length"), ffn_width=fields.same("feed_forward_length"),
            layers=fields.get("block_count"), heads=heads, kv_heads=fields.same("attention.head_count_kv", heads),
            head_dim=fields.get("attention.key_length"),
            vocab_size=fields.get("vocab_size", source.shapes.get("token_embd.weight", (0,))[0]), vision_vocab_size=0,
            rope_theta=fields.get("rope.freq_base", 10000.0), rope_scaling=fields.rope_scaling(),
            norm_eps=fields.get("attention.layer_norm_rms_epsilon"),
            tie_embeddings="output.weight" not in source.shapes, qkv_bias=fields.architecture == "qwen2",
            window=fields.get("attention.sliding_window", 0) or None, dtype="float32",
        )  # fmt: skip
    for name in ("rope.dimension_count", "attention.value_length"):
        if fields.get(name, config.head_size) != config.head_size:
            raise fields.refused(name, f"it is the size of a head, {config.head_size}, here")
    # A tampered count would otherwise make the tables of names as long as it says.
    last = f"blk.{config.layers - 1}.attn_norm.weight"
    if last not in source.shapes or config.layers > len(source.shapes):
        raise ValueError(f"{source.path}: {fields.architecture}.block_count is {config.layers}, and there is no {last}")
    return config, fields.get("context_length")


def gguf_split_halves(source: GgufSource) -> bool:
    """Whether component i of a head is paired with i + H/2 rather than with its neighbour (for `gguf_recipes`)."""
    return SPLIT_HALVES[_Fields(source).architecture]


class _Fields:
    """The keys of the architecture."""

    REQUIRED = {
        "block_count": int, "context_length": int, "embedding_length": int, "feed_forward_length": int,
        "attention.head_count": int, "attention.layer_norm_rms_epsilon": float,
    }  # fmt: skip
    KNOWN = {
        **REQUIRED, "vocab_size": int, "attention.head_count_kv": int, "attention.key_length": int,
        "attention.value_length": int, "attention.sliding_window": int, "rope.freq_base": float,
        "rope.dimension_count": int, "rope.scale_linear": float, "rope.scaling.type": str,
        "rope.scaling.factor": float, "rope.scaling.original_context_length": int,
        "rope.scaling.yarn_beta_fast": float, "rope.scaling.yarn_beta_slow": float,
        "rope.scaling.finetuned": bool, "tensor_data_layout": str,  # say nothing about the logits
    }  # fmt: skip
    A_LAYER = ("feed_forward_length", "attention.head_count", "attention.head_count_kv")
    # What these must be where they are there: what llama.cpp takes where they are not.
    NEUTRAL = {
        "expert_count": 0, "expert_used_count": 0, "attention.causal": True, "pooling_type": 0,
        "rope.scaling.attn_factor": 1.0, "rope.scaling.yarn_attn_factor": 1.0, "rope.scaling.yarn_ext_factor": 1.0,
        "rope.scaling.yarn_log_multiplier": 0.0,
    }  # fmt: skip

    def __init__(self, source: GgufSource):
        self.source, self.architecture = source, source.metadata.get("general.architecture")
        if not isinstance(self.architecture, str) or self.architecture not in SPLIT_HALVES:
            raise NotImplementedError(
                f"{source.path}: architecture {self.architecture!r} is not one of {', '.join(SPLIT_HALVES)}"
            )
        start = f"{self.architecture}."
        self.fields = {key[len(start) :]: x for key, x in source.metadata.items() if key.startswith(start)}

    def check_known(self) -> None:
        missing = [f"{self.architecture}.{name}" for name in self.REQUIRED if name not in self.fields]
        if missing:
            raise ValueError(f"{self.source.path} has no {listed(missing)}; is it a language model?")
        for name, neutral in self.NEUTRAL.items():
            if type(self.get(name, neutral)) is not type(neutral) or self.get(name, neutral) != neutral:
                raise self.refused(name, f"only {neutral} is read")
        for name, value in self.fields.items():
            if name in self.NEUTRAL or (name in self.A_LAYER and isinstance(value, np.ndarray)):
                continue
            if name not in self.KNOWN:
                raise self.refused(name, "unknown here, it may change what the model computes")
            if type(value) is not self.KNOWN[name]:
                kind = self.KNOWN[name].__name__
                raise ValueError(f"{self.source.path}: {self.architecture}.{name} {value!r} is not of type {kind}")
        self._check_factors()

    def get(self, name: str, otherwise: Any = None) -> Any:
        return self.fields.get(name, otherwise)

    def same(self, name: str, otherwise: int | None = None) -> Any:
        """A whole number, or the one that an array repeats for every layer."""
        found = self.get(name, otherwise)
        if not isinstance(found, np.ndarray):
            return found
        if not len(found) or len(found) != self.get("block_count") or np.any(found != found[0]):
            raise self.refused(name, "all layers have the same size")
        return found[0].item()

    def rope_scaling(self) -> RopeScaling | None:
        """llama.cpp's rule where no type is given: linear, by 1 unless there is a factor."""
        kind = self.get("rope.scaling.type", "linear")
        factor = self.get("rope.scaling.factor", self.get("rope.scale_linear", 1.0))
        if kind not in ("none", "linear", "yarn"):
            raise self.refused("rope.scaling.type", "the rules are none, linear and yarn")
        if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
            return None
        if kind == "linear":
            return RopeScaling("linear", factor)
        betas = {x: self.get(f"rope.scaling.yarn_{x}") for x in ("beta_fast", "beta_slow")}
        return RopeScaling(
            "yarn", factor,
            original_max_position=self.get("rope.scaling.original_context_length", self.get("context_length")),
            **{name: value for name, value in betas.items() if value is not None},
        )  # fmt: skip

    def refused(self, name: str, rule: str) -> NotImplementedError:
        return NotImplementedError(
            f"{self.source.path}: {self.architecture}.{name} {self.get(name)!r} is not supported: {rule}"
        )

    def _check_factors(self) -> None:
        """Raises NotImplementedError where llama.cpp divides RoPE's frequencies by a tensor (Llama 3.1)."""
        name = "rope_freqs.weight"
        shape = self.source.shapes.get(name)
        if shape is not None and not np.all(self.source.read(name, tuple(slice(None) for _ in shape)) == 1):
            raise NotImplementedError(
                f"{self.source.path}: {name} divides RoPE's frequencies one by one, and the rule that it came from"
                " (llama3) is not in the file; load the model's Hugging Face folder"
            )


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise ImportError("GGUF files need llama.cpp's library: pip install 'ringjax[gguf]'") from None
    return gguf


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


@contextlib.contextmanager
def _named(path: Path):
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
