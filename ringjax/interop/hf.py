"""Hugging Face folders in and out: config.json, safetensors (one file or several with an index), the tokenizer's files.

    folder/config.json  model.safetensors | model-00001-of-00003.safetensors … model.safetensors.index.json
           tokenizer.json | tokenizer.model  tokenizer_config.json  generation_config.json
"""

import dataclasses
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from ringjax.data.tokenizers import FILES
from ringjax.interop.hf_config import Description, read_hf_config, write_hf_config
from ringjax.interop.load import load_params
from ringjax.interop.names import HF_OUTER, hf_recipes
from ringjax.interop.tensors import INDEX, SINGLE, SafetensorsSource, TensorSource, read_json
from ringjax.models.config import ModelConfig
from ringjax.models.parallel import Parallel
from ringjax.models.transformer import Transformer

SHARD_BYTES = 5 * 2**30
_ONE_DEVICE = Parallel()
# Buffers that old files hold; they follow from the config.
_BUFFERS = re.compile(r"(^|\.)rotary_emb\.(inv_freq|(cos|sin)_cached)$")


def read_description(folder: str | Path) -> Description:
    """What config.json says, and generation_config.json of the tokens that end an answer."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json; is it a Hugging Face model folder?")
    fields = read_json(folder / "config.json")
    if (folder / "generation_config.json").is_file():
        ends = read_json(folder / "generation_config.json").get("eos_token_id")
        fields = fields if ends is None else {**fields, "eos_token_id": ends}
    return read_hf_config(fields, str(folder / "config.json"))


def load_hf(
    folder: str | Path, parallel: Parallel = _ONE_DEVICE, *, dtype: str = "float32", param_dtype: str = "float32"
) -> Transformer:
    """The model of a Hugging Face folder, streamed to the devices of `parallel`.

    Raises FileNotFoundError for missing files, ValueError for damaged ones or tensors that do not fit config.json,
    NotImplementedError for a model that this library does not have.
    """
    config = dataclasses.replace(read_description(folder).config, dtype=dtype, param_dtype=param_dtype)
    return load_weights(folder, config, parallel)


def load_weights(folder: str | Path, config: ModelConfig, parallel: Parallel) -> Transformer:
    """The model of `config` with the tensors of a folder."""
    source, recipes = SafetensorsSource(folder), hf_recipes(config)
    return load_params(config, source, recipes, parallel, ignored=left_aside(source, config, HF_OUTER))


def left_aside(source: TensorSource, config: ModelConfig, outer: Mapping[str, str]) -> Callable[[str], bool]:
    """Which tensors of a language model are not read: old files' buffers, and a head that is the table.

    `outer` names the head and the table. Raises ValueError where embeddings are tied and the head is another.
    """
    head = outer["lm_head/kernel"] if config.tie_embeddings else None
    if head in source.shapes:
        _require_tied(source, head, outer["wte/embedding"])
    return lambda name: name == head or bool(_BUFFERS.search(name))


def _require_tied(source: TensorSource, head: str, table: str) -> None:
    """A head beside tied embeddings must be the table; else either the file or its config is wrong."""
    shape = source.shapes[head]
    if source.shapes.get(table) != shape:
        raise ValueError(f"{source.path}: {head} is {shape}, and config.json says that it is {table}")
    rows = 4096
    for first in range(0, shape[0], rows):
        index = slice(first, min(first + rows, shape[0])), slice(None)
        if not np.array_equal(source.read(head, index), source.read(table, index)):
            raise ValueError(
                f"{source.path}: {head} differs from {table} in rows {first} … {index[0].stop - 1}, and config.json has"
                " tie_word_embeddings true; set it to false to load both"
            )


def save_hf(
    model: Transformer,
    folder: str | Path,
    *,
    context: int,
    dtype: str = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
    tokenizer: str | Path | Mapping[str, str] | None = None,
    tokens: Mapping[str, object] | None = None,
) -> Path:
    """Writes `model` (a text model) as a Hugging Face folder, a shard at a time; gives the folder.

    `context` is its max_position_embeddings. `tokenizer` is a folder or file whose tokenizer files come along, or their
    texts by name; `tokens` are fields such as eos_token_id. The folder appears when it is whole. Raises FileExistsError
    where there is one, NotImplementedError for a model that no Hugging Face class has.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; give another name, or remove it")
    config = write_hf_config(model.config, context, dtype, **(tokens or {}))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as unfinished:
        made = Path(unfinished, "folder")
        made.mkdir()
        (made / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        _copy_tokenizer(tokenizer, made)
        _write_shards(_tensors(model, dtype), made, shard_bytes)
        made.rename(folder)
    return folder


def _tensors(model: Transformer, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor in Hugging Face's form, one at a time."""
    params = dict(nnx.to_flat_state(nnx.state(model)))
    for path, recipe in hf_recipes(model.config).items():
        value = params[path].get_value()
        if not value.is_fully_addressable:
            raise NotImplementedError(f"{'/'.join(path)} lies on several processes; convert a checkpoint on one host")
        for i, name in enumerate(recipe.names):
            one = np.asarray(value[i] if recipe.stacked else value).astype(jnp.dtype(dtype))
            yield name, np.ascontiguousarray(recipe.write(one))


def _write_shards(tensors: Iterator[tuple[str, np.ndarray]], folder: Path, most: int) -> None:
    """One file, or several of at most `most` bytes (a larger tensor has one to itself) and their index."""
    shards: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    total = 0

    def write() -> None:
        shards.append(list(held))
        file = folder / f"{len(shards)}.part"
        save_file(held, file, metadata={"format": "pt"})
        file.chmod((folder / "config.json").stat().st_mode)  # safetensors makes it readable to its owner only
        held.clear()

    for name, tensor in tensors:
        if held and sum(x.nbytes for x in held.values()) + tensor.nbytes > most:
            write()
        held[name] = tensor
        total += tensor.nbytes
    write()
    if len(shards) == 1:
        (folder / "1.part").rename(folder / SINGLE)
        return
    place = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        place |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": place}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _copy_tokenizer(tokenizer: str | Path | Mapping[str, str] | None, folder: Path) -> None:
    if tokenizer is None:
        return
    if isinstance(tokenizer, Mapping):
        for name, text in tokenizer.items():
            (folder / name).write_text(text, encoding="utf-8")
        return
    path = Path(tokenizer)
    files = [path] if path.is_file() else [path / name for name in FILES if (path / name).is_file()]
    for file in files:
        shutil.copyfile(file, folder / file.name)
