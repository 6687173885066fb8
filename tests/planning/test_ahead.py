"""Machines that are not there: what is said where they cannot be described."""

import pytest

from ringjax.planning import ahead, gpus


def test_a_slice_that_does_not_exist_is_named():
    pytest.importorskip("libtpu", reason="libtpu is not installed (the extra 'tpu')")
    for topology in ("v5e:3x3", "v99:2x2"):
        with pytest.raises(ValueError, match=f"no TPU slice '{topology}': .*; use one such as 'v5e:2x4'"):
            ahead.slice_mesh(topology)


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(ahead.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"needs libtpu; pip install 'ringjax\[tpu\]'"):
        ahead.slice_mesh("v5e:2x4")


def test_without_the_cuda_plugin_the_extra_is_named(monkeypatch):
    from jax.experimental import topologies

    def refuse(**_):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    with pytest.raises(NotImplementedError, match=r"needs JAX's CUDA plugin .* pip install 'ringjax\[gpu\]'"):
        gpus.gpu_mesh(2)
