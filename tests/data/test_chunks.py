"""The headers of an ArrayRecord's chunks, walked over the edges of blocks; what unpacks to too much."""

import random
import tracemalloc

import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from ringjax.data import chunks
from ringjax.data.chunks import check_chunks


def write(path, sizes, options="group_size:1", fill=random.randbytes):
    writer = ArrayRecordWriter(str(path), options)
    for size in sizes:
        writer.write(fill(size))
    writer.close()
    return path


# Records that end on, before and behind the edge of a block of 65,536 bytes; many small ones; some larger than a block.
EDGES = [65536 - 24 - 64 - 40 - k for k in range(0, 80, 8)]


@pytest.mark.parametrize("options", ["group_size:1", "group_size:1,uncompressed", "group_size:4"])
@pytest.mark.parametrize(
    "sizes", [[], [0], [3, 5], [300] * 3000, [70_000] * 9, [400_000, 1], *([n, 40] for n in EDGES)]
)
def test_every_record_is_found(tmp_path, sizes, options):
    path = write(tmp_path / "a", sizes, options)
    check_chunks(path)
    content = path.read_bytes()
    found = list(chunks._chunks(content, path))
    # Behind the groups: a chunk with an entry for each and one more, and a chunk of three that says where it is.
    records = sum(chunk.records for chunk in found if chunk.kind == ord("r"))
    groups = sum(chunk.kind == ord("r") for chunk in found) - 2
    assert records == len(sizes) + (groups + 1) + 3


def test_a_record_that_unpacks_to_too_much_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "MOST_BYTES", 1 << 20)
    path = write(tmp_path / "a", [3, 1 << 21, 3], fill=bytes)
    tracemalloc.start()
    with pytest.raises(
        ValueError, match="a has a chunk of 1 records and 2097152 bytes, packed into .* more than 1048576"
    ):
        check_chunks(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 18
    tracemalloc.stop()


def test_cut_and_garbled_files(tmp_path):
    whole = write(tmp_path / "a", [1000] * 30).read_bytes()
    for size in (30, 70, 500, 20_000):
        (tmp_path / "b").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="b is cut in"):
            check_chunks(tmp_path / "b")
    (tmp_path / "b").write_bytes(whole[:64] + b"\xff" * 100 + whole[164:])
    with pytest.raises(ValueError, match="b has a chunk of kind|b is cut in a chunk"):
        check_chunks(tmp_path / "b")
