"""A run's folder as a published model: its text is asked, and its perplexity measured, by the same programs.

The tokenizer is the one that lies in the folder, with what its settings say of the begin token, so that a run and the
model that it began with read the same tokens. Tables and heads of pictures stay where they are and are not asked.
"""

import dataclasses
import functools
from pathlib import Path

import jax
from flax import nnx

from ringjax.data.config import DataConfig
from ringjax.data.tokenizers import load_tokenizer
from ringjax.interop.hf_config import Description
from ringjax.interop.published import Published, is_published, open_published
from ringjax.models.config import ModelConfig
from ringjax.models.parallel import Parallel
from ringjax.models.transformer import Transformer, with_config
from ringjax.training.checkpoint import restore_model
from ringjax.training.load import load_config
from ringjax.training.run_folder import TOKENIZER, own_tokenizer


def is_run(path: str | Path) -> bool:
    """Whether this is the folder of a run, and no published model."""
    return (Path(path) / "config.yaml").is_file() and not is_published(path)


def open_text(path: str | Path) -> Published:
    """A run's folder, a Hugging Face folder or a .gguf file; raises as `open_published` does."""
    return _open_run(Path(path)) if is_run(path) else open_published(path)


@dataclasses.dataclass(frozen=True)
class RunText(Published):
    """A run as a published model."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)

    @functools.cached_property
    def settings(self) -> dict:
        """Those beside its tokenizer; where there are none, texts begin as its examples did."""
        found = super().settings if isinstance(self.tokenizer, Path) else {}
        return found or {"add_bos_token": self.data.add_bos}


def _open_run(path: Path) -> RunText:
    stage = load_config(path / "config.yaml").stage_list[-1]
    data = own_tokenizer(path, stage.data)
    tokenizer = load_tokenizer(data.tokenizer)
    # The context is that of the last stage's rows, whatever the model that the run began with was trained for.
    description = Description(stage.model, stage.training.seq_len, tokenizer.bos_id, (tokenizer.eos_id,))
    folder = path / TOKENIZER
    return RunText(
        path, description, folder if folder.is_dir() else tokenizer, functools.partial(_load, path), data
    )  # fmt: skip


def _load(path: Path, config: ModelConfig, parallel: Parallel) -> Transformer:
    """The parameters of the last whole checkpoint, in the type of `config`."""
    _, model = restore_model(path, parallel=parallel)
    graph, state = nnx.split(model)
    cast = jax.jit(lambda tree: jax.tree.map(lambda x: x.astype(config.param_dtype), tree))
    changes = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(model.config, field.name)
    }
    return with_config(nnx.merge(graph, cast(state)), **changes)
