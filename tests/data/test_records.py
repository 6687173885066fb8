"""Records come back as they went in, and damage is told by file and record."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringjax.data.config import DataConfig, SourceConfig
from ringjax.data.errors import DataError
from ringjax.data.example import Example
from ringjax.data.loader import make_loader
from ringjax.data.records import FORMAT, META, RecordReader, RecordSource, decode_record, encode_record, write_shard
from ringjax.data.tokenizers import ByteTokenizer


def example(length: int, seed: int = 0) -> Example:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 100, length).astype(np.int32)
    return Example(tokens, rng.random(length) < 0.5, rng.random(length) < 0.5)


def same(a: Example, b: Example) -> bool:
    return all(
        getattr(a, name).dtype == getattr(b, name).dtype and np.array_equal(getattr(a, name), getattr(b, name))
        for name in ("tokens", "modality", "loss")
    )


@given(st.integers(0, 70), st.integers(0, 5))
def test_round_trip(length, seed):
    assert same(decode_record(encode_record(example(length, seed)), "x"), example(length, seed))


@given(st.data())
@settings(max_examples=200)
def test_any_damage_is_noticed(data):
    record = bytearray(encode_record(example(21)))
    at = data.draw(st.integers(0, len(record) - 1))
    if data.draw(st.booleans()):
        record[at] ^= data.draw(st.integers(1, 255))
    else:
        del record[at : at + data.draw(st.integers(1, 40))]
    with pytest.raises(DataError, match="^shard record 3: "):
        decode_record(bytes(record), "shard record 3")


@pytest.fixture
def folder(tmp_path):
    """25 examples in two shards."""
    shards = [
        write_shard(tmp_path / f"{n:05d}.array_record", [encode_record(example(9000 + i, i)) for i in numbers])
        for n, numbers in enumerate((range(15), range(15, 25)))
    ]
    meta = {
        "format": FORMAT, "tokenizer": "bytes", "tokenizer_fingerprint": "bytes", "has_vision": True,
        "codes_per_frame": 256, "vision_codes": 8192, "shards": [dataclasses.asdict(shard) for shard in shards],
    }  # fmt: skip
    (tmp_path / META).write_text(json.dumps(meta))
    return tmp_path


def test_examples_in_any_order(folder):
    reader = RecordReader(folder)
    reader.verify()
    assert len(reader) == 25
    for i in (24, 0, 14, 15):
        assert same(reader[i], example(9000 + i, i))
    assert reader.place(14).endswith("00000.array_record record 14")
    assert reader.place(15).endswith("00001.array_record record 0")
    with pytest.raises(IndexError):
        reader[25]


def test_the_same_records_are_the_same_bytes(folder, tmp_path):
    again = write_shard(tmp_path / "again", [encode_record(example(9000 + i, i)) for i in range(15)])
    assert again.sha256 == RecordReader(folder).shards[0].sha256


def test_a_cut_shard_is_named(folder):
    shard = folder / "00001.array_record"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"00001.array_record is cut: \d+ bytes instead of {len(whole)}"):
        RecordReader(folder)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="00001.array_record is missing"):
        RecordReader(folder)


def test_a_cut_shard_of_the_right_size_is_named(folder):
    shard = folder / "00001.array_record"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:1000] + bytes(len(whole) - 1000))
    with pytest.raises(DataError, match="00001.array_record has .*; it is damaged"):
        RecordReader(folder)


def test_a_garbled_record_is_named(folder):
    shard = folder / "00000.array_record"
    content = bytearray(shard.read_bytes())
    content[100_000:100_100] = b"x" * 100
    shard.write_bytes(content)
    reader, bad = RecordReader(folder), []
    for i in range(25):
        try:
            assert same(reader[i], example(9000 + i, i))
        except DataError as error:
            assert f"00000.array_record record {i}: cannot be read" in str(error) and "\n" not in str(error)
            bad.append(i)
    assert 1 <= len(bad) <= 2, "its neighbours can still be read"
    with pytest.raises(DataError, match="00000.array_record: content differs from meta.json"):
        reader.verify()


@pytest.mark.parametrize(
    "change, fault",
    [
        (lambda meta: meta.update(format="other"), "no description of a data set in format"),
        (lambda meta: meta.pop("shards"), "no description"),
        (lambda meta: meta.update(shards=[]), "has no examples"),
        (lambda meta: meta["shards"][0].update(file="../x"), "'../x' is not a file of the folder"),
        (lambda meta: meta["shards"][0].update(file="x" * 300), "longer than a file's name can be"),
        (lambda meta: meta["shards"][0].update(file="\0"), "is no name of a file"),
        (lambda meta: meta["shards"][0].update(examples=10**30), "has 1000000000000000000000000000000 examples in"),
        (lambda meta: meta["shards"][0].update(examples="15"), "no description"),
        (lambda meta: meta["shards"][0].update(examples=14), "has 15 records instead of 14"),
    ],
)
def test_a_garbled_description_is_refused(folder, change, fault):
    meta = json.loads((folder / META).read_text())
    change(meta)
    (folder / META).write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=fault):
        RecordReader(folder)


def test_a_description_that_is_nested_without_end(folder):
    (folder / META).write_text("[" * 100_000)
    with pytest.raises(ValueError, match="no description"):
        RecordReader(folder)


def test_a_record_that_unpacks_to_gigabytes_is_refused_unread(folder, monkeypatch):
    monkeypatch.setattr("ringjax.data.chunks.MOST_BYTES", 1 << 20)
    shard = write_shard(folder / "00000.array_record", [bytes(1 << 21)])
    meta = json.loads((folder / META).read_text())
    meta["shards"] = [dataclasses.asdict(shard)]
    (folder / META).write_text(json.dumps(meta))
    with pytest.raises(DataError, match="00000.array_record has a chunk of 1 records and 2097152 bytes"):
        RecordReader(folder)


def test_no_data_set(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        RecordReader(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no meta.json, so it is no data set"):
        RecordReader(tmp_path)
    (tmp_path / META).write_text("{")
    with pytest.raises(ValueError, match="no description"):
        RecordReader(tmp_path)


def source(folder, **options) -> RecordSource:
    own = SourceConfig(str(folder), fields=options.pop("fields", None))
    return RecordSource(own, DataConfig(sources=(own,), tokenizer="bytes", **options), ByteTokenizer())


def test_other_tokenizers_are_refused(folder):
    assert len(source(folder)) == 25
    with pytest.raises(ValueError, match="made with codes_per_frame 256, not 16; set data.codes_per_frame"):
        source(folder, codes_per_frame=16)
    with pytest.raises(ValueError, match="tokenized already and has no fields"):
        source(folder, fields="text")
    meta = json.loads((folder / META).read_text())
    (folder / META).write_text(json.dumps(meta | {"tokenizer_fingerprint": "abc"}))
    with pytest.raises(ValueError, match=r"made with tokenizer 'bytes' \(abc\), not with 'bytes' \(bytes\)"):
        source(folder)


@pytest.mark.parametrize("token", [300, -1])
def test_tokens_beyond_their_table_are_refused(tmp_path, token):
    tokens = np.array([1, token, 2], np.int32)
    shard = write_shard(tmp_path / "a", [encode_record(Example(tokens, np.zeros(3, bool), np.ones(3, bool)))])
    meta = {"format": FORMAT, "tokenizer_fingerprint": "bytes", "shards": [dataclasses.asdict(shard)]}
    (tmp_path / META).write_text(json.dumps(meta))
    with pytest.raises(DataError, match=f"record 0: token 1 has id {token}, beyond its table of 259"):
        source(tmp_path).read(0)


def test_the_loader_reads_records_from_its_thread(folder):
    data = DataConfig(sources=(SourceConfig(str(folder)),), tokenizer="bytes", epochs=1)
    batches = list(make_loader(data, seq_len=4096, batch_size=2))
    assert sum((batch["behind"] >= 0).sum() for batch in batches) == sum(9000 + i - 1 for i in range(25))
