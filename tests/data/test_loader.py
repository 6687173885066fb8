"""The loader: whole, deterministic, resumable to the batch, the same for any number of hosts."""

import dataclasses
import itertools
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringjax.attention import layouts
from ringjax.data.config import DataConfig, SourceConfig
from ringjax.data.errors import DataError
from ringjax.data.fields import FieldEncoder
from ringjax.data.jsonl import JsonLines
from ringjax.data.loader import make_loader, merge_states
from ringjax.data.tokenizers import ByteTokenizer
from tests.data.helpers import captioned, same_batches, write_jsonl

SEQ_LEN, ROWS = 64, 4


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> str:
    return write_jsonl(tmp_path_factory.mktemp("data") / "captions.jsonl", captioned(40))


@pytest.fixture(scope="module")
def prose(tmp_path_factory) -> str:
    rows = [{"text": f"{i}: " + "many words and then some " * (1 + 7 * i % 23)} for i in range(15)]
    return write_jsonl(tmp_path_factory.mktemp("prose") / "prose.jsonl", rows)


def config(*paths: str, weights=None, **options) -> DataConfig:
    weights = weights or [None] * len(paths)
    sources = tuple(SourceConfig(path, weight, "text") for path, weight in zip(paths, weights))
    defaults = {"tokenizer": "bytes", "codes_per_frame": 4, "vision_codes": 100, "prefetch": 0}
    return DataConfig(sources=sources, **{**defaults, **options})


def loader(data: DataConfig, **options):
    return make_loader(data, **{"seq_len": SEQ_LEN, "batch_size": ROWS, "seed": 7, **options})


def take(batches, count: int) -> list[dict]:
    return list(itertools.islice(batches, count))


def pairs(batches) -> Counter:
    found = Counter()
    for batch in batches:
        real = batch["behind"] >= 0
        kinds = (
            batch["tokens"],
            batch["modality"],
            batch["targets"],
            batch["target_modality"],
            batch["loss_weights"] > 0,
        )
        found.update(zip(*(array[real].tolist() for array in kinds)))
    return found


def pairs_in_files(*paths: str) -> Counter:
    encoder, found = FieldEncoder(ByteTokenizer(), codes_per_frame=4, vision_codes=100), Counter()
    for path in paths:
        lines = JsonLines(path)
        for row in range(len(lines)):
            e = encoder.encode_line(lines[row], "text", int(lines.line_index[row]), "")
            sides = (e.tokens[:-1], e.modality[:-1], e.tokens[1:], e.modality[1:], e.loss[1:])
            found.update(zip(*(side.tolist() for side in sides)))
    return found


@pytest.mark.parametrize("options", [{}, {"packing": "pad"}, {"shuffle": False}, {"open_rows": 1}], ids=str)
def test_an_epoch_has_every_pair_once(file, prose, options):
    batches = list(loader(config(file, prose, epochs=1, **options)))
    assert pairs(batches) == pairs_in_files(file, prose)


def test_epochs_repeat_in_another_order(file):
    batches = list(loader(config(file, epochs=3)))
    once = pairs_in_files(file)
    assert pairs(batches) == Counter({pair: 3 * count for pair, count in once.items()})
    rows = [
        batch["tokens"].tobytes() for batch in loader(config(file, epochs=2, packing="pad"), batch_size=1, seq_len=512)
    ]
    half = len(rows) // 2
    assert sorted(rows[:half]) == sorted(rows[half:]) and rows[:half] != rows[half:]
    first, second = (take(loader(config(file), seed=seed), 4) for seed in (0, 1))
    assert not same_batches(first[0], second[0])


def test_without_end_it_goes_on(file):
    batches = take(loader(config(file)), 60)
    counts = pairs(batches)
    assert set(counts) == set(pairs_in_files(file))
    assert all(np.all((batch["behind"] >= 0).any(axis=1)) for batch in batches), "no row is empty"


def test_same_seed_same_batches(file, prose):
    one, two = (take(loader(config(file, prose, weights=[1.0, 2.0])), 12) for _ in range(2))
    assert all(map(same_batches, one, two))


def test_weights_are_shares_of_tokens(file, prose):
    text_only = take(loader(config(file, prose, weights=[1.0, 3.0])), 80)
    tokens = sum((batch["behind"] >= 0).sum() for batch in text_only)
    # Documents of `prose` hold no digit codes; captions and frames together are the other source.
    captions = Counter()
    for batch in text_only:
        starts = np.flatnonzero((batch["positions"] == 0) & (batch["behind"] >= 0))
        documents = np.cumsum(((batch["positions"] == 0) & (batch["behind"] >= 0)).ravel()) - 1
        vision = np.zeros(len(starts), bool)
        vision[documents[batch["modality"].ravel()]] = True
        real = (batch["behind"] >= 0).ravel()
        captions.update(Counter(vision[documents[real]].tolist()))
    assert abs(captions[True] / tokens - 0.25) < 0.03


@given(st.integers(0, 30), st.integers(1, 6), st.booleans(), st.integers(0, 3), st.booleans())
@settings(max_examples=25, deadline=None)
def test_resumes_to_the_batch(file, prose, stop, open_rows, endless, prefetch, shuffle):
    data = config(file, prose, open_rows=open_rows, epochs=None if endless else 2, prefetch=prefetch, shuffle=shuffle)
    running = loader(data)
    take(running, stop)
    state = json.loads(json.dumps(running.get_state()))
    expected = take(running, 15)
    resumed = loader(data)
    resumed.set_state(state)
    assert resumed.get_state() == state
    found = take(resumed, 15)
    assert len(found) == len(expected) and all(map(same_batches, found, expected))
    assert resumed.get_state() == running.get_state()
    running.close(), resumed.close()


def test_set_state_goes_back_in_one_loader(file):
    batches = loader(config(file, prefetch=2))
    start = batches.get_state()
    first = take(batches, 5)
    batches.set_state(start)
    assert all(map(same_batches, take(batches, 5), first))
    batches.close()


def test_state_is_small(file):
    batches = loader(config(file), seq_len=512)
    take(batches, 30)
    assert len(json.dumps(batches.get_state())) < 8000


@pytest.mark.parametrize("epochs", [None, 1])
def test_the_global_batch_does_not_depend_on_hosts(file, prose, epochs):
    data = config(file, prose, epochs=epochs)
    whole = take(loader(data), 10)
    for hosts in (2, 4):
        parts = [take(loader(data, process_index=i, process_count=hosts), 10) for i in range(hosts)]
        assert all(len(part) == len(whole) for part in parts)
        joined = [{name: np.concatenate([p[name] for p in ps]) for name in ps[0]} for ps in zip(*parts)]
        assert all(map(same_batches, joined, whole))


@pytest.mark.parametrize("epochs", [None, 1])
def test_a_run_goes_on_with_other_hosts(file, epochs):
    data = config(file, epochs=epochs)
    hosts = [loader(data, process_index=i, process_count=4) for i in range(4)]
    for host in hosts:
        take(host, 3)
    state = merge_states([host.get_state() for host in hosts])
    one = loader(data)
    one.set_state(state)
    expected = take(loader(data), 6)[3:]
    assert all(map(same_batches, take(one, 3), expected))
    if epochs is None:
        with pytest.raises(ValueError, match=r"holds lanes 0 but this process needs 1.*merge_states"):
            loader(data).set_state(hosts[0].get_state())
    take(hosts[0], 1)
    with pytest.raises(ValueError, match="not of one run after one batch"):
        merge_states([host.get_state() for host in hosts])


@pytest.mark.parametrize("layout", ["contiguous", "striped", "zigzag"])
def test_the_layout_is_applied_to_everything(file, layout):
    plain = take(loader(config(file)), 3)
    permuted = take(loader(config(file), layout=layout, ring_size=4), 3)
    restored = [{name: layouts.get(layout).restore(x, 4, 1) for name, x in batch.items()} for batch in permuted]
    assert all(map(same_batches, restored, plain))
    if layout != "contiguous":
        assert not same_batches(permuted[0], plain[0])


def test_the_ring_may_change_between_runs(file):
    running = loader(config(file), layout="striped", ring_size=4)
    take(running, 3)
    resumed = loader(config(file), layout="zigzag", ring_size=2)
    resumed.set_state(running.get_state())
    a, b = next(running), next(resumed)
    restore = lambda batch, name, ring: {k: layouts.get(name).restore(x, ring, 1) for k, x in batch.items()}  # noqa: E731
    assert same_batches(restore(a, "striped", 4), restore(b, "zigzag", 2))
    assert running.fingerprint == resumed.fingerprint


def test_changed_data_is_noticed(tmp_path):
    rows = captioned(10)
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    before = loader(config(path))
    take(before, 2)
    state, print_before = before.get_state(), before.fingerprint
    rows[3]["caption"] += "!"
    write_jsonl(tmp_path / "a.jsonl", rows)
    after = loader(config(path))
    assert after.fingerprint != print_before
    with pytest.raises(ValueError, match=r"source 0 \(.*a.jsonl\) changed; put it back"):
        after.set_state(state)
    for change in ({"seq_len": 32}, {"batch_size": 8}, {"seed": 8}):
        with pytest.raises(ValueError, match=f"{next(iter(change))} changed"):
            loader(config(path), **change).set_state(after.get_state())
    with pytest.raises(ValueError, match="tokenizer changed"):
        loader(config(path, tokenizer="sample")).set_state(after.get_state())
    with pytest.raises(ValueError, match="another version"):
        after.set_state({"format": 0})


def test_bad_lines_stop_or_are_counted(tmp_path):
    rows = captioned(12)
    rows[4]["vision"] = [1, 2, 3]
    path = tmp_path / "a.jsonl"
    write_jsonl(path, rows)
    with path.open("a") as file:
        file.write('{"fields": "caption", "capt\n')
    with pytest.raises(DataError, match="line (5|13): "):
        take(loader(config(str(path))), 20)
    batches = loader(config(str(path), on_error="skip", epochs=3))
    found = pairs(batches)
    assert batches.skipped == {"unusable": 2}
    assert "line" in batches.first_skipped["unusable"]
    rows.pop(4)
    # The specs go by line number: keep the others where they were.
    good = write_jsonl(tmp_path / "b.jsonl", rows[:4] + [{"fields": "caption", "caption": "x"}] + rows[4:])
    expected = pairs_in_files(good)
    own = FieldEncoder(ByteTokenizer()).encode({"caption": "x"}, "caption")
    expected.subtract(zip(own.tokens[:-1].tolist(), [False] * 2, own.tokens[1:].tolist(), [False] * 2, [True] * 2))
    assert found == Counter({pair: 3 * count for pair, count in expected.items() if count})


def test_all_lines_bad_is_an_error_even_without_end(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": ""}, {"text": " "}])
    with pytest.raises(DataError, match="none of the 2 examples"):
        take(loader(config(path, on_error="skip")), 1)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_long_examples_are_refused_or_counted(prose, prefetch):
    with pytest.raises(ValueError, match=r"prose.jsonl line \d+: \d+ tokens are more than a row of seq_len 64"):
        take(loader(config(prose, long_examples="refuse", prefetch=prefetch)), 10)
    batches = loader(config(prose, long_examples="skip", epochs=1, on_error="stop", prefetch=prefetch))
    kept = {batch["positions"].max() for batch in batches}
    lengths = [len(ByteTokenizer().encode(JsonLines(prose)[i]["text"])) + 2 for i in range(15)]
    assert batches.skipped == {"too long": sum(n > SEQ_LEN + 1 for n in lengths)}
    assert max(kept) < SEQ_LEN
    assert batches.skipped["too long"] == 13, "the fixture has two short lines"


@pytest.mark.parametrize("prefetch", [0, 3])
def test_errors_come_where_they_belong(tmp_path, prefetch):
    rows = [{"text": f"line {i} of the file"} for i in range(20)] + [{"text": ""}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    batches = loader(config(path, prefetch=prefetch, shuffle=False, packing="pad", epochs=1))
    assert len(take(batches, 5)) == 5
    for _ in range(2):
        with pytest.raises(DataError, match="line 21: field 'text' is empty"):
            next(batches)


def test_held_out_goes_once_in_order(file, prose):
    data = dataclasses.replace(config(file), heldout=(SourceConfig(prose, None, "text"),))
    batches = list(loader(data, split="heldout"))
    assert pairs(batches) == pairs_in_files(prose)
    assert all(map(same_batches, batches, loader(data, split="heldout", seed=99)))
    with pytest.raises(ValueError, match="no held-out data: name it under data.heldout"):
        loader(config(file), split="heldout")
    with pytest.raises(ValueError, match="split 'test' is unknown"):
        loader(config(file), split="test")


def test_prose_sample_splits_do_not_meet():
    data = DataConfig(sources=(SourceConfig("sample:prose"),), prefetch=0, epochs=1)
    train, heldout = ({row["text"] for row in _rows(data, split)} for split in ("train", "heldout"))
    assert train and heldout and not train & heldout


def _rows(data, split):
    from ringjax.data.sources import open_sources

    return open_sources(data, split)[0][0]._rows


def test_frames_see_themselves_where_asked(file):
    batch = take(loader(config(file, bidirectional_frames=True), seq_len=128), 1)[0]
    ahead = batch["ahead"] > 0
    assert ahead.any() and np.all(batch["modality"][ahead])
    assert not np.any(batch["loss_weights"][ahead]), "a token that sees its target must not learn it"
    assert not (take(loader(config(file), seq_len=128), 1)[0]["ahead"]).any()


def test_the_frames_of_a_clip_see_their_own_frame_only(tmp_path):
    rows = [{"vision": [*range(12)], "caption": "abc", "fields": "[vision],caption"}] * 3
    data = config(write_jsonl(tmp_path / "clip.jsonl", rows), bidirectional_frames=True)
    for batch in take(loader(data, seq_len=96), 3):  # several clips in a row
        ends = batch["tokens"] >= 100
        for row, slot in np.argwhere(batch["modality"]):
            end = slot + int(batch["ahead"][row, slot])
            assert ends[row, end] and not ends[row, slot:end].any(), "to the end mark of the own frame"
            assert batch["positions"][row, end] == batch["positions"][row, slot] + end - slot, "of the own clip"


def test_a_window_is_in_the_reach(file):
    batch = take(loader(config(file, window=5)), 1)[0]
    assert batch["behind"].max() == 4


def test_sizes_must_fit(file):
    with pytest.raises(ValueError, match="batch_size 4 cannot be shared evenly by 3 processes"):
        loader(config(file), process_count=3)
    with pytest.raises(ValueError, match="process_index 2 is not in 0 … 1"):
        loader(config(file), process_index=2, process_count=2)
    with pytest.raises(ValueError, match="seq_len 64 cannot be cut"):
        loader(config(file), layout="striped", ring_size=5)
