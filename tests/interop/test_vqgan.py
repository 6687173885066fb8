"""diffusers' VQModel as our VQGAN: the same latents, codes and pictures; and what is refused."""

import json

import jax
import numpy as np
import pytest

from ringjax.interop.vqgan import load_vqmodel, read_vqmodel_config
from ringjax.models.vqgan import LWM
from tests.interop import make_golden, parity, vqgan_small

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def golden():
    with np.load(make_golden.GOLDEN) as file:
        return {name.removeprefix("vqgan, "): x for name, x in file.items() if name.startswith("vqgan, ")}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_vqmodel(vqgan_small.write(tmp_path_factory.mktemp("vqgan")), vqgan_small.RESOLUTION)


def test_encoder_and_decoder_are_those_of_diffusers(golden, model):
    """golden.npz: diffusers in float32 (tests/interop/make_golden.py)."""
    found = parity.vqgan_parts(model)
    np.testing.assert_array_equal(found["codes"], golden["codes"])
    assert len(np.unique(golden["codes"])) > 10
    for part in ("latents", "pictures"):
        assert np.abs(found[part] - golden[part]).max() <= TOLERANCE
    decoded = np.asarray(jax.jit(model.decode)(golden["codes"]))
    assert np.abs(decoded - np.clip(golden["pictures"], -1, 1)).max() <= TOLERANCE


@pytest.mark.slow
def test_diffusers_says_the_same_today(golden, tmp_path):
    pytest.importorskip("diffusers")
    for part, found in make_golden.vqgan(vqgan_small.write(tmp_path)).items():
        assert np.abs(found - golden[part]).max() <= TOLERANCE


def test_the_published_size_is_that_of_lwm():
    fields = {
        **vqgan_small.FIELDS, "block_out_channels": [128, 256, 256, 512, 768], "latent_channels": 64,
        "down_block_types": ["DownEncoderBlock2D"] * 5, "up_block_types": ["UpDecoderBlock2D"] * 5,
        "num_vq_embeddings": 8192, "vq_embed_dim": 64, "norm_num_groups": 32,
    }  # fmt: skip
    assert read_vqmodel_config(fields, 256) == LWM


REFUSED = {
    "class": ({"_class_name": "AutoencoderKL"}, "_class_name 'AutoencoderKL' is not supported: VQModel is"),
    "attention": ({"mid_block_add_attention": True}, "mid_block_add_attention True is not supported"),
    "norm": ({"norm_type": "spatial"}, "norm_type 'spatial' is not supported: it must be 'group'"),
    "unknown": ({"use_quant_conv": False}, "has use_quant_conv, unknown here"),
    "blocks": ({"down_block_types": ["AttnDownEncoderBlock2D"] * 3}, "must be a DownEncoderBlock2D for each"),
    "widths": ({"block_out_channels": [8, 12, 16]}, r"\[8, 12, 16\] must be multiples of the first"),
    "groups": ({"norm_num_groups": 3}, "not divisible by norm_groups 3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    changes, message = REFUSED[name]
    with pytest.raises((ValueError, NotImplementedError), match=message):
        read_vqmodel_config({**vqgan_small.FIELDS, **changes}, vqgan_small.RESOLUTION)


def test_tensors_that_do_not_fit_are_listed(tmp_path):
    tensors = vqgan_small.weights()
    del tensors["quant_conv.bias"]
    tensors |= {"odd": np.zeros(1, np.float32), "encoder.conv_in.weight": np.zeros((8, 3, 1, 1), np.float32)}
    with pytest.raises(ValueError) as caught:
        load_vqmodel(vqgan_small.write(tmp_path, tensors), vqgan_small.RESOLUTION)
    for part in ("missing quant_conv.bias", "unknown odd", "encoder.conv_in.weight is (8, 3, 1, 1), not (8, 3, 3, 3)"):
        assert part in str(caught.value)


def test_a_folder_without_its_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no config.json; is it the folder of a diffusers VQModel"):
        load_vqmodel(tmp_path)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"block_out_channels": []}, "is not a list of widths"),
        ({"block_out_channels": [0, 8]}, "is not a list of widths"),
        ({"block_out_channels": ["a"]}, "is not a list of widths"),
        ({"down_block_types": [[]]}, "is not a list of names"),
        ({"up_block_types": 3}, "is not a list of names"),
        ({"act_fn": "x" * 70_000}, "act_fn"),
        ({"norm_num_groups": 10**400}, "norm_groups"),
        ({"_class_name": "x" * 70_000}, "_class_name"),
    ],
)
def test_values_of_other_kinds(changes, words):
    with pytest.raises((ValueError, NotImplementedError), match=words) as error:
        read_vqmodel_config({**vqgan_small.FIELDS, **changes}, 16)
    assert str(error.value).startswith("config.json") and len(str(error.value)) < 1000


def test_more_blocks_than_the_file_can_hold_are_refused_at_once(tmp_path):
    folder = vqgan_small.write(tmp_path, vqgan_small.weights())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layers_per_block": 16}))
    with pytest.raises(ValueError, match="residual blocks of 8 tensors each, and .* holds [0-9]+ tensors"):
        load_vqmodel(folder, vqgan_small.RESOLUTION)
