"""Dropped captions: only those of drawings, about as many as asked, the same after a resume, others in each epoch."""

import numpy as np
import pytest

from ringjax.data.config import DataConfig, SourceConfig
from ringjax.data.fields import FieldEncoder
from ringjax.data.guidance import Unconditional, is_dropped
from ringjax.data.loader import make_loader
from ringjax.data.tokenizers import ByteTokenizer
from tests.data.helpers import same_batches, write_jsonl

ENCODER = FieldEncoder(ByteTokenizer(), codes_per_frame=4, vision_codes=100)
ROW = {"a": "a cat", "b": "more", "v": [1, 2, 3, 4], "clip": [1, 2, 3, 4, 5, 6, 7, 8]}


@pytest.mark.parametrize(
    "spec, bare", [("[a],v", "v"), ('["Draw"+a,b],clip', "clip"), ("[<|bos|>,a],v", "<|bos|>,v"), ("[a],v,b", "v,b")]
)
def test_a_drawing_without_its_words_is_what_guidance_asks_for(spec, bare):
    found, wanted = Unconditional(ByteTokenizer()).of(ENCODER.encode(ROW, spec)), ENCODER.encode(ROW, bare)
    for name in ("tokens", "modality"):
        assert np.array_equal(getattr(found, name), getattr(wanted, name))
    assert found.loss[1:].all() and found.loss_tokens == ENCODER.encode(ROW, spec).loss_tokens


@pytest.mark.parametrize("spec", ["[v],a", "a", "[a],b", "a,v", "v,a", "[a,v],clip", "[a],v,[b]", "v"])
def test_everything_else_keeps_its_words(spec):
    assert Unconditional(ByteTokenizer()).of(ENCODER.encode(ROW, spec)) is None


def test_without_a_begin_token_the_picture_comes_first():
    bare = FieldEncoder(ByteTokenizer(), codes_per_frame=4, vision_codes=100, add_bos=False)
    found = Unconditional(ByteTokenizer()).of(bare.encode(ROW, "[a],v"))
    assert np.array_equal(found.tokens, bare.encode(ROW, "v").tokens)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    rows = [{"a": f"caption {i}", "v": [i % 100] * 4, "fields": "[a],v"} for i in range(200)]
    lines = write_jsonl(tmp_path_factory.mktemp("guidance") / "a.jsonl", rows)
    return DataConfig(
        sources=(SourceConfig(lines),), tokenizer="bytes", codes_per_frame=4, vision_codes=100, drop_captions=0.25,
        epochs=3, prefetch=0, packing="pad",
    )  # fmt: skip


def lengths(batches) -> np.ndarray:
    """Slots in use of every row: a dropped caption leaves fewer."""
    return np.concatenate([(batch["behind"] >= 0).sum(1) for batch in batches])


def test_about_the_share_is_dropped_anew_every_epoch(data):
    batches = list(make_loader(data, seq_len=64, batch_size=1, seed=3))
    codes = [int(batch["tokens"][batch["modality"]][0]) for batch in batches]
    dropped = lengths(batches) < 30
    assert len(dropped) == 600 and 110 < dropped.sum() < 190
    sets = [{(c, n) for n, (c, d) in enumerate(zip(codes[e : e + 200], dropped[e : e + 200])) if d} for e in (0, 200)]
    assert {c for c, _ in sets[0]} != {c for c, _ in sets[1]}
    again = list(make_loader(data, seq_len=64, batch_size=1, seed=3))
    assert all(map(same_batches, batches, again))
    assert is_dropped(0.25, 3, 0, 7) == is_dropped(0.25, 3, 0, 7) and not is_dropped(0.0, 3, 0, 7)


def test_a_resume_drops_the_same(data):
    one = make_loader(data, seq_len=64, batch_size=4, seed=3)
    for _ in range(40):
        next(one)
    state, rest = one.get_state(), list(one)
    other = make_loader(data, seq_len=64, batch_size=4, seed=3)
    other.set_state(state)
    assert len(rest) > 50 and all(map(same_batches, rest, list(other)))


def test_held_out_data_keeps_its_words(data):
    import dataclasses

    kept = dataclasses.replace(data, heldout=data.sources)
    assert (lengths(make_loader(kept, seq_len=64, batch_size=1, split="heldout")) >= 30).all()


def test_an_example_of_several_rows_may_lose_its_words_too(tmp_path):
    rows = [{"a": "caption", "v": list(range(40)), "fields": "[a],v"} for _ in range(20)]
    lines = write_jsonl(tmp_path / "a.jsonl", rows)
    options = dict(tokenizer="bytes", codes_per_frame=4, vision_codes=100, epochs=20, shuffle=False, prefetch=0)
    found = []
    for rate in (0.0, 0.5):
        config = DataConfig(sources=(SourceConfig(lines),), drop_captions=rate, **options)
        batches = list(make_loader(config, seq_len=32, batch_size=1))
        found.append(sum(int((batch["behind"] >= 0).sum()) for batch in batches))
    words = len("caption") * 400
    assert 0.4 * words < found[0] - found[1] < 0.6 * words


@pytest.mark.parametrize("rate", [-0.1, 1.0, True])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(ValueError, match="drop_captions"):
        DataConfig(drop_captions=rate)
