import dataclasses

import jax
import pytest
from flax import nnx

from ringjax.models import SIZES, STAGES, Parallel, Transformer, get_size
from ringjax.models.sizes import stage_config
from tests.models.cases import mesh

# Text parameters (the vision table and head add 2 · 8448 · width); smollm2's is the published count.
COUNTS = {
    "debug": 17_302_784,
    "200m": 212_366_336,
    "1b": 1_244_227_584,
    "3b": 3_426_473_600,
    "7b": 6_738_415_616,
    "13b": 13_015_864_320,
    "30b": 32_528_943_616,
    "65b": 65_285_660_672,
    "smollm2-135m": 134_515_008,
}


@pytest.mark.parametrize("name", SIZES)
def test_builds_abstractly_with_the_right_number_of_parameters(name):
    config = get_size(name)
    state = nnx.state(Transformer.abstract(config))
    leaves = jax.tree.leaves(state)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert sum(leaf.size for leaf in leaves) == config.parameter_count()
    assert config.parameter_count(vision=False) == COUNTS[name]
    if config.vision_vocab_size:
        assert config.parameter_count() == COUNTS[name] + 2 * 8448 * config.width


def test_has_all_sizes_of_lwm():
    assert set(SIZES) == set(COUNTS)
    assert (SIZES["65b"].norm_eps, SIZES["7b"].norm_eps) == (1e-5, 1e-6)


def test_unknown_size_names_the_nearest():
    with pytest.raises(ValueError, match="unknown model size '7B'.*did you mean '7b'"):
        get_size("7B")
    with pytest.raises(ValueError, match="unknown model size 'llama'; the sizes are debug, 200m"):
        get_size("llama")


@pytest.mark.parametrize("schedule", STAGES)
def test_stages_grow_and_are_what_they_say(schedule):
    stages = STAGES[schedule]
    lengths = [stage.seq_len for stage in stages]
    assert lengths == sorted(lengths) and lengths[-1] == 2**20 and len(stages) == 5
    for stage in stages:
        assert stage.batch_size * stage.seq_len == stage.batch_tokens
        # steps · batch is the published number of tokens to within the rounding of the table (4M and 8M = 2²², 2²³)
        assert stage.steps * stage.batch_tokens == pytest.approx(stage.tokens, rel=0.1)


@pytest.mark.parametrize("stage", STAGES["text"], ids=lambda stage: stage.name)
def test_text_stages_fit_their_meshes(stage):
    dp, _, tp, sp = stage.mesh
    config = stage_config(get_size("7b"), stage)
    assert config.rope_theta == stage.rope_theta
    config.validate_mesh(dict(dp=dp, fsdp=512 // (tp * sp), tp=tp, sp=sp), seq_len=stage.seq_len)


def test_a_large_model_lies_on_a_mesh():
    parallel = Parallel(mesh(1, 2, 2, 2))
    state = nnx.state(Transformer.abstract(get_size("7b")))
    shardings = jax.tree.leaves(parallel.param_shardings(state))
    shares = [s.shard_shape(leaf.shape) for s, leaf in zip(shardings, jax.tree.leaves(state))]
    total = sum(jax.ShapeDtypeStruct(shape, "float32").size for shape in shares)
    assert total == pytest.approx(get_size("7b").parameter_count() / 8, rel=1e-3)  # norms are whole on every device


def test_a_size_takes_changes():
    assert dataclasses.replace(get_size("7b"), rope_theta=5e7).parameter_count(False) == COUNTS["7b"]
