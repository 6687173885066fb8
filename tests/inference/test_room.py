"""What fits into made-up memories, and that it is said before anything is allocated."""

import dataclasses

import pytest

from ringjax.inference import generate_text, text_prompt
from ringjax.inference import room as rooms
from ringjax.inference.room import (
    Memory,
    cache_bytes,
    comfortable,
    host_memory,
    memory_now,
    require_room,
    tokens_that_fit,
)
from ringjax.inference.session import Session
from ringjax.models import ModelConfig, Parallel
from ringjax.models.cache import empty_cache
from tests.inference.small import parallel, small_model
from tests.models import cases

GIB = 2**30
LLAMA = ModelConfig(width=4096, ffn_width=11008, layers=32, heads=32, dtype="bfloat16")
ONE = Parallel()


def test_bytes_of_a_cache():
    assert cache_bytes(LLAMA, 1, 4096, ONE) == 2 * GIB  # 512 KiB a token
    assert cache_bytes(LLAMA, 3, 4096, ONE) == 6 * GIB
    assert cache_bytes(LLAMA, 1, 4096, ONE, "int8") == GIB + GIB // 32  # a scale for 128 numbers
    small, mesh = small_model().config, parallel((1, 1, 2, 4))
    for kind in (None, "int8"):
        cache = empty_cache(small, 1, 64, mesh, kind)
        held = sum(x.addressable_shards[0].data.nbytes for x in cache.arrays)
        assert cache_bytes(small, 1, 64, mesh, kind) == held


@pytest.mark.parametrize("layout", ["striped", "zigzag"])
def test_a_mesh_cuts_rows_tokens_and_heads(layout):
    mesh = cases.mesh(2, 1, 2, 2)
    assert cache_bytes(LLAMA, 2, 4096, Parallel(mesh, layout)) == 2 * GIB // 4
    assert cache_bytes(LLAMA, 1, 4096, Parallel(mesh, layout)) == 2 * GIB // 4  # one row is not cut in two


def test_what_fits():
    memory = Memory(limit=80 * GIB, used=14 * GIB)
    assert memory.free == int(0.9 * 66 * GIB)
    fits = tokens_that_fit(LLAMA, 1, ONE, memory)
    assert cache_bytes(LLAMA, 1, fits, ONE) <= memory.free < cache_bytes(LLAMA, 1, fits + 16, ONE)
    require_room(LLAMA, 1, fits, ONE, option="--context", memory=memory)
    ring = Parallel(cases.mesh(1, 1, 1, 8))
    assert tokens_that_fit(LLAMA, 1, ring, memory) // 128 == 8 * fits // 128
    assert tokens_that_fit(LLAMA, 1, ONE, Memory(GIB, 2 * GIB)) == 0


def test_what_does_not_fit_is_refused_with_numbers():
    memory = Memory(limit=80 * GIB, used=14 * GIB)
    message = (
        "a cache of 1048576 tokens for each of 2 rows takes 1024.0 GiB a device, and of the 80.0 GiB there 14.0 GiB are"
        " in use .*; 60816 tokens would fit: ask for less with --context, or cut the cache over more devices"
    )
    with pytest.raises(ValueError, match=message):
        require_room(LLAMA, 2, 2**20, ONE, option="--context", memory=memory)


def test_what_nobody_asked_for_may_grow(monkeypatch):
    """The old cache lies beside the new one: two of them must fit."""
    monkeypatch.setattr(rooms, "memory_now", lambda parallel: Memory(80 * GIB, 14 * GIB))
    fits = comfortable(LLAMA, ONE)
    assert cache_bytes(LLAMA, 2, fits, ONE) <= int(0.9 * 66 * GIB) < cache_bytes(LLAMA, 2, fits + 16, ONE)
    assert comfortable(dataclasses.replace(LLAMA, window=4096), ONE) is None


def test_a_window_keeps_the_cache_short(monkeypatch):
    """What counts is what a session holds, not how long the conversation may become."""
    monkeypatch.setattr(rooms, "memory_now", lambda parallel: Memory(2**20, 2**19))
    with pytest.raises(ValueError, match="a cache of 1000000 tokens takes"):
        Session(small_model(), 10**6)
    assert Session(small_model(window=16), 10**6).capacity == 10**6


def test_this_machine_is_asked(tmp_path, monkeypatch):
    whole, eighth = memory_now(ONE), memory_now(parallel((1, 1, 1, 8)))
    assert whole.limit == host_memory().limit >= whole.used > 0 and eighth.limit == whole.limit // 8
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 1000 kB\nMemFree: 10 kB\nMemAvailable: 400 kB\nHugePages_Total: 0\n")
    assert host_memory(meminfo) == Memory(1000 * 1024, 600 * 1024)
    known = host_memory(tmp_path / "absent")  # another way, which counts less as free
    assert known.limit == pytest.approx(whole.limit, rel=0.01) and known.used > 0


def test_nothing_is_allocated_for_what_cannot_fit(monkeypatch):
    monkeypatch.setattr(rooms, "memory_now", lambda parallel: Memory(2**20, 0))
    monkeypatch.setattr("ringjax.inference.generate._run", None)
    with pytest.raises(ValueError, match="tokens takes .* ask for less with a shorter prompt or --max_new_tokens"):
        generate_text(small_model(), [text_prompt([1])], max_new_tokens=10**6)
    monkeypatch.setattr(rooms, "memory_now", lambda parallel: None)
    require_room(LLAMA, 1, 2**40, ONE, option="--context")  # not known: not checked
