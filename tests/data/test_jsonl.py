"""Lines by index, and faults by line number."""

import pytest

from ringjax.data import jsonl
from ringjax.data.errors import DataError
from ringjax.data.jsonl import JsonLines


def lines(tmp_path, content: bytes) -> JsonLines:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    return JsonLines(path)


@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
def test_lines_in_any_order_and_blank_lines_count(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(jsonl, "_CHUNK", chunk)
    jsonl._scan.cache_clear()
    rows = lines(tmp_path, '\n{"a": 1}\n   \r\n{"a": "é"}\r\n\n{"a": 3}'.encode())
    assert len(rows) == 3
    assert [rows[i]["a"] for i in (2, 0, 1)] == [3, 1, "é"]
    assert rows.line_index.tolist() == [1, 3, 5]
    assert rows.place(1).endswith("data.jsonl line 4")


@pytest.mark.parametrize(
    "line, fault",
    [
        (b'{"a": 1', "line 2: not JSON: "),
        (b'{"a": 1}}', "line 2: not JSON: Extra data at column 9"),
        (b"\xff\xfe{}", r"line 2: not UTF-8 \(byte 0"),
        (b"[1]", "line 2: a line must be a JSON object"),
        (b"[" * 100_000, "line 2: not usable JSON: nested more than 64 levels deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "line 2: not usable JSON: .*digits"),
        (b'{"a": "\\ud800"}', "line 2: not usable JSON: a text holds half of a surrogate pair"),
        (b"\x00\x00", "line 2: not JSON"),
    ],
)
def test_garbled_lines_are_named(tmp_path, line, fault):
    rows = lines(tmp_path, b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    assert rows[0]["a"] == 1 and rows[2]["a"] == 2
    with pytest.raises(DataError, match=f"data.jsonl {fault}"):
        rows[1]


def test_unusable_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl does not exist"):
        JsonLines(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match="is empty"):
        lines(tmp_path, b"")
    with pytest.raises(ValueError, match="blank lines only"):
        lines(tmp_path, b"\n  \n")
    (tmp_path / "a.jsonl.gz").write_bytes(b"x")
    with pytest.raises(ValueError, match="compressed.*unpack it first"):
        JsonLines(tmp_path / "a.jsonl.gz")


def test_fingerprint_is_of_the_content(tmp_path):
    first = lines(tmp_path, b'{"a": 1}\n').fingerprint
    assert lines(tmp_path, b'{"a": 1}\n').fingerprint == first
    assert lines(tmp_path, b'{"a": 2}\n').fingerprint != first
