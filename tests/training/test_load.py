"""Configs: what is read, what is refused and in which words."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringjax.models.sizes import SIZES
from ringjax.training.load import check_devices, load_config, parse_config, to_yaml
from ringjax.training.yaml_tree import ConfigError

GOOD = """
model:
  size: debug
  rope_theta: 1e6
data: {}
training:
  steps: 10
  seq_len: 1024
stages:
  - {name: a, mesh: {shape: "1,-1,1,2"}}
  - name: b
    model: {rope_theta: 1.0e+7}
    training: {seq_len: 2048}
"""


def problems(text, overrides=()):
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "run.yaml", overrides)
    return caught.value.problems


def test_sizes_stages_and_defaults_are_resolved():
    config = parse_config(GOOD)
    assert config.model == dataclasses.replace(SIZES["debug"], rope_theta=1e6)
    a, b = config.stage_list
    assert (a.mesh.shape, b.mesh.shape) == ("1,-1,1,2", "-1,1,1,1")
    assert (a.training.seq_len, b.training.seq_len) == (1024, 2048)
    assert (a.training.steps, b.training.steps) == (10, 10)
    assert (a.model.rope_theta, b.model.rope_theta) == (1e6, 1e7)


def test_without_stages_the_run_is_one_stage():
    config = parse_config("{model: {size: debug}, data: {}}")
    assert [stage.name for stage in config.stage_list] == ["train"]
    assert config.stage_list[0].training is config.training


def test_resolved_yaml_reads_back_as_the_same_config():
    config = parse_config(GOOD)
    assert parse_config(to_yaml(config)) == config


def test_overrides_reach_stages_that_do_not_set_the_key():
    config = parse_config(GOOD, overrides=[("training.seq_len", "512"), ("stages.1.training.steps", "3")])
    a, b = config.stage_list
    assert (a.training.seq_len, b.training.seq_len) == (512, 2048)
    assert (a.training.steps, b.training.steps) == (10, 3)


@pytest.mark.parametrize(
    "text, message",
    [
        ("model: {size: debug}\ndata: {}\ntrainig: {}", "line 3: unknown key 'trainig'; did you mean 'training'?"),
        ("model: {size: debug}\ndata: {}\ntraining:\n  step: 1", "line 4: unknown key 'training.step'; did you"),
        ("model: {size: debug}\ndata: {}\ntraining: {steps: ten}", "training.steps: 'ten' is not a whole number (int)"),
        ("model: {size: debug}\ndata: {}\ntraining: {steps: 1.5}", "training.steps: 1.5 is not a whole number (int)"),
        ("model: {size: debug}\ndata: {}\ntraining: {steps: true}", "training.steps: True is not a whole number (int)"),
        ("model: {size: debug}\ndata: {}\nrun_dir: 5", 'run_dir: 5 is not text (str); write "5" in quotes'),
        ("model: {size: debug}\ndata: {}\ntraining: 5", "line 3: training must be a mapping of keys, not 5"),
        ("model: {size: debug}\ndata: {}\nstages: {}", "line 3: stages must be a list, not a mapping"),
        ("model: {size: 7c}\ndata: {}", "line 1: model.size: unknown model size '7c'"),
        ("model: {size: debug, kv_heads: 3}\ndata: {}", "line 1: model: kv_heads 3 does not divide heads 2"),
        ("model: {size: debug}\ndata: {}\nmesh:\n  layout: strped", "did you mean 'striped'?"),
        ("model: {size: debug}\ndata: {}\nmesh: {backend: xlaa}", "unknown backend 'xlaa'"),
        ("model: {size: debug}\ndata: {}\nmesh: {strategy: rng}", "did you mean 'ring'?"),
        ("model: {size: debug}\ndata: {}\nmesh: {shape: '1,2,3'}", "'1,2,3' must be four numbers"),
        ("model: {size: debug}\ndata: {}\nmesh: {shape: '-1,-1,1,1'}", "only one axis can be inferred"),
        ("model: {size: debug}\ndata: {}\ntraining: {batch_size: 8, accumulation: 3}", "batch_size 8 cannot be cut"),
        ("model: {size: debug}\nmodel: {size: debug}", "line 2: key 'model' was already given at run.yaml line 1"),
        ("model: {size: debug}", "data is missing and has no default"),
        ("model: [1, 2\ndata: {}", "not valid YAML"),
        ("- a\n- b", "a config is a mapping of sections, not a list"),
        ("model: !!python/object/apply:os.system ['true']", "is not allowed"),
        ("a: &a [x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: &d [*c, *c]\n" + "".join(
            f"{chr(101 + i)}: &{chr(101 + i)} [*{chr(100 + i)}, *{chr(100 + i)}]\n" for i in range(20)), "over 20000"),
        ("a: &a [*a]", "or 32 levels"),
        ("model: {size: debug}\ndata: {}\nstages: [{name: a}, {name: a}]", "stages must have different names"),
        ("model: {size: debug}\ndata: {}\nstages: [{name: a}, {name: b, model: {layers: 3}}]",
         "stage 'b' changes model.layers from 2 to 3"),
        ("model: {size: debug, window: 8, sinks: 2}\ndata: {}", "model.sinks is 2; sinks are for inference"),
    ],
)  # fmt: skip
def test_bad_configs_get_one_clear_line(text, message):
    found = problems(text)
    assert len(found) == 1
    assert message in found[0] and "\n" not in found[0]
    assert found[0].startswith("run.yaml")


def test_all_problems_are_reported_together_and_once():
    text = GOOD.replace("steps: 10", "step: 10").replace("seq_len: 1024", "seq_len: many")
    found = problems(text)
    assert found == [
        "run.yaml line 7: unknown key 'training.step'; did you mean 'steps'?",
        "run.yaml line 8: training.seq_len: 'many' is not a whole number (int)",
    ]


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("training.step", "1", "--training.step: unknown key 'training.step'; did you mean 'steps'?"),
        ("training.steps", "ten", "--training.steps: training.steps: 'ten' is not a whole number (int)"),
        ("stages.7.training.steps", "1", "--stages.7.training.steps: '7' is not an index of this list of 2"),
    ],
)
def test_bad_overrides_name_the_option(key, value, message):
    assert problems(GOOD, [(key, value)]) == [message]


def test_missing_file_names_its_neighbours(tmp_path):
    (tmp_path / "here.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"gone.yaml does not exist; there are .*here.yaml"):
        load_config(tmp_path / "gone.yaml")


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text):
    """Hostile or garbled files raise ConfigError and nothing else."""
    with pytest.raises(ConfigError):
        parse_config(text)


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
            ["model", "data", "training", "steps", "size", "stages", "mesh", "shape", "name"]), inner, max_size=4),
        max_leaves=12,
    )
)  # fmt: skip
def test_any_structure_is_read_or_refused(value):
    import yaml

    try:
        parse_config(yaml.safe_dump({"model": {"size": "debug"}, "data": value, "training": value, "stages": value}))
    except ConfigError as error:
        assert error.problems


@pytest.mark.parametrize(
    "overrides, devices, message",
    [
        ([("mesh.shape", "1,1,1,16")], 8, "asks for 16 devices"),
        ([("mesh.shape", "1,1,1,4")], 8, "uses 4 of 8 devices"),
        ([("mesh.shape", "-1,1,1,3")], 8, "cannot be divided by 3"),
        ([("mesh.shape", "-1,1,1,1"), ("training.batch_size", "6")], 4, "6 rows cannot be divided over dp 4"),
        ([("mesh.shape", "1,1,4,1"), ("training.batch_size", "6")], 4, "tp 4 does not divide heads 2"),
        ([("mesh.shape", "1,1,1,8"), ("training.seq_len", "1001")], 8, "seq_len 1001 cannot be cut into 8 shards"),
        ([("data.vision_codes", "16")], 8, "data.vision_codes 16 and model.vision_codes 8192 differ"),
    ],
)
def test_meshes_are_checked_without_devices(overrides, devices, message):
    config = parse_config("{model: {size: debug}, data: {}}", overrides=overrides)
    with pytest.raises(ConfigError, match=message):
        check_devices(config, devices)
    check_devices(parse_config("{model: {size: debug}, data: {}}"), 8)
