"""LWM's JAX weights: a stream of msgpack records (key tuple, flax bytes), read in slices and written record by record.

    (("params", "transformer", "h", "scan_decoder", "attention", "wq", "kernel"), bytes)      scanned: [layers, in, out]
    (("params", "transformer", "h", "0", "attention", "wq", "kernel"), bytes)                 unscanned: [in, out]

The bytes are themselves msgpack, so every tensor lies whole in the file (or, above 1 GiB, in a few chunks): the index
holds places only, and the file is mapped. Kernels are `[in, out]` with RoPE's pairs joined, as ours are.
"""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import ml_dtypes
import msgpack
import numpy as np
from flax import nnx

from ringjax.interop import names
from ringjax.interop.msgpack_cursor import Cursor, Fault
from ringjax.interop.names import Recipe
from ringjax.interop.tensors import Index, TensorSource
from ringjax.models.config import ModelConfig
from ringjax.models.sizes import SIZES
from ringjax.models.transformer import Transformer

_FLOATS = {x.name: x for x in map(np.dtype, (ml_dtypes.bfloat16, np.float16, np.float32, np.float64))}
_ARRAY_CODE, _CHUNKED = 1, "__msgpack_chunked_array__"  # flax's marks
_MAX_CHUNK = 2**30  # bytes; flax cuts larger tensors, since msgpack's lengths have 32 bits
_MAX_RECORD = 2**32 - 1  # bytes
# Generous bounds, so that a hostile file is refused before it fills the memory.
_MOST_TENSORS, _MOST_PARTS, _MOST_AXES = 2**16, 16, 8

_LAYERS = "transformer/h"
_SCAN = "scan_decoder"
_HEADS = ("lm_head", "vision_head")


# --- reading --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a tensor's numbers lie: (byte, how many) of each chunk, in order."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[tuple[int, int], ...]


class LwmSource:
    """The tensors of an LWM stream, by key joined with '/', without up to two leading `params`.

    Indexed in one pass that reads keys and heads only. Raises FileNotFoundError where there is no file, ValueError
    (with the byte, and the key where it is known) for a cut or tampered one and for a tensor that holds no floats.
    A file cut just between two records is whole in itself: the loader then finds tensors missing.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.stat().st_size:
            raise ValueError(f"{self.path} is empty, not an LWM stream; fetch it again")
        self._content = np.asarray(np.memmap(self.path, np.uint8, "r"))
        self._places: dict[str, _Place] = {}
        self._index()
        self.shapes: dict[str, tuple[int, ...]] = {name: place.shape for name, place in self._places.items()}

    def read(self, name: str, index: Index) -> np.ndarray:
        place = self._places[name]
        if len(place.chunks) > 1:
            return self._rows(place, index).view(place.dtype)
        whole = self._flat(place, 0, math.prod(place.shape)).reshape(place.shape)
        return np.array(whole[index]).view(place.dtype)

    def _index(self) -> None:
        cursor, name = Cursor(self._content, 0, len(self._content)), None
        try:
            while cursor.at < cursor.end:
                name, start = None, cursor.at
                if cursor.take("array") != 2:
                    cursor.fail("a record is not a pair of key and tensor", start)
                name = _read_name(cursor)
                if name in self._places:
                    cursor.fail("this tensor is there twice", start)
                if len(self._places) == _MOST_TENSORS:
                    cursor.fail(f"more than {_MOST_TENSORS} tensors", start)
                self._places[name] = _read_tensor(cursor.inside("bytes"))
        except Fault as fault:
            where = f"byte {fault.at}" + (f", {name}" if name else "")
            raise ValueError(
                f"{self.path} is not a whole LWM stream of parameters: {where}: {fault}; fetch or write it again"
            ) from None

    def _rows(self, place: _Place, index: Index) -> np.ndarray:
        """A part of a chunked tensor, one item of the first axis at a time, so that no more than one is copied."""
        wanted = [range(size)[axis] for axis, size in zip(index, place.shape)]
        part = np.empty([len(axis) for axis in wanted], f"<u{place.dtype.itemsize}")
        size = math.prod(place.shape[1:])
        for i, row in enumerate(wanted[0]):
            part[i] = self._flat(place, row * size, size).reshape(place.shape[1:])[index[1:]]
        return part

    def _flat(self, place: _Place, first: int, size: int) -> np.ndarray:
        """`size` numbers from the `first` on: a view of the file where they lie in one chunk."""
        # As unsigned integers: a tensor starts at any byte, and NumPy reads these unaligned whatever the float type.
        width, found = place.dtype.itemsize, []
        for start, count in place.chunks:
            begin, end = max(first, 0), min(first + size, count)
            if begin < end:
                found.append(np.ndarray(end - begin, f"<u{width}", self._content, start + begin * width))
            first -= count
        return found[0] if len(found) == 1 else np.concatenate(found)


def _read_name(cursor: Cursor) -> str:
    start, count = cursor.at, cursor.take("array")
    if not 1 <= count <= _MOST_PARTS:
        cursor.fail(f"a key of {count} parts, not 1 to {_MOST_PARTS}", start)
    parts = [cursor.text() for _ in range(count)]
    for _ in range(2):
        parts = parts[1:] if parts[0] == "params" and len(parts) > 1 else parts
    return "/".join(parts)


def _read_tensor(value: Cursor) -> _Place:
    """From the bytes of a record, all of which must be used."""
    if value.peek() == "map":
        place = _read_chunked(value)
    else:
        shape, dtype, start = _read_array(value)
        place = _Place(shape, dtype, ((start, math.prod(shape)),))
    value.close()
    return place


def _read_array(cursor: Cursor) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, type and first byte of an array as flax packs one: ext 1 of (shape, type's name, bytes)."""
    ext = cursor.inside("ext")
    if ext.code != _ARRAY_CODE:
        cursor.fail(f"ext type {ext.code}, not an array ({_ARRAY_CODE})", ext.at)
    if ext.take("array") != 3:
        ext.fail("an array is not (shape, type, bytes)", ext.start)
    start, axes = ext.at, ext.take("array")
    if axes > _MOST_AXES:
        ext.fail(f"{axes} axes, more than {_MOST_AXES}", start)
    shape = tuple(ext.take("int") for _ in range(axes))
    name = ext.text()
    if name not in _FLOATS:
        ext.fail(f"{name}, not one of {', '.join(_FLOATS)} (optimizer states are not read)", start)
    raw = ext.inside("bytes")
    ext.close()
    needed = math.prod(shape) * _FLOATS[name].itemsize
    if not needed:
        ext.fail(f"an empty array, {list(shape)}", start)
    if raw.end - raw.at != needed:
        ext.fail(f"{raw.end - raw.at} bytes, and {name}{list(shape)} takes {needed}", raw.start)
    return shape, _FLOATS[name], raw.at


def _read_chunked(value: Cursor) -> _Place:
    """A tensor that flax has cut: {mark: true, shape: {"0": …}, chunks: {"0": array, …}}."""
    start, fields = value.at, {}
    if value.take("map") != 3:
        value.fail("a chunked array has not 3 fields", start)
    for _ in range(3):
        match value.text():
            case "shape":
                fields["shape"] = tuple(value.take("int") for _ in _numbered(value, _MOST_AXES))
            case "chunks":
                fields["chunks"] = [_read_array(value) for _ in _numbered(value, _MOST_TENSORS)]
            case mark if mark == _CHUNKED:
                fields[mark] = value.take("true")
            case other:
                value.fail(f"a chunked array with {other!r}", start)
    if len(fields) != 3:
        value.fail(f"a chunked array without {', '.join({'shape', 'chunks', _CHUNKED} - fields.keys())}", start)
    sizes, dtypes = [math.prod(shape) for shape, _, _ in fields["chunks"]], {x for _, x, _ in fields["chunks"]}
    if len(dtypes) != 1 or sum(sizes) != math.prod(fields["shape"]):
        value.fail(f"chunks of {sizes} numbers of {len(dtypes)} types for shape {list(fields['shape'])}", start)
    return _Place(fields["shape"], dtypes.pop(), tuple((at, n) for (_, _, at), n in zip(fields["chunks"], sizes)))


def _numbered(cursor: Cursor, most: int) -> Iterator[int]:
    """The keys "0", "1", … of a map, with the cursor at each value."""
    start, count = cursor.at, cursor.take("map")
    if count > most:
        cursor.fail(f"a map of {count} items, more than {most}", start)
    for i in range(count):
        if cursor.text() != str(i):
            cursor.fail(f"item {i} of a map is not called so", start)
        yield i


# --- names ----------------------------------------------------------------------------------------------------------


def lwm_recipes(config: ModelConfig, scanned: bool) -> dict[names.Path, Recipe]:
    """The recipe of every parameter: LWM's tensors as they are, stacked already where `scanned`."""
    if config.qkv_bias:
        raise ValueError("qkv_bias True: LWM's weights have no biases; use Hugging Face's form")
    found = {}
    for path, leaf in nnx.to_flat_state(nnx.state(Transformer.abstract(config))):
        shape = leaf.get_value().shape
        if path[0] == "h" and not scanned:
            layers = tuple(_name(path, str(i)) for i in range(config.layers))
            found[path] = Recipe(layers, shape[1:], stacked=True)
        else:
            found[path] = Recipe((_name(path, _SCAN),), shape, stacked=False)
    return found


def is_scanned(source: TensorSource) -> bool:
    """Whether the layers are stacked; raises ValueError where there are none."""
    if any(name.startswith(f"{_LAYERS}/{_SCAN}/") for name in source.shapes):
        return True
    if any(name.startswith(f"{_LAYERS}/") for name in source.shapes):
        return False
    raise ValueError(f"{source.path} has no tensor under {_LAYERS}, so it is no model of LWM")


def shape_of_stream(source: TensorSource, heads: int | None = None) -> ModelConfig:
    """The size of LWM that has these shapes, with the stream's vocabularies; with `heads`, any size.

    The number of heads and RoPE's theta are in no shape: heads are those of the size, theta is left at its default.
    Raises ValueError where no size fits.
    """
    scanned, kernel = is_scanned(source), "feed_forward/w1/kernel"
    vocab_size, width = _sizes(source, "transformer/wte/embedding", 2)
    if scanned:
        layers, _, ffn_width = _sizes(source, f"{_LAYERS}/{_SCAN}/{kernel}", 3)
    else:
        layers = sum(1 for name in source.shapes if re.fullmatch(rf"{_LAYERS}/[0-9]+/{kernel}", name))
        _, ffn_width = _sizes(source, f"{_LAYERS}/0/{kernel}", 2)
    vision = "transformer/vte/embedding"
    vision_vocab_size = _sizes(source, vision, 2)[0] if vision in source.shapes else 0
    if heads is not None:
        return ModelConfig(
            width=width, ffn_width=ffn_width, layers=layers, heads=heads, vocab_size=vocab_size,
            vision_vocab_size=vision_vocab_size,
        )  # fmt: skip
    for size in SIZES.values():
        if (size.width, size.ffn_width, size.layers, size.kv_heads) == (width, ffn_width, layers, None):
            return dataclasses.replace(size, vocab_size=vocab_size, vision_vocab_size=vision_vocab_size)
    raise ValueError(
        f"{source.path} has width {width}, ffn_width {ffn_width}, layers {layers}, and no size of LWM has: the number"
        " of heads is not in the file; give it (--heads)"
    )


def _name(path: names.Path, layer: str) -> str:
    """LWM's name of a parameter of ours; `layer` is a number, or what stands for all."""
    if path[0] == "h":
        path = ("h", layer, *path[1:])
    return "/".join(path if path[0] in _HEADS else ("transformer", *path))


def _sizes(source: TensorSource, name: str, axes: int) -> tuple[int, ...]:
    if len(source.shapes.get(name, ())) != axes:
        found = list(source.shapes[name]) if name in source.shapes else "missing"
        raise ValueError(f"{source.path}: {name} is {found}, and {axes} axes tell the model's size")
    return source.shapes[name]


# --- writing --------------------------------------------------------------------------------------------------------


def save_lwm(
    params_by_path: Iterable[tuple[names.Path, Callable[[], np.ndarray]]],
    target: str | Path,
    *,
    scanned: bool,
    layers: int,
) -> None:
    """Write our parameters (those under `h` stacked over `layers`) as LWM reads them; one is in memory at a time.

    The file appears whole or not at all. Raises ValueError for a parameter that is no float or not so many layers, and
    for one of 4 GiB or more, which a record cannot hold.
    """
    target = Path(target)
    unfinished = target.with_name(target.name + ".part")
    try:
        with unfinished.open("wb") as file:
            for path, make in params_by_path:
                for name, tensor in _split(path, make(), scanned, layers):
                    file.writelines(_record(name, tensor))
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


def _split(path: names.Path, tensor: np.ndarray, scanned: bool, layers: int) -> Iterator[tuple[str, np.ndarray]]:
    name = "/".join(path)
    if tensor.dtype.name not in _FLOATS:
        raise ValueError(f"{name} is {tensor.dtype.name}; LWM's weights are {', '.join(_FLOATS)}")
    if path[0] == "h" and (not tensor.ndim or tensor.shape[0] != layers):
        raise ValueError(f"{name} is {list(tensor.shape)}; its first axis must be the {layers} layers")
    if path[0] == "h" and not scanned:
        yield from ((_name(path, str(i)), tensor[i]) for i in range(layers))
    else:
        yield _name(path, _SCAN), tensor


def _record(name: str, tensor: np.ndarray) -> Iterator[bytes | memoryview]:
    """The pieces of a record; the tensor's own bytes are not copied (by msgpack they would be, three times)."""
    tensor = np.ascontiguousarray(tensor, _FLOATS[tensor.dtype.name])
    value = _packed(tensor) if tensor.nbytes <= _MAX_CHUNK else _packed_chunks(tensor)
    size = sum(map(len, value))
    if size > _MAX_RECORD:
        raise ValueError(f"{name} takes {size} bytes, and a record at most {_MAX_RECORD}; write with scanned=False")
    yield b"\x92" + msgpack.packb(("params", *name.split("/"))) + b"\xc6" + size.to_bytes(4, "big")
    yield from value


def _packed(array: np.ndarray) -> list[bytes | memoryview]:
    """As flax packs an array, with all lengths of 32 bits."""
    head = b"\x93" + msgpack.packb(array.shape) + msgpack.packb(array.dtype.name)
    head += b"\xc6" + array.nbytes.to_bytes(4, "big")
    ext = b"\xc9" + (len(head) + array.nbytes).to_bytes(4, "big") + bytes([_ARRAY_CODE])
    return [ext + head, memoryview(array.reshape(-1).view(np.uint8))]


def _packed_chunks(array: np.ndarray) -> list[bytes | memoryview]:
    size, flat = max(1, _MAX_CHUNK // array.dtype.itemsize), array.reshape(-1)
    chunks = [flat[i : i + size] for i in range(0, flat.size, size)]
    head = b"\x83" + msgpack.packb(_CHUNKED) + msgpack.packb(True)
    head += msgpack.packb("shape") + msgpack.packb({str(i): n for i, n in enumerate(array.shape)})
    pieces = [head + msgpack.packb("chunks") + msgpack.Packer().pack_map_header(len(chunks))]
    for i, chunk in enumerate(chunks):
        pieces += [msgpack.packb(str(i)), *_packed(chunk)]
    return pieces
