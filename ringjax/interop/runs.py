"""Runs of `ringjax train` as models on disk: a checkpoint with its tokenizer, opened as a published model is.

    run_dir/config.yaml   tokenizer/   checkpoints/step_…

A run of adapters alone is merged into the model that it began with, which is read again and must be the same one.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ringjax.data.config import DataConfig
from ringjax.data.tokenizers import SETTINGS, load_tokenizer, tokenizer_files
from ringjax.interop.hf_config import Description
from ringjax.interop.peft import Adapter, adapted
from ringjax.interop.published import Published, open_published
from ringjax.interop.start import open_start
from ringjax.models import lora
from ringjax.models.config import ModelConfig
from ringjax.models.lora import LoraConfig
from ringjax.models.parallel import Parallel
from ringjax.models.transformer import Transformer
from ringjax.training.arrays import CheckpointError, check_same_arrays, describe_arrays, load_arrays
from ringjax.training.begin import check_same_base
from ringjax.training.checkpoint import find_checkpoint, for_inference, placed, restore_params, run_of
from ringjax.training.config import StageConfig
from ringjax.training.manifest import digest_of
from ringjax.training.run_folder import own_tokenizer
from ringjax.training.start import first_params

_ONE_DEVICE = Parallel()


def is_run(path: str | Path) -> bool:
    """Whether this is the folder of a run."""
    return (Path(path) / "config.yaml").is_file()


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of a transformer's run, and what it was made with; `lora`: it holds adapters alone."""

    run_dir: Path
    path: Path
    info: Mapping[str, Any]
    stage: StageConfig
    lora: LoraConfig | None
    seed: int

    @classmethod
    def find(cls, run_dir: str | Path, stage: str | None = None) -> "Checkpoint":
        """The last whole one of a run, or of its stage of this name.

        Raises FileNotFoundError for a folder that is no run, CheckpointError where there is none.
        """
        if not is_run(run_dir):
            raise FileNotFoundError(f"{run_dir} is no run folder: it has no config.yaml; train first (ringjax train)")
        path, info = find_checkpoint(run_dir, stage=stage)
        run = run_of(info, path)
        return cls(Path(run_dir), path, info, run.stage_list[info["stage"]], run.lora, run.seed)

    @property
    def config(self) -> ModelConfig:
        """The model's, for inference: attention is full, whatever saved time in training."""
        return for_inference(self.stage.model)

    @property
    def data(self) -> DataConfig:
        """What it was trained on, with the tokenizer of the run's folder."""
        return own_tokenizer(self.run_dir, self.stage.data)

    def load(self, config: ModelConfig | None = None, parallel: Parallel = _ONE_DEVICE) -> Transformer:
        """The model, adapters merged; `config` differs from the run's in nothing that has a shape."""
        config = config or self.config
        if self.lora is None:
            trained = dataclasses.replace(config, param_dtype=self.config.param_dtype)
            model = restore_params(self.path, self.info, Transformer.abstract(trained), parallel)
        else:
            graph, state = nnx.split(self.adapted(parallel))
            model = lora.merged(nnx.merge(graph, _as(jnp.float32, state)))
        return nnx.merge(nnx.graphdef(Transformer.abstract(config)), _as(config.storage_dtype, nnx.state(model)))

    def adapted(self, parallel: Parallel = _ONE_DEVICE) -> Transformer:
        """The model with its adapters beside it. Raises CheckpointError for another base than the one of training."""
        abstract = lora.abstract(self.config, self.lora)
        trained, _ = lora.split_trained(nnx.state(abstract), self.lora)
        trained = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), trained)
        check_same_arrays(self.info["parameters"], describe_arrays(trained), str(self.path))
        trained = load_arrays(self.path, "params", placed(trained, parallel))
        _, frozen = lora.split_trained(nnx.state(self._base(parallel)), self.lora)
        return nnx.merge(nnx.graphdef(abstract), lora.joined(trained, frozen))

    @property
    def base_config(self) -> ModelConfig:
        """Of the model under the adapters: RoPE and window as they were before this run."""
        start = open_start(self.info["base"]["path"], self.config.heads)
        if start is None:
            return Checkpoint.find(self.info["base"]["path"]).config
        kept = {name: getattr(self.config, name) for name in start.unknown}
        return dataclasses.replace(start.config, **kept)

    def _base(self, parallel: Parallel) -> Transformer:
        saved = self.info["base"]
        start = open_start(saved["path"], self.config.heads)
        if start is not None:
            check_same_base(saved, {"path": saved["path"], "fingerprint": start.fingerprint})
            params, _ = first_params(start, self.config, parallel, self.seed)
            return nnx.merge(nnx.graphdef(Transformer.abstract(self.config)), params)
        below = Checkpoint.find(saved["path"])
        check_same_base(saved, {"path": saved["path"], "fingerprint": digest_of(below.path)})
        return below.load(self.config, parallel)


def _as(dtype: Any, state: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype), state)


def load_run(
    run_dir: str | Path, *, stage: str | None = None, parallel: Parallel = _ONE_DEVICE
) -> tuple[ModelConfig, Transformer]:
    """`restore_model` of any run, one of adapters too."""
    found = Checkpoint.find(run_dir, stage)
    return found.config, found.load(parallel=parallel)


def open_run(run_dir: str | Path, stage: str | None = None) -> Published:
    """A run of a model of text as a published one is. Its context is the length of the rows that it was trained on."""
    found = Checkpoint.find(run_dir, stage)
    tokenizer = load_tokenizer(found.data.tokenizer)
    config = dataclasses.replace(found.config, dtype="float32", param_dtype="float32")
    begins = found.data.add_bos
    description = Description(
        config, found.stage.training.seq_len, tokenizer.bos_id if begins else None, (tokenizer.eos_id,)
    )
    return Published(Path(run_dir), description, _tokenizer(found), found.load, begins, digest_of(found.path))


def open_model(path: str | Path, stage: str | None = None, adapter: str | Path | None = None) -> Published:
    """A published model, or a run of a model of text (of its last stage, or of `stage`), with a LoRA `adapter`."""
    if is_run(path):
        found = open_run(path, stage)
    elif stage is not None:
        raise ValueError(f"stage {stage!r} is for the folder of a run, and {path} is none; leave it out")
    else:
        found = open_published(path)
    return found if adapter is None else adapted(found, Adapter.read(adapter))


def _tokenizer(found: Checkpoint) -> Path | dict[str, str]:
    spec = found.data.tokenizer
    if Path(spec).is_dir():
        return Path(spec)
    files = tokenizer_files(spec)
    if not files:
        raise CheckpointError(f"{found.run_dir}: the tokenizer {spec!r} has no file; use ringjax generate for it")
    if "tokenizer.model" in files:
        return Path(spec).parent
    texts = {name: content.decode() for name, content in files.items()}
    return {SETTINGS: json.dumps({}), **texts}
