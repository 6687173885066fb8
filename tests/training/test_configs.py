"""The shipped configs: they load, fit the machines they name, and agree with the table of stages."""

from pathlib import Path

import jax
import pytest
from flax import nnx

from ringjax.models.sizes import STAGES
from ringjax.models.transformer import Transformer
from ringjax.training.load import check_devices, load_config, load_run, parse_run, to_yaml
from ringjax.training.tasks import make_tasks

CONFIGS = Path(__file__).parents[2] / "configs"
MACHINES = {
    "quickstart": (8, True), "one_gpu": (1, False), "long_1b": (2, False), "long_135m": (2, False),
    "lwm_text": (512, False), "lwm_vision": (512, False), "any_to_any": (1, False), "small_any_to_any": (1, False),
    "extend_135m": (1, False), "extend_135m_lora": (1, False),
}  # fmt: skip
TOKENIZERS = {"vqgan_128": 1, "vqgan_256": 8, "vqgan_small": 1}


def test_every_config_is_tested():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(MACHINES) | set(TOKENIZERS)


@pytest.mark.parametrize("name", MACHINES)
def test_config_fits_its_machine(name):
    config = load_config(CONFIGS / f"{name}.yaml")
    check_devices(config, *MACHINES[name])
    assert parse_run(to_yaml(config)) == config
    first = (CONFIGS / f"{name}.yaml").read_text()
    assert "command" in first and "time" in first  # the header says what to type and how long it takes


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizers_config_fits_its_machine(name):
    config = load_run(CONFIGS / f"{name}.yaml")
    (task,) = make_tasks(config)
    task.check_devices(TOKENIZERS[name])
    assert parse_run(to_yaml(config)) == config
    first = (CONFIGS / f"{name}.yaml").read_text()
    assert "command" in first and "time" in first


def test_quickstart_uses_a_gpu_where_there_is_one():
    check_devices(load_config(CONFIGS / "quickstart.yaml"), 1)


@pytest.mark.parametrize("kind", ["text", "vision"])
def test_lwm_stages_agree_with_the_table(kind):
    stages = load_config(CONFIGS / f"lwm_{kind}.yaml").stage_list
    assert [stage.name for stage in stages] == [row.name for row in STAGES[kind]]
    for stage, row in zip(stages, STAGES[kind]):
        training, optimizer = stage.training, stage.optimizer
        assert (training.seq_len, training.batch_size, training.steps) == (row.seq_len, row.batch_size, row.steps)
        assert stage.model.rope_theta == row.rope_theta
        assert optimizer.learning_rate == row.learning_rate
        constant = row.learning_rate == row.min_learning_rate
        assert optimizer.schedule == ("constant" if constant else "cosine")
        assert constant or optimizer.min_learning_rate == row.min_learning_rate


@pytest.mark.parametrize("name", MACHINES)
def test_models_build_without_allocating(name):
    model = load_config(CONFIGS / f"{name}.yaml").stage_list[0].model
    leaves = jax.tree.leaves(nnx.state(Transformer.abstract(model)))
    assert sum(leaf.size for leaf in leaves) == model.parameter_count()
