"""Arrays out of a pickle, such as LWM's VQGAN, without executing it.

Python's unpickler calls whatever a file names. Here a small machine walks the opcodes that nested dicts of arrays need;
the globals it knows are few, by name, and those stand for code of this file: nothing is imported, nothing else called.

    GLOBAL numpy._core.multiarray._reconstruct   REDUCE   an empty stand-in
    GLOBAL numpy.dtype, 'f4'                     REDUCE   its type
    (1, shape, type, fortran, bytes)             BUILD    what the array is made of
"""

import dataclasses
import math
import mmap
import os
import pickletools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from ringjax.interop.tensors import listed
from ringjax.models.vqgan.config import LWM, VQGANConfig
from ringjax.models.vqgan.files import published_name
from ringjax.models.vqgan.model import VQGAN

_DTYPES = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}
_ORDERS = {"<": "<", ">": ">", "=": "<", "|": "<"}
_DEEPEST, _MOST_AXES = 32, 32
# LWM's has some thousand. One byte of a file can make a dict of 64, so their number is the memory's bound.
_MOST_OPCODES = 1 << 20


def read_pickled_arrays(path: str | os.PathLike) -> dict[str, Any]:
    """The nested dict of arrays in a pickle of any protocol.

    Raises FileNotFoundError where there is no file. Raises ValueError, with the byte, for a cut file, for one that
    would call anything but what makes arrays, and for arrays of objects.
    """
    if not os.path.getsize(path):
        raise ValueError(f"{path} is empty, not a pickle; fetch it again")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _plain(path, _Machine(path, content).run())


def load_vqgan_pickle(path: str | os.PathLike, config: VQGANConfig = LWM) -> VQGAN:
    """LWM's published image tokenizer; `params` around its tensors is accepted.

    Raises FileNotFoundError where there is no file, ValueError as `read_pickled_arrays` does and where tensors are
    missing, unknown or misshapen.
    """
    arrays = read_pickled_arrays(path)
    if arrays.keys() == {"params"} and isinstance(arrays["params"], dict):
        arrays = arrays["params"]
    named = list(_named(arrays))
    found = dict(named)
    if len(found) != len(named):
        raise ValueError(f"{path} has two tensors of one name; only trees of names are read")
    graph, state = nnx.split(VQGAN.abstract(config))
    wanted = {published_name(at): (at, leaf) for at, leaf in nnx.to_flat_state(state)}
    _check(path, {name: leaf.get_value().shape for name, (_, leaf) in wanted.items()}, found)
    loaded = [(at, leaf.replace(jnp.asarray(found[name], jnp.float32))) for name, (at, leaf) in wanted.items()]
    return nnx.merge(graph, nnx.from_flat_state(loaded))


def _check(path, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, np.ndarray]) -> None:
    faults = [f"missing {name}" for name in wanted if name not in found]
    faults += [f"unknown {name}" for name in found if name not in wanted]
    for name in sorted(wanted.keys() & found.keys()):
        if found[name].shape != wanted[name]:
            faults.append(f"{name} is {found[name].shape}, not {wanted[name]}")
        elif not jnp.issubdtype(found[name].dtype, jnp.floating):
            faults.append(f"{name} is {found[name].dtype}, not a float type")
    if faults:
        raise ValueError(f"{path} does not fit its config: {listed(faults)}")


def _named(arrays: Mapping[str, Any], prefix: str = ""):
    """(name, array), the levels joined with '/'."""
    for key, value in arrays.items():
        if isinstance(value, dict):
            yield from _named(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


# --- stand-ins ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Global:
    """Something that the pickle names; only a name."""

    name: str


class _Dtype:
    """numpy.dtype: its kind is known first, its byte order when it is built."""

    def __init__(self, kind: Any, align: Any = False, copy: Any = True):
        if isinstance(kind, _Global):
            if kind.name != "ml_dtypes.bfloat16":
                raise ValueError(f"has an array of {kind.name}; only numbers are read")
            kind = "bfloat16"
        elif not isinstance(kind, str) or kind not in _DTYPES:
            what = "objects" if isinstance(kind, str) and kind.startswith("O") else f"type {_brief(kind)}"
            raise ValueError(f"has an array of {what}; only numbers are read")
        self.kind, self.order = kind, "<"

    def build(self, state: Any) -> None:
        _, order, subdtype, names, fields, *_ = state
        structured = any(part is not None for part in (subdtype, names, fields))
        if structured or not isinstance(order, str) or order not in _ORDERS:
            raise ValueError(f"has an array of a structured {self.kind}; only numbers are read")
        self.order = _ORDERS[order]

    def array(self, shape: Any, fortran: bool, content: Any) -> np.ndarray:
        dtype = np.dtype(ml_dtypes.bfloat16 if self.kind == "bfloat16" else self.order + self.kind)
        sizes = shape if isinstance(shape, tuple) else (None,)
        if len(sizes) > _MOST_AXES or not all(type(n) is int and 0 <= n < 2**48 for n in sizes):
            raise ValueError(f"has an array {self.kind} whose shape is not up to {_MOST_AXES} sizes")
        if not isinstance(content, bytes | bytearray) or len(content) != math.prod(shape) * dtype.itemsize:
            size = f"{len(content)} bytes" if isinstance(content, bytes | bytearray) else _brief(content)
            raise ValueError(f"has {size} for an array {self.kind}{list(shape)}")
        if self.kind == "bfloat16" and self.order == ">":  # NumPy cannot swap the bytes of a type of ml_dtypes
            dtype, final = np.dtype(">u2"), np.dtype(ml_dtypes.bfloat16)
            array = np.frombuffer(content, dtype).astype("<u2").view(final)
        else:
            array = np.frombuffer(content, dtype).astype(dtype.newbyteorder("="), copy=False)
        return array.reshape(shape, order="F" if fortran else "C")


class _Array:
    """numpy.ndarray, empty until it is built."""

    def __init__(self, array: np.ndarray | None = None):
        self.array = array

    def build(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        if not isinstance(dtype, _Dtype):
            raise ValueError("has an array without a type")
        self.array = dtype.array(shape, bool(fortran), content)


def _reconstruct(kind: Any, shape: Any, letter: Any) -> _Array:
    if kind != _Global("numpy.ndarray"):
        raise ValueError(f"has an array that is {_brief(kind)}, not a numpy.ndarray")
    return _Array()


def _from_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    """What protocol 5 calls."""
    if not isinstance(dtype, _Dtype):
        raise ValueError("has an array without a type")
    return _Array(dtype.array(shape, order == "F", content))


def _jax_array(function: Any, arguments: Any, state: Any, aval: Any) -> _Array:
    """jax.Array is a NumPy array, taken apart, and its weak type."""
    if function not in (_Global(name) for name in _RECONSTRUCT):
        raise ValueError(f"has a jax.Array made by {_brief(function)}")
    array = _reconstruct(*arguments)
    array.build(state)
    return array


def _encode(text: Any, encoding: Any) -> bytes:
    """Protocols up to 2 write bytes as text in Latin-1."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise ValueError(f"encodes in {_brief(encoding)}, not latin1")
    return text.encode("latin-1")


def _frozen_dict(content: Any) -> dict:
    if not isinstance(content, dict):
        raise ValueError("has a FrozenDict of something else than a dict")
    return content


_RECONSTRUCT = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
_CALLS: dict[str, Callable] = {
    **dict.fromkeys(_RECONSTRUCT, _reconstruct),
    **dict.fromkeys(("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer"), _from_buffer),
    "numpy.dtype": _Dtype,
    "jax._src.array._reconstruct_array": _jax_array,
    "_codecs.encode": _encode,
    "flax.core.frozen_dict.FrozenDict": _frozen_dict,
}
_ALLOWED = {*_CALLS, "numpy.ndarray", "ml_dtypes.bfloat16"}


# --- the machine ----------------------------------------------------------------------------------------------------

_LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()


class _Machine:
    """The stack and the memo of a pickle. Its opcodes are read by pickletools, which makes numbers and texts only."""

    def __init__(self, path: str | os.PathLike, content: mmap.mmap):
        self.path, self.content = path, content
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.made = 0
        """Bytes of all arrays; a file holds each of them, so there are no more than twice its own."""

    def run(self) -> Any:
        """What the pickle holds, with stand-ins."""
        for name, argument, at in self._opcodes():
            try:
                self._step(name, argument)
            except ValueError as error:
                raise ValueError(f"{self.path} {str(error)[:500]} (byte {at})") from None
            except (IndexError, KeyError, TypeError):
                raise ValueError(
                    f"{self.path} is no whole pickle: {name} does not fit what is before it (byte {at})"
                ) from None
        if len(self.stack) != 1 or self.content.tell() != len(self.content):
            raise ValueError(
                f"{self.path} is no whole pickle: it ends at byte {self.content.tell()} of {len(self.content)} with"
                f" {len(self.stack)} values"
            )
        return self.stack.pop()

    def _opcodes(self):
        try:
            for number, (opcode, argument, at) in enumerate(pickletools.genops(self.content)):
                if number >= _MOST_OPCODES:
                    raise ValueError(f"more than {_MOST_OPCODES} opcodes")
                yield opcode.name, argument, at
        except ValueError as error:
            raise ValueError(
                f"{self.path} is no whole pickle: it breaks off before byte {self.content.tell()} ({str(error)[:300]});"
                " fetch it again"
            ) from None

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            stack.append(tuple(self._pop(_TUPLES[name])))
        else:
            match name:
                case "PROTO" | "FRAME" | "STOP":
                    pass
                case "MARK":
                    stack.append(_MARK)
                case "TUPLE":
                    stack.append(tuple(self._pop_to_mark()))
                case "EMPTY_DICT":
                    stack.append({})
                case "DICT":
                    self._set({}, self._pop_to_mark(), push=True)
                case "SETITEM":
                    items = self._pop(2)
                    self._set(stack[-1], items)
                case "SETITEMS":
                    items = self._pop_to_mark()
                    self._set(stack[-1], items)
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    self.memo[argument] = self._top()
                case "MEMOIZE":
                    self.memo[len(self.memo)] = self._top()
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(self.memo[argument])
                case "GLOBAL":
                    stack.append(_named_global(*argument.split(" ", 1)))
                case "STACK_GLOBAL":
                    stack.append(_named_global(*self._pop(2)))
                case "REDUCE":
                    stack.append(_call(*self._pop(2)))
                    self._count(stack[-1])
                case "BUILD":
                    (state,) = self._pop(1)
                    _build(stack[-1], state)
                    self._count(stack[-1])
                case _:
                    raise ValueError(f"needs {name}; only arrays are read")

    def _count(self, made: Any) -> None:
        """One string can become any number of arrays, each of them a copy: a small file must not fill the memory."""
        array = made.array if isinstance(made, _Array) else None
        self.made += len(made) if isinstance(made, bytes) else 0 if array is None else array.nbytes
        if self.made > 2 * len(self.content):
            raise ValueError(f"makes more than {2 * len(self.content)} bytes of arrays, twice those of the file")

    def _top(self) -> Any:
        (value,) = self._pop(1)
        self.stack.append(value)
        return value

    def _pop(self, count: int) -> list[Any]:
        values = self.stack[-count:]
        if len(values) != count or any(value is _MARK for value in values):
            raise IndexError
        del self.stack[-count:]
        return values

    def _pop_to_mark(self) -> list[Any]:
        values = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def _set(self, target: Any, items: list[Any], push: bool = False) -> None:
        keys, values = items[::2], items[1::2]
        if not isinstance(target, dict) or len(keys) != len(values):
            raise TypeError
        if not all(isinstance(key, str) for key in keys):  # nothing else is ever hashed
            raise ValueError("has a dict whose keys are not all texts; only nested dicts of arrays are read")
        target.update(zip(keys, values))
        if push:
            self.stack.append(target)


def _named_global(module: Any, attribute: Any) -> _Global:
    if not isinstance(module, str) or not isinstance(attribute, str):
        raise ValueError("names a global by something else than texts; only arrays are read")
    name = f"{module}.{attribute}"
    if name not in _ALLOWED:
        raise ValueError(f"tries to call {name[:200]}; only arrays are read")
    return _Global(name)


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, _Global) or function.name not in _CALLS or not isinstance(arguments, tuple):
        raise ValueError(f"tries to call {_brief(function)}; only arrays are read")
    return _CALLS[function.name](*arguments)


def _build(target: Any, state: Any) -> None:
    if not isinstance(target, _Array | _Dtype) or not isinstance(state, tuple):
        raise ValueError(f"tries to build {_brief(target)}; only arrays are read")
    target.build(state)


def _brief(value: Any) -> str:
    """For messages. No repr of anything nested: a small pickle can hold a tuple whose text is without end."""
    if isinstance(value, _Global):
        return value.name
    return repr(value[:40]) if isinstance(value, str) else f"a value of type {type(value).__name__.strip('_')}"


def _plain(path: str | os.PathLike, found: Any) -> dict[str, Any]:
    """Stand-ins replaced by their arrays, in a dict that is a tree."""

    def plain(value: Any, name: str, depth: int) -> Any:
        if isinstance(value, _Array) and value.array is not None:
            return value.array
        if not isinstance(value, dict):
            raise ValueError(f"{path} has {_brief(value)} at {name}; only nested dicts of arrays are read")
        # A dict that is in it twice can make a small file a tree without end.
        if id(value) in seen or depth > _DEEPEST:
            raise ValueError(f"{path} has a dict at {name} that is there twice or more than {_DEEPEST} levels deep")
        seen.add(id(value))
        return {key: plain(part, f"{name}/{key}".strip("/"), depth + 1) for key, part in value.items()}

    seen: set[int] = set()
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {_brief(found)}, not a dict of arrays")
    return plain(found, "", 0)
