"""Data configs are checked when they are made."""

import pytest

from ringjax.data.config import DataConfig, SourceConfig
from ringjax.data.sources import open_sources


@pytest.mark.parametrize(
    "make, fault",
    [
        (lambda: SourceConfig(""), "path is empty"),
        (lambda: SourceConfig("sample:cats"), "'sample:cats' is no sample; there are sample:digits"),
        (lambda: SourceConfig("a.jsonl", weight=0), "weight 0 of a.jsonl must be positive"),
        (lambda: SourceConfig("a.jsonl", weight=float("nan")), "must be positive"),
        (lambda: DataConfig(sources=()), "sources is empty"),
        (lambda: DataConfig(sources=(SourceConfig("a", 1.0), SourceConfig("b"))), "source b has no weight"),
        (lambda: DataConfig(codes_per_frame=0), "codes_per_frame 0 must be an integer of at least 1"),
        (lambda: DataConfig(epochs=0), "epochs 0 must be"),
        (lambda: DataConfig(prefetch=-1), "prefetch -1 must be"),
        (lambda: DataConfig(window=True), "window True must be an integer"),
    ],
)
def test_faults_are_told(make, fault):
    with pytest.raises(ValueError, match=fault):
        make()


@pytest.mark.parametrize(
    "path, error, fault",
    [
        ("nowhere.jsonl", FileNotFoundError, "nowhere.jsonl does not exist"),
        ("nowhere.txt", FileNotFoundError, "nowhere.txt does not exist"),
        ("nowhere", FileNotFoundError, "nowhere does not exist"),
        (__file__, ValueError, "is of no known kind"),
    ],
)
def test_missing_and_unknown_sources(path, error, fault):
    with pytest.raises(error, match=fault):
        open_sources(DataConfig(sources=(SourceConfig(path),)), "train")
