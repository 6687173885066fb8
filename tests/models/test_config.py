import dataclasses

import pytest

from ringjax.models import ModelConfig, RopeScaling
from tests.models.cases import SMALL


def test_defaults_follow_from_the_other_fields():
    config = ModelConfig(width=64, ffn_width=128, layers=1, heads=4)
    assert (config.key_heads, config.head_size) == (4, 16)
    assert (config.end_of_frame, config.end_of_vision) == (8192, 8193)
    hash(dataclasses.replace(config, rope_scaling=RopeScaling("linear", 2.0)))  # static under jit


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(kv_heads=3), r"kv_heads 3 does not divide heads 4.*one of 1, 2, 4"),
        (dict(head_dim=7), "head_dim 7 is odd.*use 8"),
        (dict(width=12, heads=4, kv_heads=4), "head_dim 3 is odd"),
        (dict(width=30), "heads 4 does not divide width 30; set head_dim"),
        (dict(layers=0), "layers 0 must be a whole number of at least 1"),
        (dict(ffn_width=2.5), "ffn_width 2.5 must be a whole number"),
        (dict(heads=True), "heads True must be a whole number"),
        (dict(window=0), "window 0 must be"),
        (dict(ffn_chunk=-1), "ffn_chunk -1 must be"),
        (dict(loss_chunk=0), "loss_chunk 0 must be"),
        (dict(rope_theta=0.0), "rope_theta 0.0 must be a finite number above 0"),
        (dict(norm_eps=float("nan")), "norm_eps nan must be"),
        (dict(softcap=-1.0), "softcap -1.0 must be"),
        (dict(dtype="bfloat"), "dtype 'bfloat' is not one of .*did you mean 'bfloat16'"),
        (dict(remat="save_atention"), "remat 'save_atention' is not one of .*did you mean 'save_attention'"),
        (dict(vision_vocab_size=13), "vision_vocab_size 13 must hold vision_codes 12 codes and two end marks.*14"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        dataclasses.replace(SMALL, **changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(kind="ntk", factor=2.0), "rope_scaling.kind 'ntk' is not one of"),
        (dict(kind="linear", factor=0.5), "factor 0.5 must be a number of at least 1"),
        (dict(kind="yarn", factor=4.0), "needs original_max_position"),
        (dict(kind="llama3", factor=8.0, original_max_position=8192, low_freq_factor=4.0), "low_freq_factor 4.0"),
        (dict(kind="yarn", factor=8.0, original_max_position=8192, beta_fast=0.5), "beta_slow 1.0"),
        (dict(kind="yarn", factor=8.0, original_max_position=8192, mscale=1.0), "mscale and mscale_all_dim"),
    ],
)
def test_refuses_rope_scaling(options, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**options)


@pytest.mark.parametrize(
    "shape, options, message",
    [
        (dict(tp=3), {}, "tp 3 neither divides kv_heads 2 nor is a multiple"),
        (dict(tp=8), {}, "tp 8 does not divide heads 4; use a tp that divides 4"),
        (dict(sp=4), dict(seq_len=30), "seq_len 30 cannot be cut into 4 shards"),
        (dict(sp=4), dict(seq_len=36, layout="zigzag"), "36 cannot be cut into 2·sp = 8 chunks.*'striped'"),
        (dict(dp=2, fsdp=2), dict(batch=6), "batch 6 cannot be cut over dp·fsdp = 4"),
        (dict(sp=4), dict(seq_len=32, layout="stripes"), "unknown layout 'stripes'.*did you mean 'striped'"),
    ],
)
def test_refuses_a_mesh(shape, options, message):
    with pytest.raises(ValueError, match=message):
        SMALL.validate_mesh(shape, **options)


def test_refuses_a_mesh_that_cuts_a_vocabulary():
    config = dataclasses.replace(SMALL, vocab_size=41)
    with pytest.raises(ValueError, match="tp 2 does not divide vocab_size 41.*pad the vocabulary"):
        config.validate_mesh({"tp": 2})


def test_accepts_meshes_that_fit():
    SMALL.validate_mesh({"dp": 1, "fsdp": 2, "tp": 4, "sp": 8}, seq_len=64, layout="zigzag", batch=4)
    SMALL.validate_mesh({})


@pytest.mark.parametrize(
    "name", ["layers", "heads", "width", "ffn_width", "vocab_size", "head_dim", "window", "kv_heads", "unroll"]
)
@pytest.mark.parametrize("size", [10**10, 10**400], ids=["large", "huge"])
def test_sizes_without_bounds_are_refused_before_they_are_counted_up_to(name, size):
    """kv_heads that do not divide a number of heads are told with all that do: a loop over 10 ** 18 of them."""
    with pytest.raises(ValueError, match=f"{name} .* is more than [0-9]+, the most") as error:
        dataclasses.replace(SMALL, **{name: size})
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("name", ["low_freq_factor", "beta_fast", "attention_factor", "mscale"])
@pytest.mark.parametrize("value", ["a", [1], float("nan"), 10**400, True], ids=["text", "list", "nan", "huge", "bool"])
def test_rope_scaling_takes_numbers(name, value):
    with pytest.raises(ValueError, match=f"rope_scaling.({name}|low_freq_factor|beta_slow)"):
        RopeScaling("yarn", 2.0, original_max_position=16, **{name: value})
