"""LLaVA-1.5 from Hugging Face's folders: the same logits as transformers under every layout; and what is refused."""

import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from ringjax.interop.llava import load_llava, read_folder_preprocessing, read_llava
from ringjax.interop.llava_config import read_llava_config, read_preprocessing
from ringjax.interop.published import open_published
from ringjax.interop.tensors import INDEX
from ringjax.models import Parallel
from tests.interop import llava_small, make_golden, parity
from tests.models import cases

TOLERANCE = 1e-4  # of features and logits of about 10, float32 on both sides
BASE = llava_small.FAMILIES["llava"]


@pytest.fixture(scope="module")
def golden():
    with np.load(make_golden.GOLDEN) as file:
        return dict(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return llava_small.write(tmp_path_factory.mktemp("llava"), BASE)


@pytest.mark.parametrize("name", llava_small.FAMILIES)
def test_features_and_logits_are_those_of_transformers(golden, tmp_path, name):
    """golden.npz: transformers in float32 (tests/interop/make_golden.py). Two pictures in row 0, one in row 1."""
    model = load_llava(llava_small.write(tmp_path, llava_small.FAMILIES[name]))
    assert np.abs(parity.llava_features(model) - golden[f"{name}, features"]).max() <= TOLERANCE
    assert np.abs(parity.llava_logits(model) - golden[f"{name}, logits"]).max() <= TOLERANCE


@pytest.mark.parametrize(
    "shape, layout",
    [
        ((1, 1, 1, 8), "contiguous"),
        ((1, 1, 1, 8), "striped"),
        ((1, 1, 1, 8), "zigzag"),
        pytest.param((2, 1, 2, 2), "zigzag", marks=pytest.mark.slow),
    ],
)
def test_pictures_keep_their_places_under_every_layout(golden, folder, shape, layout):
    parallel = Parallel(cases.mesh(*shape), layout)
    found = parity.llava_logits(load_llava(folder, parallel), parallel)
    assert np.abs(found - golden["llava, logits"]).max() <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", llava_small.FAMILIES)
def test_transformers_says_the_same_today(golden, tmp_path, name):
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    fields = llava_small.FAMILIES[name]
    for part, found in make_golden.llava(llava_small.write(tmp_path, fields), fields).items():
        assert np.abs(found - golden[f"{name}, {part}"]).max() <= TOLERANCE


@pytest.mark.parametrize("scheme", ["4.52", "5", "5 saved"])
def test_names_of_all_versions(folder, tmp_path, scheme):
    other = llava_small.write(tmp_path, BASE, llava_small.renamed(llava_small.weights(BASE), scheme))
    for found, expected in zip(jax.tree.leaves(load_llava(other)), jax.tree.leaves(load_llava(folder))):
        np.testing.assert_array_equal(found, expected)


def test_several_files_with_an_index(folder, tmp_path):
    tensors = llava_small.weights(BASE)
    names, place = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, tmp_path / file)
        place |= dict.fromkeys(part, file)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": place}))
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    for found, expected in zip(jax.tree.leaves(load_llava(tmp_path)), jax.tree.leaves(load_llava(folder))):
        np.testing.assert_array_equal(found, expected)


def test_parameters_lie_where_the_table_says(folder):
    parallel = Parallel(cases.mesh(1, 2, 2, 2))
    model = load_llava(folder, parallel, dtype="bfloat16", param_dtype="bfloat16")
    assert {x.dtype.name for x in jax.tree.leaves(model)} == {"bfloat16"}
    spec = model.vision.h.fc1.kernel[...].sharding.spec
    assert spec == parallel.param_spec((2, 20, 32), ("layers", "embed", "ffn")) and "tp" in spec


def test_what_published_files_leave_out():
    """llava-1.5-7b-hf's config.json, whose text_config has little more than its name."""
    found = read_llava_config({
        "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": 32000,
        "model_type": "llava", "pad_token_id": 32001, "projector_hidden_act": "gelu", "tie_word_embeddings": False,
        "text_config": {
            "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"], "model_type": "llama",
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "torch_dtype": "float16", "vocab_size": 32064},
        "torch_dtype": "float16", "transformers_version": "4.36.0.dev0", "vision_feature_layer": -2,
        "vision_config": {
            "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
            "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
            "vocab_size": 32000},
        "vision_feature_select_strategy": "default", "vocab_size": 32064,
    })  # fmt: skip
    config, text = found.config, found.text
    assert config.features == 576 and config.depths == (23,) and config.vision.layers == 23
    assert (config.text.width, config.text.ffn_width, config.text.layers, config.text.heads) == (4096, 11008, 32, 32)
    assert (text.context, text.bos_id, text.eos_ids) == (4096, 1, (2,))
    bare = {"model_type": "llava", "text_config": {"vocab_size": 32064, "rms_norm_eps": 1e-5}}
    assert read_llava_config(bare).config.vision == config.vision


def changed(section: str | None = None, **changes) -> dict:
    return {**BASE, section: {**BASE[section], **changes}} if section else {**BASE, **changes}


REFUSED = {
    "model": (changed(model_type="llava_next"), "model_type 'llava_next'.*this reads model_type 'llava'"),
    "architecture": (changed(architectures=["LlavaNextForConditionalGeneration"]), "architecture 'LlavaForCond"),
    "unknown": (changed(image_grid_pinpoints=[[1, 2]]), "has image_grid_pinpoints: .*, unknown here"),
    "unknown vision": (changed("vision_config", qk_norm=True), "vision_config has qk_norm: True, unknown here"),
    "unknown text": (changed("text_config", logit_scale=2.0), "text_config has logit_scale: 2.0, unknown here"),
    "siglip": (changed("vision_config", model_type="siglip_vision_model"), "the vision transformer is CLIP's"),
    "vision act": (changed("vision_config", hidden_act="relu"), "hidden_act 'relu' is not supported: there are quick"),
    "act": (changed(projector_hidden_act="silu"), "projector_hidden_act 'silu' is not supported"),
    "quantised": (changed(quantization_config={"bits": 4}), "only weights that are not quantised"),
    "layer": (changed(vision_feature_layer=-4), "vision_feature_layer -4 must name outputs of the 3 blocks"),
    "input": (changed(vision_feature_layer=0), "vision_feature_layer 0 must name outputs of the 3 blocks"),
    "select": (changed(vision_feature_select_strategy="cls"), "select 'cls' is not one of 'default', 'full'"),
    "patch": (changed("vision_config", patch_size=5), "patch_size 5 does not divide image_size 12"),
    "heads": (changed("vision_config", num_attention_heads=3), "heads 3 does not divide width 20"),
    "section": (changed(vision_config=[1]), "vision_config is a list, not an object"),
    "token": (changed(image_token_index="<image>"), "image_token"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    fields, message = REFUSED[name]
    with pytest.raises((ValueError, NotImplementedError), match=message):
        read_llava_config(fields)


def test_where_a_language_model_is_wanted(folder):
    with pytest.raises(NotImplementedError, match="'llava' sees pictures too; open it with .*LlavaModel"):
        open_published(folder)


def test_tensors_that_do_not_fit_are_listed(tmp_path):
    tensors = llava_small.weights(BASE)
    del tensors["multi_modal_projector.linear_2.bias"], tensors["vision_tower.vision_model.pre_layrnorm.weight"]
    tensors["vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias"] = np.zeros(31, np.float32)
    tensors |= {"image_newline": np.zeros(24, np.float32), "vision_tower.vision_model.odd": np.zeros(1, np.float32)}
    with pytest.raises(ValueError) as caught:
        load_llava(llava_small.write(tmp_path, BASE, tensors))
    for part in (
        "missing multi_modal_projector.linear_2.bias", "missing vision_tower.vision_model.pre_layrnorm.weight",
        "unknown image_newline", "unknown vision_tower.vision_model.odd", "layers.0.mlp.fc1.bias is (31,), not (32,)",
    ):  # fmt: skip
        assert part in str(caught.value)


def test_a_head_that_is_not_the_table(tmp_path):
    fields = changed("text_config", tie_word_embeddings=True)
    with pytest.raises(ValueError, match="language_model.lm_head.weight differs from language_model.model.embed_tok"):
        load_llava(llava_small.write(tmp_path, fields, llava_small.weights(BASE)))


def test_folders_without_their_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        read_llava(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no preprocessor_config.json"):
        read_folder_preprocessing(tmp_path, read_llava_config(BASE).config)


@pytest.mark.parametrize("name", llava_small.PROCESSORS)
def test_pictures_are_those_of_transformers(golden, name):
    prepare = read_preprocessing(llava_small.PROCESSORS[name])
    found = np.stack([prepare(picture) for picture in llava_small.pictures()])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, golden[f"pictures, {name}"])


@pytest.mark.slow
@pytest.mark.parametrize("name", llava_small.PROCESSORS)
def test_transformers_prepares_the_same_today(golden, name):
    pytest.importorskip("transformers")
    np.testing.assert_array_equal(make_golden.processed(llava_small.PROCESSORS[name]), golden[f"pictures, {name}"])


CLIP = llava_small.PROCESSORS["clip"]
BAD_PROCESSORS = {
    "kind": ({**CLIP, "image_processor_type": "SiglipImageProcessor"}, "image_processor_type 'SiglipImageProcessor'"),
    "unknown": ({**CLIP, "do_thumbnail": True}, "has do_thumbnail: True, unknown here"),
    "pad": ({**CLIP, "do_pad": True}, "do_pad true is not supported for CLIPImageProcessor"),
    "size": ({**CLIP, "size": {"longest_edge": 3}}, "must have shortest_edge, or height and width"),
    "large": ({**CLIP, "crop_size": 10**9}, "size 1000000000 must be a whole number from 1 to 4096"),
    "filter": ({**CLIP, "resample": 17}, "resample 17 is not one of Pillow's filters"),
    "std": ({**CLIP, "image_std": [0.0, 1, 1]}, "must be above 0"),
    "colours": ({**CLIP, "image_mean": [0.5]}, "must be three finite numbers"),
}


@pytest.mark.parametrize("name", BAD_PROCESSORS)
def test_processors_that_are_refused(name):
    fields, message = BAD_PROCESSORS[name]
    with pytest.raises((ValueError, NotImplementedError), match=message):
        read_preprocessing(fields)


def test_a_processor_of_another_size_and_one_inside_another_file(tmp_path):
    config = read_llava_config(BASE).config
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": CLIP, "patch_size": 4}))
    assert read_folder_preprocessing(tmp_path, config) == read_preprocessing(CLIP)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**CLIP, "crop_size": 24}))
    message = "pictures become (24, 24), and the vision transformer takes (12, 12)"
    with pytest.raises(ValueError, match=re.escape(message)):
        read_folder_preprocessing(tmp_path, config)


@pytest.mark.parametrize("shape, dtype", [((4, 4), "uint8"), ((4, 4, 3), "float32"), ((0, 4, 3), "uint8")])
def test_what_is_no_picture(shape, dtype):
    with pytest.raises(ValueError, match=r"give uint8 \[H, W, 3\], in RGB"):
        read_preprocessing(CLIP)(np.zeros(shape, dtype))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"image_mean": ["a", 1, 1]}, "three finite numbers"),
        ({"rescale_factor": "a"}, "must be a finite number"),
        ({"resample": [3]}, "not one of Pillow's filters"),
        ({"size": [1]}, "preprocessor_config.json: "),
        ({"image_processor_type": ["CLIPImageProcessor"]}, "is not one of"),
        ({"size": {"shortest_edge": 10**400}}, "whole number from 1"),
    ],
)
def test_processors_of_other_kinds(changes, words):
    with pytest.raises((ValueError, NotImplementedError), match=words) as error:
        read_preprocessing({**CLIP, **changes})
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("shape, pad", [((1, 60_000, 3), True), ((1, 60_000, 3), False)])
def test_a_long_thin_picture_would_become_a_large_one(shape, pad):
    kind = {"image_processor_type": "LlavaImageProcessor", "do_pad": True} if pad else {"size": {"shortest_edge": 336}}
    prepare = read_preprocessing({**CLIP, **kind})
    with pytest.raises(ValueError, match="a picture of 1 × 60000 would be .* cut it"):
        prepare(np.zeros(shape, np.uint8))


@pytest.mark.parametrize(
    "section, changes, words",
    [
        ("vision_config", {"num_hidden_layers": 10**9}, "layers 999999999 must be a whole number from 1 to 4096"),
        ("vision_config", {"hidden_act": ["gelu"]}, r"hidden_act \['gelu'\]"),
        ("vision_config", {"hidden_size": 10**400}, "width"),
        ("text_config", {"num_attention_heads": 10**9}, "heads 1000000000 is more than"),
        (None, {"vision_feature_layer": {}}, "must name"),
        (None, {"image_token_index": []}, "image_token"),
        (None, {"projector_hidden_act": {}}, "projector_hidden_act"),
    ],
)
def test_values_of_other_kinds_and_sizes(section, changes, words):
    fields = {**BASE, **changes} if section is None else {**BASE, section: {**BASE[section], **changes}}
    with pytest.raises((ValueError, NotImplementedError), match=words) as error:
        read_llava_config(fields)
    assert len(str(error.value)) < 1000
