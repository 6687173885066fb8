"""An any-to-any model in a folder of its own: what `ringjax generate` needs to read and draw, and nothing of training.

    folder/ringjax.json                    the model's config, how its examples look, which image tokenizer it knows
           model.safetensors               the parameters under the paths that they have in the model
           tokenizer/                      the text tokenizer's files
           vision_tokenizer.safetensors    the image tokenizer

`ringjax convert RUN FOLDER` writes one; the one that travels with the package is called `sample:any-to-any`.
"""

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ringjax.data.codes import tokenizer_fingerprint, vision_tokenizer_path
from ringjax.data.config import DataConfig, SourceConfig
from ringjax.data.tokenizers import tokenizer_files
from ringjax.interop.runs import Checkpoint
from ringjax.interop.tensors import read_json
from ringjax.models.config import ModelConfig
from ringjax.models.parallel import Parallel
from ringjax.models.transformer import Transformer, for_decoding
from ringjax.training.load import to_plain
from ringjax.training.run_folder import CODES_OF, TOKENIZER, VISION_TOKENIZER
from ringjax.training.typed import build
from ringjax.training.yaml_tree import ConfigError, to_item

ABOUT, WEIGHTS, FORMAT = "ringjax.json", "model.safetensors", "ringjax-any-to-any-1"
SAMPLE = "sample:any-to-any"
# Of the data's settings those that prompts need.
_DATA = ("codes_per_frame", "vision_codes", "separator", "add_bos", "max_frames", "bidirectional_frames")
_FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_ONE_DEVICE = Parallel()


def is_installed() -> bool:
    """Whether the package came with its own model."""
    from ringjax.data import samples

    return (samples.FOLDER / "any_to_any" / ABOUT).is_file()


def release_folder(name: str | Path) -> Path:
    """The folder of a released model; `sample:any-to-any` is the package's own."""
    from ringjax.data import samples

    if str(name) != SAMPLE:
        return Path(name)
    folder = samples.FOLDER / "any_to_any"
    if not is_installed():
        raise FileNotFoundError(
            f"{SAMPLE} does not come with this version; train one with scripts/any_to_any.sh DATA --small, and name its"
            " folder"
        )
    return folder


def is_release(name: str | Path) -> bool:
    """Whether this is such a folder."""
    return str(name) == SAMPLE or (Path(name) / ABOUT).is_file()


def save_release(found: Checkpoint, target: str | Path, *, dtype: str = "bfloat16") -> None:
    """Write the model of a run's checkpoint; the folder appears whole or not at all.

    Raises ValueError where the run does not name its image tokenizer.
    """
    target, data = Path(target), found.data
    if data.vision_tokenizer is None:
        raise ValueError(
            f"{found.run_dir} does not name its image tokenizer (data.vision_tokenizer), and a folder without it can"
            " neither see nor draw; write the text part: text_only, or an LWM stream (.msgpack)"
        )
    about = {
        "format": FORMAT,
        "model": to_plain(dataclasses.replace(found.config, param_dtype=dtype)),
        "data": {name: getattr(data, name) for name in _DATA},
        "context": found.stage.training.seq_len,
        CODES_OF: found.info.get("notes", {}).get(CODES_OF) or tokenizer_fingerprint(data.vision_tokenizer),
    }
    tensors = {name: np.asarray(leaf).astype(jnp.dtype(dtype)) for name, leaf in _named(nnx.state(found.load()))}
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        (unfinished / TOKENIZER).mkdir()
        for name, content in tokenizer_files(data.tokenizer).items():
            (unfinished / TOKENIZER / name).write_bytes(content)
        shutil.copyfile(vision_tokenizer_path(data.vision_tokenizer), unfinished / VISION_TOKENIZER)
        save_file(tensors, unfinished / WEIGHTS)
        (unfinished / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        for path, mode in ((unfinished, 0o755), (unfinished / WEIGHTS, 0o644)):
            path.chmod(mode)  # temporary ones are private
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class Released:
    """What a folder holds."""

    model: Transformer
    data: DataConfig
    context: int
    codes_of: str


def load_release(name: str | Path, parallel: Parallel = _ONE_DEVICE) -> Released:
    """The model in bfloat16, but float32 on CPUs.

    Raises FileNotFoundError for a missing file, ValueError for one that is damaged or does not fit the others.
    """
    folder = release_folder(name)
    about = read_json(folder / ABOUT)
    if about.get("format") != FORMAT:
        raise ValueError(f"{folder / ABOUT} has format {about.get('format')!r}; this version reads {FORMAT}")
    where = str(folder / ABOUT)
    try:
        config = build(ModelConfig, to_item(about.get("model"), where))
        data = build(DataConfig, to_item({**_mapping(about.get("data")), **_paths(folder)}, where))
    except ConfigError as error:
        raise ValueError("; ".join(error.problems)) from None
    context, codes_of = about.get("context"), about.get(CODES_OF)
    if type(context) is not int or context < 1 or not isinstance(codes_of, str):
        raise ValueError(f"{where}: context must be a whole number above 0 and {CODES_OF} a fingerprint")
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    return Released(for_decoding(_load(folder / WEIGHTS, config, parallel)), data, context, codes_of)


def _mapping(value: Any) -> dict:
    return {name: x for name, x in value.items() if name in _DATA} if isinstance(value, dict) else {}


def _paths(folder: Path) -> dict[str, Any]:
    vision = folder / VISION_TOKENIZER
    tokenizer = str(folder / TOKENIZER) if any((folder / TOKENIZER).glob("*")) else "bytes"
    return {
        "sources": [to_plain(SourceConfig(str(folder)))], "tokenizer": tokenizer, "vision_tokenizer": str(vision)
    }  # fmt: skip


def _named(state: nnx.State) -> list[tuple[str, Any]]:
    return [(".".join(map(str, path)), leaf.get_value()) for path, leaf in nnx.to_flat_state(state)]


def _load(path: Path, config: ModelConfig, parallel: Parallel) -> Transformer:
    graph, abstract = nnx.split(Transformer.abstract(config))
    wanted = dict(_named(abstract))
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; copy the folder again")
    try:
        with safe_open(path, framework="numpy") as file:
            _check(path, file, wanted)
            leaves = {name: file.get_tensor(name) for name in wanted}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({str(error)[:300]}); copy it again") from None
    places = None if parallel.mesh is None else dict(_named(parallel.param_shardings(abstract)))
    loaded = [
        (at, leaf.replace(_placed(leaves[name], config.storage_dtype, places and places[name])))
        for (at, leaf), name in zip(nnx.to_flat_state(abstract), wanted)
    ]
    return nnx.merge(graph, nnx.from_flat_state(loaded))


def _placed(array: np.ndarray, dtype: Any, sharding: Any) -> jax.Array:
    array = array.astype(dtype)
    return jnp.asarray(array) if sharding is None else jax.device_put(array, sharding)


def _check(path: Path, file: Any, wanted: dict[str, Any]) -> None:
    found = set(file.keys())
    faults = [f"{name} is missing" for name in wanted if name not in found]
    faults += [f"{name} is unknown" for name in sorted(found - wanted.keys())]
    for name in wanted.keys() & found:
        piece = file.get_slice(name)
        shape, kind = tuple(piece.get_shape()), piece.get_dtype()
        if shape != wanted[name].shape:
            faults.append(f"{name} is {list(shape)}, not {list(wanted[name].shape)}")
        elif kind not in _FLOATS:
            faults.append(f"{name} is {kind}, not one of {', '.join(_FLOATS)}")
    if faults:
        raise ValueError(f"{path} does not fit {ABOUT}: {'; '.join(sorted(faults)[:8])}")
