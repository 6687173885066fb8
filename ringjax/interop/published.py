"""A published model on disk, whatever its form: described first, loaded when it is known where it goes.

    folder with config.json     Hugging Face
    file.gguf                   llama.cpp, dequantised
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from ringjax.data.tokenizers import gguf_files
from ringjax.interop import hf
from ringjax.interop.hf_config import Description
from ringjax.interop.load import load_params
from ringjax.interop.names import gguf_recipes
from ringjax.interop.tensors import read_json
from ringjax.json_text import parse_json
from ringjax.models.config import ModelConfig
from ringjax.models.parallel import Parallel
from ringjax.models.transformer import Transformer

_ONE_DEVICE = Parallel()


@dataclasses.dataclass(frozen=True)
class Published:
    """A model of another project: its shape, its tokenizer's files as texts or as a folder, and a way to load it."""

    path: Path
    description: Description
    tokenizer: Path | Mapping[str, str]
    _load: Callable[[ModelConfig, Parallel], Transformer]
    begins: bool | None = None
    """Whether every text begins with the begin token; None: as the tokenizer says."""
    _fingerprint: str | None = None

    def load(
        self, parallel: Parallel = _ONE_DEVICE, *, dtype: str = "float32", param_dtype: str = "float32", **changes
    ) -> Transformer:
        """The model, streamed to the devices of `parallel`; `changes` to its config alter no shape (rope_theta, …)."""
        config = dataclasses.replace(self.description.config, dtype=dtype, param_dtype=param_dtype, **changes)
        return self._load(config, parallel)

    def load_config(self, config: ModelConfig, parallel: Parallel) -> Transformer:
        """The model under a `config` that differs from its own in nothing that has a shape."""
        return self._load(config, parallel)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A short name of its contents."""
        return self._fingerprint or file_fingerprint(self.path)

    @functools.cached_property
    def settings(self) -> dict:
        """tokenizer_config.json, with the chat template of its own file, if there is one; empty without."""
        texts = self.tokenizer if isinstance(self.tokenizer, Mapping) else None
        if texts is not None:
            return parse_json(texts["tokenizer_config.json"])
        path, template = self.tokenizer / "tokenizer_config.json", self.tokenizer / "chat_template.jinja"
        found = read_json(path) if path.is_file() else {}
        if not template.is_file():
            return found
        try:
            return {**found, "chat_template": template.read_text("utf-8")}
        except UnicodeDecodeError as error:
            raise ValueError(f"{template} is not UTF-8 text (byte {error.start})") from None


def is_published(path: str | Path) -> bool:
    """Whether this looks like a published model, not like a run folder of `ringjax train`."""
    path = Path(path)
    return path.suffix == ".gguf" or (path / "config.json").is_file()


def open_published(path: str | Path) -> Published:
    """The model at `path`.

    Raises FileNotFoundError where there is none, ValueError for damaged files, NotImplementedError for a model that
    this library does not have.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no model at {path}; give a Hugging Face folder or a .gguf file (hubs are not asked)")
    if path.is_dir():
        description = hf.read_description(path)
        return Published(path, description, path, functools.partial(hf.load_weights, path))
    if path.suffix == ".gguf":
        return _gguf(path)
    raise ValueError(f"{path} is no model: give a folder with config.json, or a .gguf file")


def _gguf(path: Path) -> Published:
    from ringjax.interop import gguf

    source = gguf.GgufSource(path)
    config, context = gguf.gguf_config(source)
    texts = gguf_files(path)
    bos, eos = (source.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos"))
    description = Description(config, context, bos, () if eos is None else (eos,))

    def load(config: ModelConfig, parallel: Parallel) -> Transformer:
        recipes = gguf_recipes(config, split_halves=gguf.gguf_split_halves(source))
        # Factors of RoPE as a tensor: `gguf_config` has refused any that are not 1.
        return load_params(config, source, recipes, parallel, ignored=lambda name: name == "rope_freqs.weight")

    return Published(path, description, texts, load)


def file_fingerprint(path: str | Path) -> str:
    """A short name of a model's files: their names, sizes, beginnings and ends (not all of what may be terabytes)."""
    source, size = Path(path), 1 << 16
    digest = hashlib.sha256()
    for file in [source] if source.is_file() else sorted(f for f in source.iterdir() if f.is_file()):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
        with open(file, "rb") as data:
            digest.update(data.read(size))
            data.seek(max(0, file.stat().st_size - size))
            digest.update(data.read(size))
    return digest.hexdigest()[:16]
