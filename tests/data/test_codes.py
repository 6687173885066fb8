"""Codes of one image tokenizer are not those of another: sources that differ are refused."""

import pytest
from flax import nnx

from ringjax.data import codes
from ringjax.data.config import DataConfig, SourceConfig
from ringjax.data.sources import codes_of, open_sources
from ringjax.models.vqgan import VQGAN, load_vqgan, save_vqgan, vqgan_fingerprint
from tests.data.helpers import captioned, write_jsonl
from tests.data.test_tokenize_captions import VQ, pictures, tokenize  # noqa: F401 (a fixture)


@pytest.fixture(scope="module")
def sets(tmp_path_factory, pictures):  # noqa: F811
    """Two data sets of the same pictures by two tokenizers, and one of codes whose tokenizer nobody knows."""
    folder = tmp_path_factory.mktemp("codes")
    save_vqgan(VQGAN(VQ, nnx.Rngs(1)), folder / "other.safetensors")
    for name, path in (("one", pictures / "vqgan.safetensors"), ("two", folder / "other.safetensors")):
        options = dict(fields="[vision],caption", vision_tokenizer=str(path), vision_codes=None)
        tokenize(str(pictures / "captions.jsonl"), folder / name, **options)
    write_jsonl(folder / "codes.jsonl", captioned(3, codes_per_frame=16, vision_codes=32))
    (folder / "one.safetensors").write_bytes((pictures / "vqgan.safetensors").read_bytes())
    return folder


def config(sets, *names, **options) -> DataConfig:
    sources = tuple(SourceConfig(str(sets / name)) for name in names)
    return DataConfig(sources=sources, tokenizer="bytes", codes_per_frame=16, vision_codes=32, **options)


def opened(data: DataConfig) -> str | None:
    return codes_of(open_sources(data, "train")[0], data)


def test_the_data_set_says_who_made_its_codes(sets):
    fingerprint = vqgan_fingerprint(load_vqgan(sets / "one.safetensors"))
    assert opened(config(sets, "one")) == fingerprint == opened(config(sets, "one", "codes.jsonl"))
    assert opened(config(sets, "codes.jsonl")) is None
    named = str(sets / "one.safetensors")
    assert opened(config(sets, "codes.jsonl", vision_tokenizer=named)) == fingerprint
    assert opened(config(sets, "one", vision_tokenizer=named)) == fingerprint


def test_codes_of_two_tokenizers_are_refused(sets):
    with pytest.raises(ValueError, match="source .*two has codes of image tokenizer .* and source .*one of"):
        open_sources(config(sets, "one", "two"), "train")
    named = str(sets / "other.safetensors")
    with pytest.raises(ValueError, match="source .*one has codes of .* and vision_tokenizer .*other.safetensors of"):
        open_sources(config(sets, "one", vision_tokenizer=named), "train")
    with pytest.raises(FileNotFoundError, match="vision_tokenizer 'nowhere' does not exist"):
        open_sources(config(sets, "one", vision_tokenizer="nowhere"), "train")


def test_the_digits_have_their_own():
    assert codes.tokenizer_fingerprint("sample") == vqgan_fingerprint(load_vqgan(codes.vision_tokenizer_path("sample")))
    data = DataConfig(codes_per_frame=16, vision_codes=64)
    assert opened(data) == codes.tokenizer_fingerprint("sample")
