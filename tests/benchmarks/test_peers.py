"""Other projects: rows where they are absent, the right arguments where they are there."""

import ast
import importlib.util
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ringjax as rj
from ringjax import cli
from ringjax.benchmarks import peers, rows, torch_peer, workload
from ringjax.benchmarks.workload import Workload
from tests.attention import cases

SMALL = ["--lengths", "64", "--heads", "4/2", "--head_dim", "8", "--repeats", "1", "--warmup", "1", "--devices", "2"]


def test_absent_peers_are_rows_and_no_failure(capsys, monkeypatch, tmp_path):
    real = importlib.util.find_spec
    absent = ("ringattention", "tokamax")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in absent else real(name, *rest))
    fail = tmp_path / "torch_less"
    fail.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'torch'\" >&2\nexit 1\n")
    fail.chmod(0o755)
    options = ["--strategies", "one_device", "--passes", "forward", "--torch_python", str(fail), "--masks", "full"]
    names = ["--peers", "ringattention", "tokamax", "torch"]
    code = cli.main(["bench", "attention", *SMALL, *options, *names, "--output", str(tmp_path)])
    found = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert code == 0
    assert [(row["strategy"], row["status"]) for row in found] == [
        ("one_device", rows.OK),
        ("ringattention", rows.ABSENT),
        ("tokamax", rows.ABSENT),
        ("torch context_parallel", rows.ABSENT),
    ]
    assert "pip install ringattention" in capsys.readouterr().out


@pytest.fixture
def ring_attention(monkeypatch):
    """A stand-in with ringattention's signature that computes what it would."""
    calls = []

    def attend(q, k, v, bias, segments, cache, axis_name, float32_logits, settings):
        assert bias is cache is None and q.shape[2] == k.shape[2]
        calls.append((settings["query_chunk_size"], float32_logits, settings["causal_block_size"]))
        reach = None
        if segments is not None:  # whole, as the real one takes them
            own = jax.lax.dynamic_slice_in_dim(segments, jax.lax.axis_index(axis_name) * q.shape[1], q.shape[1], 1)
            first = jnp.argmax(segments[:, None] == own[:, :, None], axis=-1)
            index = jax.lax.axis_index(axis_name) * q.shape[1] + jnp.arange(q.shape[1])
            reach = rj.Reach((index - first).astype(jnp.int32), jnp.zeros_like(own), max_ahead=0)
        causal = settings["causal_block_size"] == 1
        return rj.ring_attention(q, k, v, axis_name=axis_name, layout="contiguous", causal=causal, reach=reach)

    monkeypatch.setattr(peers, "_load_ringattention", lambda: attend)
    return calls


@pytest.mark.parametrize("mask", ["causal", "full", "packed"])
def test_ringattention_gets_heads_masks_and_chunks(ring_attention, mask):
    work = Workload(mask, 64, 4, 2, 8, dtype="float32", mean_document=12)
    mesh, (q, k, v, _) = cases.mesh(2), workload.inputs(work)
    found = list(peers.candidates("ringattention", work, mesh))
    assert [candidate.label for candidate in found] == ["chunk 32, float32 logits", "chunk 32"]
    out = found[0].attend(q, k, v, work.reach())
    expected = rj.attention(q, k, v, reach=work.reach(), **work.arguments())
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    assert ring_attention == [(32, True, None if mask == "full" else 1)]


def test_ringattention_is_timed_beside_ours(ring_attention, tmp_path):
    options = ["--strategies", "ring", "--layouts", "striped", "--passes", "both", "--peers", "ringattention"]
    assert cli.main(["bench", "attention", *SMALL, *options, "--output", str(tmp_path)]) == 0
    ours, peer = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert (peer["strategy"], peer["layout"], peer["devices"]) == ("ringattention", "contiguous", 2)
    assert peer["peer"] and peer["percent"] > 0 and set(peer["errors"]) == set(ours["errors"])


def test_what_ringattention_lacks_is_refused(ring_attention):
    with pytest.raises(NotImplementedError, match="no sliding window"):
        next(peers.candidates("ringattention", Workload("window:8", 64, 4, 2, 8), cases.mesh(2)))
    with pytest.raises(NotImplementedError, match="cannot cut 65 tokens"):
        next(peers.candidates("ringattention", Workload("causal", 65, 4, 2, 8), cases.mesh(2)))


def test_tokamax_gets_intervals_as_starts(monkeypatch):
    """A stand-in for its operation: no Hopper GPU here."""

    class Mask:
        def __init__(self, is_causal, k_start):
            self.is_causal, self.k_start = is_causal, k_start

    def op(q, k, v, mask):
        behind = jnp.arange(q.shape[1])[None] - mask.k_start[:, 0]
        return rj.attention(q, k, v, reach=rj.Reach(behind, jnp.zeros_like(behind)))

    for mask in ("packed", "window:9"):
        work = Workload(mask, 64, 4, 2, 8, dtype="float32", mean_document=12)
        q, k, v, _ = workload.inputs(work)
        expected = rj.attention(q, k, v, reach=work.reach(), **work.arguments())
        np.testing.assert_allclose(peers._one_device(op, Mask, work, q, k, v, None), expected, rtol=1e-4, atol=1e-5)


def result(work: Workload, **changes) -> dict:
    case = torch_peer._case(work, "both")
    return {
        "case": case, "rotation": "alltoall", "kernel": "cudnn", "torch": "2.11", "devices": 2, "seconds": [0.02, 0.01],
        "calls": 3, "grouped": False, "out_error": 1e-3, **changes,
    }  # fmt: skip


def test_results_of_torch_are_rows():
    work = Workload("causal", 64, 4, 2, 8)
    assert torch_peer.is_of(result(work), work, "both") and not torch_peer.is_of(result(work), work, "forward")
    row = torch_peer.row_of(result(work), work, {"rate": 1e6})
    assert (row.status, row.backend, row.layout, row.devices) == (rows.OK, "cudnn, alltoall", "zigzag", 2)
    assert row.rate == pytest.approx(work.flops("both") / 2 / 0.015) and row.percent > 0
    for error, status in (
        ("OutOfMemoryError: CUDA out of memory. Tried", rows.NO_MEMORY),
        ("NotImplementedError: no mask 'packed'", rows.REFUSED),
        ("RuntimeError: NCCL", rows.FAILED),
    ):
        row = torch_peer.row_of(result(work, error=error), work, None)
        assert row.status == status and row.good and row.times is None


def test_torch_answers_line_by_line(tmp_path):
    """A script of PyTorch's that dies half way leaves what it has measured; the rest says why."""
    python = tmp_path / "python"
    code = (
        "import json,os,sys; r=json.load(open(sys.argv[2])); f=open(sys.argv[3],'w');"
        "beside=sorted(os.listdir(os.path.dirname(sys.argv[1])));"
        "f.write(json.dumps({'case': r['cases'][0], 'seconds': [1.0], 'beside': beside})+chr(10)); f.flush();"
        "raise SystemError('gone')"
    )
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$@"\n')
    python.chmod(0o755)
    options = dict(python=str(python), devices=None, repeats=1, warmup=1, run_seconds=0.1, say=lambda _: None)
    first, second = torch_peer.run([Workload("causal", 64, 4, 2, 8)], ["forward", "both"], **options)
    assert first["case"]["kind"] == "forward" and first["seconds"] == [1.0]
    assert first["beside"] == ["answer.jsonl", "request.json", "torch_script.py"]  # no module of ours to import instead
    assert second["case"]["kind"] == "both" and "SystemError: gone" in second["error"]


def test_torch_script_needs_nothing_of_ours():
    """It runs under another Python: it may import PyTorch and the standard library only."""
    nodes = list(ast.walk(ast.parse(torch_peer.SCRIPT.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    roots = {name.split(".")[0] for name in names}
    assert "torch" in roots and roots - {"torch"} <= set(sys.stdlib_module_names)
