"""Checkpoints: whole or not at all, on any mesh, and clear words when something is wrong."""

import errno
import functools
import gc
import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ringjax.training import arrays as arrays_on_disk
from ringjax.training import checkpoint as ckpt
from ringjax.training import peers
from ringjax.training.checkpoint import CheckpointError, CheckpointStore, DiskError, last_whole, load_arrays
from ringjax.training.config import CheckpointConfig
from ringjax.training.load import parse_config, to_plain
from ringjax.training.manifest import NAME, DamagedCheckpoint, read_manifest, write_manifest
from ringjax.training.mesh import make_mesh

SIZE = 4096


def arrays(step, mesh=None):
    spec = PartitionSpec(("dp", "fsdp"), "sp")
    sharding = NamedSharding(mesh or make_mesh("2,1,1,4"), spec)
    weight = jax.device_put(jnp.arange(SIZE, dtype=jnp.float32).reshape(64, 64) * step, sharding)
    return {"params": {"layer": {"weight": weight}, "norm": jnp.full((3,), step, jnp.bfloat16)}}


def store_of(tmp_path, said=None, **config):
    return CheckpointStore(tmp_path, CheckpointConfig(**config), (said if said is not None else []).append)


def save_steps(store, steps):
    for step in steps:
        store.save(step, arrays(step), {"step": step, "parameters": ckpt.describe_arrays(arrays(step)["params"])})
    store.wait()


def biggest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_arrays_come_back_on_another_mesh(tmp_path):
    store = store_of(tmp_path)
    save_steps(store, [3])
    path, info = last_whole(store.folder)
    assert info["step"] == 3
    template = arrays(0, make_mesh("1,8,1,1"))["params"]
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), template)
    loaded = load_arrays(path, "params", abstract)
    assert loaded["layer"]["weight"].sharding == template["layer"]["weight"].sharding
    np.testing.assert_array_equal(loaded["layer"]["weight"].ravel(), np.arange(SIZE) * 3.0)
    assert loaded["norm"].dtype == jnp.bfloat16 and loaded["norm"].tolist() == [3, 3, 3]


def test_arrays_may_be_donated_while_they_are_being_written(tmp_path):
    store = store_of(tmp_path)
    state = arrays(1)
    negate = jax.jit(lambda tree: jax.tree.map(lambda x: -x, tree), donate_argnums=0)
    for step in range(1, 6):
        store.save(step, state, {"step": step})
        state = negate(negate(negate(state)))
    store.wait()
    for step in (4, 5):
        path = store.folder / f"step_{step:08d}"
        loaded = load_arrays(path, "params", jax.tree.map(lambda x: x, arrays(1)["params"]))
        np.testing.assert_array_equal(loaded["layer"]["weight"].ravel(), np.arange(SIZE) * (1 if step % 2 else -1))


def test_the_newest_and_the_round_ones_are_kept(tmp_path):
    store = store_of(tmp_path, keep_last=2, keep_every=4)
    save_steps(store, range(1, 8))
    assert [step for step, _ in ckpt.step_folders(store.folder)] == [7, 6, 4]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest", "flip manifest"])
def test_a_damaged_checkpoint_falls_back_and_says_so(tmp_path, damage):
    said = []
    store = store_of(tmp_path)
    save_steps(store, [1, 2])
    newest = store.folder / "step_00000002"
    victim = newest / NAME if "manifest" in damage else biggest_file(newest)
    data = bytearray(victim.read_bytes())
    if "flip" in damage:
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    elif damage == "cut":
        victim.write_bytes(data[: len(data) // 2])
    else:
        victim.unlink()
    path, info = last_whole(store.folder, say=said.append)
    assert (path.name, info["step"]) == ("step_00000001", 1)
    assert len(said) == 1 and "step_00000002" in said[0] and "falling back" in said[0]
    after = store_of(tmp_path)
    after.tidy()
    save_steps(after, [2])  # its name is free again
    assert last_whole(store.folder)[1]["step"] == 2


def test_a_kill_before_the_manifest_leaves_no_checkpoint(tmp_path, monkeypatch):
    store = store_of(tmp_path)
    save_steps(store, [1])
    monkeypatch.setattr(ckpt, "write_manifest", lambda *_: None)
    save_steps(store, [2])
    assert last_whole(store.folder, say=lambda _: None)[1]["step"] == 1


def test_everything_is_on_the_disk_before_the_manifest_is_there(tmp_path, monkeypatch):
    folder = tmp_path / "step_00000001"
    (folder / "params").mkdir(parents=True)
    (folder / "a").write_text("1")
    (folder / "params" / "b").write_text("2")
    synced, real, replace = [], os.fsync, os.replace

    def fsync(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    def renamed(source, target):
        wanted = folder / "a", folder / "params" / "b", folder / "params", folder, tmp_path, folder / (NAME + ".tmp")
        assert {str(path) for path in wanted} == set(synced)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", renamed)
    write_manifest(folder, {"step": 1})
    assert synced[-1] == str(folder) and read_manifest(folder)["step"] == 1


def test_a_manifest_of_another_format_is_refused(tmp_path):
    import hashlib

    body = json.dumps({"format": 99, "files": {}})
    (tmp_path / NAME).write_text(json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest()}) + "\n" + body)
    with pytest.raises(DamagedCheckpoint, match="has format 99; this version reads 1"):
        read_manifest(tmp_path)


def test_no_space_left_is_said_and_the_last_whole_one_stays(tmp_path, monkeypatch):
    store = store_of(tmp_path)
    save_steps(store, [1])

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ckpt, "write_manifest", full)
    store.save(2, arrays(2), {"step": 2})
    with pytest.raises(CheckpointError, match=r"disk of .* is full.*last whole checkpoint is .*step_00000001"):
        store.wait()
    assert last_whole(store.folder)[1]["step"] == 1
    assert not list(store.folder.glob("step_00000002*"))  # what was half written no longer fills the disk


def test_a_save_that_hangs_is_given_up_and_no_longer_waited_for(tmp_path, monkeypatch):
    hangs, alone = threading.Event(), threading.Event()
    monkeypatch.setattr(peers, "_alone", alone)
    monkeypatch.setattr(ckpt, "write_manifest", lambda *_: hangs.wait(60))
    monkeypatch.setattr(ckpt, "SAVE_SECONDS", 0.2)
    store = store_of(tmp_path)
    store.save(1, arrays(1), {"step": 1})
    with pytest.raises(DiskError, match="has not ended for .* does its disk answer"):
        store.wait()
    assert alone.is_set()  # the process may not wait for its threads
    store.wait()
    hangs.set()


def test_the_wall_clock_may_jump_during_a_save(tmp_path, monkeypatch):
    real, looks = time.time, iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: real() + 1800.0 * next(looks))  # half an hour at every look
    store = store_of(tmp_path)
    save_steps(store, [1, 2])
    assert last_whole(store.folder)[1]["step"] == 2


def test_a_full_disk_for_real(tmp_path):
    """On a file system of 1 MB: needs the right to mount one."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs here")
    try:
        store = store_of(small, keep_last=100)
        with pytest.raises(CheckpointError, match="is full"):
            rng = np.random.default_rng(0)
            for step in range(1, 60):
                noise = jnp.asarray(rng.normal(size=(64, 512)), jnp.float32)
                store.save(step, {"params": {"noise": noise}}, {"step": step})
                store.wait()
        assert step > 1
        assert last_whole(store.folder, say=lambda _: None)[1]["step"] == step - 1
    finally:
        subprocess.run(["umount", small], check=True)


def test_another_model_is_refused_with_the_names_that_differ():
    saved = {"a": "float32[2,3]", "b": "float32[4]", "c": "float32[1]"}
    with pytest.raises(CheckpointError) as caught:
        ckpt.check_same_arrays(saved, {"a": "float32[2,5]", "c": "float32[1]", "d": "float32[1]"}, "x/step_1")
    assert str(caught.value) == (
        "x/step_1 is of another model: a is float32[2,3] there and float32[2,5] here; b is only in the checkpoint; "
        "d is only in this model; use another run_dir"
    )
    ckpt.check_same_arrays(saved, saved, "x")


def resealed(path, **changes):
    """The checkpoint with another manifest under a checksum that fits: what whoever made the file can write."""
    _, _, body = (path / NAME).read_text().partition("\n")
    body = json.dumps({**json.loads(body), **changes})
    (path / NAME).write_text(json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest()}) + "\n" + body)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"files": {"../../outside": [3, "a"]}}, "lists '../../outside' leads out of the folder"),
        ({"files": {"/etc/hostname": [3, "a"]}}, "leads out of the folder"),
        ({"files": {"x" * 300: [3, "a"]}}, "longer than"),
        ({"files": {"a": 3}}, "no usable files"),
        ({"files": None}, "no usable files"),
        ({"files": {"a": [1.5, "a"]}}, "no usable"),
        ({"parameters": ["a"]}, "no usable parameters"),
        ({"config": []}, "no usable config"),
        ({"stage": "a"}, "no usable stage"),
        ({"base": {"path": 3}}, "no usable base"),
        ({"format": [1]}, r"has format \[1\]"),
    ],
)
def test_manifests_that_say_what_no_one_wrote(tmp_path, changes, words):
    store = store_of(tmp_path)
    save_steps(store, [1])
    path = store.folder / "step_00000001"
    resealed(path, **changes)
    with pytest.raises(DamagedCheckpoint, match=words):
        read_manifest(path)
    assert last_whole(store.folder, say=lambda line: None) is None


@pytest.mark.parametrize("body", ["[" * 100_000, "[]", "{", ""])
def test_manifests_that_are_none(tmp_path, body):
    first = json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest()})
    for text in (f"{first}\n{body}", "[" * 100_000, '{"sha256": []}\n'):
        (tmp_path / NAME).write_text(text)
        with pytest.raises(DamagedCheckpoint):
            read_manifest(tmp_path)


def test_a_manifest_of_no_run(tmp_path):
    run = parse_config("model: {width: 16, ffn_width: 16, layers: 1, heads: 2}\ndata: {}")
    info = {"config": to_plain(run), "stage": 0}
    assert ckpt.run_of(info, tmp_path).model.width == 16
    for changes, words in (
        ({"stage": 7}, "is of stage 7, and its run has 1"),
        ({"config": None}, "does not say of which run"),
    ):
        with pytest.raises(CheckpointError, match=words):
            ckpt.run_of({**info, **changes}, tmp_path)


def test_arrays_that_cannot_be_read_are_told_as_a_checkpoints_fault(tmp_path):
    store = store_of(tmp_path)
    save_steps(store, [1])
    path = store.folder / "step_00000001"
    biggest_file(path).write_bytes(b"garbled")
    with pytest.raises(CheckpointError, match="step_00000001: the arrays 'params' cannot be read"):
        load_arrays(path, "params", arrays(1)["params"])


def test_reads_that_were_given_up_are_not_reported_later(tmp_path, monkeypatch, caplog):
    """Orbax's reads that were under way when one failed end when they are collected, anywhere in what comes after."""
    reported = []
    arrays_on_disk.orbax()
    monkeypatch.setattr(sys, "unraisablehook", functools.partial(arrays_on_disk._without_given_up, reported.append))
    store = store_of(tmp_path)
    save_steps(store, [1])
    path = store.folder / "step_00000001"
    biggest_file(path).write_bytes(b"garbled")
    with pytest.raises(CheckpointError):
        load_arrays(path, "params", arrays(1)["params"])
    gc.collect()
    assert reported == [] and caplog.records == []
    logging.getLogger("asyncio").error("Task exception was never retrieved\ntask: <Task coro=<somebody_else()>>")
    assert len(caplog.records) == 1

    class Faulty:
        def __del__(self):
            raise ValueError("another kind of error is reported as ever")

    Faulty()
    assert [str(raised.exc_value) for raised in reported] == ["another kind of error is reported as ever"]
