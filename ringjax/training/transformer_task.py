"""The transformer as the training loop sees it: tokens in, next-token loss out."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ringjax.data.codes import agreed, tokenizer_fingerprint, vision_tokenizer_path
from ringjax.data.sources import codes_of, open_sources
from ringjax.data.tokenizers import load_tokenizer, tokenizer_files
from ringjax.models.lora import LoraConfig, also_count
from ringjax.models.parallel import Parallel
from ringjax.training import progress
from ringjax.training.config import StageConfig
from ringjax.training.evaluate import Evaluator
from ringjax.training.feed import Feed, check_stage_data
from ringjax.training.load import check_stage_devices
from ringjax.training.mesh import is_simulated
from ringjax.training.run_folder import CODES_OF, TOKENIZER, VISION_TOKENIZER
from ringjax.training.start import OpenStart, Start, first_params, open_published
from ringjax.training.step import Trainer, make_trainer, readable
from ringjax.training.task import Measured, Task, TrainState
from ringjax.training.utilisation import flops_of, mfu, tokens_of


class TransformerTask(Task):
    """One stage of a transformer's run, of all its parameters or of adapters (`lora`)."""

    stage: StageConfig
    plot_lines = (("text_loss", "text", "tab:blue"), ("vision_loss", "pictures", "tab:orange"))
    plot_label = "loss (nats a token)"

    def __init__(self, stage: StageConfig, lora: LoraConfig | None = None):
        super().__init__(stage)
        self.lora = lora

    def check_devices(self, device_count: int) -> None:
        check_stage_devices(self.stage, device_count, is_simulated())

    def check_data(self) -> None:
        check_stage_data(self.stage)

    def data_facts(self) -> dict[str, str]:
        data = self.stage.data
        found = {f"tokenizer {data.tokenizer}": load_tokenizer(data.tokenizer).fingerprint}
        if data.vision_tokenizer is not None:
            found[f"image tokenizer {data.vision_tokenizer}"] = tokenizer_fingerprint(data.vision_tokenizer)
        for split in ("train", "heldout")[: 2 if self.stage.training.eval_every else 1]:
            for number, source in enumerate(open_sources(data, split)[0]):
                found[f"{split} data {number} ({source.name})"] = source.fingerprint
        return found

    def trainer(self, mesh: Mesh, seed: int, start: int) -> Trainer:
        stage, training = self.stage, self.stage.training
        return make_trainer(
            stage.model, stage.optimizer, self._parallel(mesh), steps=training.steps, start=start,
            donate=not training.debug_nans, lora=self.lora, seed=seed if stage.model.dropout else 0,
        )  # fmt: skip

    def _parallel(self, mesh: Mesh) -> Parallel:
        config = self.stage.mesh
        return Parallel(mesh, config.layout, config.strategy, config.backend, host_size=config.host_size)

    def base(self, trainer: Trainer) -> Any:
        return trainer.base

    def first_state(self, trainer: Trainer, params: Any, seed: int) -> TrainState:
        return trainer.begin(params, seed)

    def files(self) -> dict[str, bytes]:
        data = self.stage.data
        found = {f"{TOKENIZER}/{name}": text for name, text in tokenizer_files(data.tokenizer).items()}
        if data.vision_tokenizer is not None:
            found[VISION_TOKENIZER] = vision_tokenizer_path(data.vision_tokenizer).read_bytes()
        return found

    def noted(self, before: dict[str, Any], where: str) -> dict[str, Any]:
        agreed([(where, before.get(CODES_OF)), ("the data", self._codes_of)])
        return before if self._codes_of is None else {**before, CODES_OF: self._codes_of}

    @functools.cached_property
    def _codes_of(self) -> str | None:
        """The image tokenizer of the data, as far as it is known."""
        sources, _ = open_sources(self.stage.data, "train")
        return codes_of(sources, self.stage.data)

    def open_start(self, path: str, opener: OpenStart | None) -> Start | None:
        return open_published(path, self.stage.model.heads, opener)

    def first_params(self, start: Start, mesh: Mesh, seed: int) -> tuple[Any, list[str]]:
        return first_params(start, self.stage.model, self._parallel(mesh), seed)

    def feed(self, mesh: Mesh, seed: int, state: dict[str, Any] | None, say: Callable[[str], None]) -> Feed:
        return Feed(self.stage, mesh, seed, state)

    def evaluator(self, trainer: Trainer, feed: Feed, seed: int) -> Evaluator:
        return Evaluator(self.stage, trainer, feed, seed)

    def amount(self) -> str:
        training, mesh = self.stage.training, self.stage.mesh
        return f"{training.batch_size} × {training.seq_len} tokens a step, {mesh.layout} {mesh.strategy}"

    def readable(self, metrics: dict[str, float]) -> Measured:
        return readable(metrics)

    def speed(self, parameters: int, seconds: float, rows: Mapping[str, np.ndarray]) -> Measured:
        devices, flops = jax.devices(), step_flops(self.stage, self.lora, parameters, rows)
        return {
            "tokens_per_second": tokens_of(rows) / _share(self.stage, rows) / seconds,
            "mfu": mfu(flops, seconds, devices[0].device_kind, len(devices)),
        }

    def describe(self, record: dict[str, Any]) -> str:
        return progress.describe(record)

    def describe_evaluation(self, results: dict[str, Measured]) -> str:
        words = ", ".join(f"{source} {values['loss']:.4f}" for source, values in results.items())
        return f"held-out loss {words}"


def step_flops(stage: StageConfig, lora: LoraConfig | None, trained: int, rows: Mapping[str, np.ndarray]) -> float:
    """Useful FLOPs of a step that changes so many parameters, counted on the host from this process's rows."""
    frozen = 0 if lora is None else stage.model.parameter_count() - also_count(stage.model, lora)
    return flops_of(rows, stage.model, trained, frozen=frozen) / _share(stage, rows)


def _share(stage: StageConfig, rows: Mapping[str, np.ndarray]) -> float:
    """How much of the batch this process's rows are.

    Rows that other processes load count as these do, so that no step waits for a sum: exact where a process has all
    rows, right on average elsewhere, for the data is dealt to all alike.
    """
    return len(rows["behind"]) / stage.training.batch_size
