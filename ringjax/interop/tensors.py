"""Named tensors in other projects' files, read in slices: a model larger than host memory goes to its devices in parts.

    SafetensorsSource   one .safetensors file, or a folder with an index over several
    (gguf.py, lwm.py)   quantised tensors of llama.cpp; LWM's msgpack stream
"""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from safetensors import SafetensorError, safe_open

from ringjax.inside import inside
from ringjax.json_text import parse_json

Index = tuple[slice, ...]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = {"F64", "F32", "F16", "BF16"}
_SHOWN, _LONGEST = 8, 300


class TensorSource(Protocol):
    """Where tensors come from. `shapes` names them all; `read` gives a part of one, as its own float type."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]

    def read(self, name: str, index: Index) -> np.ndarray:
        """The part of tensor `name` at `index`, one slice an axis."""
        ...


class SafetensorsSource:
    """The tensors of a safetensors file or of a Hugging Face folder.

    Raises FileNotFoundError where there are none, ValueError for a cut or tampered file, an index that does not fit
    its files, or a tensor that holds no floats.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._files, self._place = {}, {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        wanted = None
        if self.path.is_dir():
            wanted, files = _files_of(self.path)
        else:
            files = [self.path]
        for file in files:
            self._open(file)
        if wanted is not None:
            self._check_index(wanted)

    def read(self, name: str, index: Index) -> np.ndarray:
        with _explained(self._place[name]):
            return self._files[self._place[name]].get_slice(name)[index]

    def _open(self, file: Path) -> None:
        with _explained(file):
            opened = self._files[file] = safe_open(file, framework="numpy")
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                if name in self._place:
                    raise ValueError(f"{name} is in {self._place[name].name} and again in {file.name}")
                part = opened.get_slice(name)
                if part.get_dtype() not in _FLOATS:
                    kinds = ", ".join(sorted(_FLOATS))
                    raise ValueError(
                        f"{file.name}: {name} is {part.get_dtype()}, not one of {kinds}; quantised weights are not"
                        " read, convert them to bfloat16 first"
                    )
                self._place[name], self.shapes[name] = file, tuple(part.get_shape())

    def _check_index(self, wanted: Mapping[str, str]) -> None:
        misplaced = [
            f"{name} is not in {file}"
            for name, file in wanted.items()
            if name not in self._place or self._place[name].name != file
        ]
        misplaced += [f"{name} is in {self._place[name].name}" for name in self._place if name not in wanted]
        if misplaced:
            raise ValueError(f"{self.path / INDEX} does not fit its files: {listed(misplaced)}; fetch the folder again")


def _files_of(folder: Path) -> tuple[dict[str, str] | None, list[Path]]:
    """What the index says (None without one) and the files of a folder."""
    if (folder / INDEX).is_file():
        wanted = read_json(folder / INDEX).get("weight_map")
        if not isinstance(wanted, dict) or not wanted or not all(isinstance(x, str) for x in wanted.values()):
            raise ValueError(f"{folder / INDEX} has no weight_map from tensors to files")
        names = sorted(set(wanted.values()))
        for name in names:
            try:
                file = inside(folder, name, levels=False)
            except ValueError as error:
                raise ValueError(f"{folder / INDEX} names {error}") from None
            if not file.is_file():
                raise FileNotFoundError(f"{folder / name} is missing, and {INDEX} names it; fetch the folder again")
        return wanted, [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return None, [folder / SINGLE]
    raise FileNotFoundError(f"{folder} has neither {SINGLE} nor {INDEX}")


def read_json(path: str | Path) -> dict:
    """A JSON object; raises ValueError with the place where it breaks off."""
    try:
        found = parse_json(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not whole JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not an object")
    return found


def listed(faults: Sequence[str]) -> str:
    """The first faults, and how many more there are."""
    more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    return "; ".join(fault if len(fault) <= _LONGEST else f"{fault[:_LONGEST]}…" for fault in faults[:_SHOWN]) + more


@contextlib.contextmanager
def _explained(file: Path):
    try:
        yield
    except SafetensorError as error:
        said = str(error)[:300]
        raise ValueError(f"{file} is not a whole safetensors file ({said}); fetch or convert it again") from None
