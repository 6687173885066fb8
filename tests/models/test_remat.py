import re

import jax
import numpy as np
import pytest
from flax import nnx

from ringjax.models import Parallel, Transformer
from ringjax.models import remat as remat_module
from tests.models import cases
from tests.models.cases import changed

POLICIES = ("none", "full", "save_attention", "save_feed_forward", "save_products", "offload")


def gradient(config, parallel):
    """The function `state, batch -> gradient`, and a state for it."""
    graph, state = nnx.split(cases.model(config, parallel))

    def loss(state, batch):
        return (cases.hidden(nnx.merge(graph, state), batch, parallel) ** 2).mean()

    return jax.jit(jax.grad(loss)), state


@pytest.fixture(scope="module")
def runs():
    """Compiled program and gradient of every policy, on a ring of 4."""
    parallel, found = Parallel(cases.mesh(1, 1, 1, 4)), {}
    batch = cases.in_layout(cases.batch(rows=1), parallel)
    for policy in POLICIES:
        step, state = gradient(changed(remat=policy), parallel)
        compiled = step.lower(state, batch).compile()
        found[policy] = compiled.as_text(), jax.device_get(compiled(state, batch))
    return found


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_gradients_are_the_same(runs, policy):
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * np.abs(b).max())  # noqa: E731
    jax.tree.map(same, runs[policy][1], runs["none"][1])


def test_only_full_repeats_the_attention(runs):
    """A ring's forward pass rotates K and V: its rotations in the program count how often it runs."""
    permute = re.compile(r"collective-permute(?:-start)?\(")
    rotations = {policy: len(permute.findall(text)) for policy, (text, _) in runs.items()}
    assert rotations["save_attention"] == rotations["offload"] == rotations["none"]
    assert rotations["full"] >= rotations["none"] + 3  # R − 1 more


def stacked(policy: str) -> dict[str, int]:
    """What the forward pass hands to the backward pass: elements a layer, by where they are kept."""
    config = changed(remat=policy, layers=3)
    graph, state = nnx.split(Transformer.abstract(config))
    batch = cases.batch()
    program = jax.make_jaxpr(jax.grad(lambda s: (cases.hidden(nnx.merge(graph, s), batch) ** 2).mean()))(state)
    (forward, *_) = [equation for equation in program.eqns if equation.primitive.name == "scan"]
    kept = {"device": 0, "host": 0}
    for out in forward.outvars:
        if out.aval.shape[0] == config.layers:  # stacked over the layers; the other output is the stream itself
            kept["host" if "host" in str(out.aval) else "device"] += out.aval.size // config.layers
    return kept


def test_keeps_what_it_says():
    tokens, config = 4 * 32, cases.SMALL
    stream = tokens * config.width
    attention = tokens * config.heads * (config.head_size + 1)
    assert stacked("full") == {"device": stream, "host": 0}
    assert stacked("save_attention") == {"device": stream + attention, "host": 0}
    inner = tokens * (config.width + 2 * config.ffn_width)
    projections = tokens * config.head_size * (config.heads + 2 * config.key_heads)
    assert stacked("save_feed_forward")["device"] == stream + attention + inner
    assert stacked("save_products")["device"] == stream + attention + inner + projections
    assert stacked("offload") == {"device": 0, "host": stream + attention}
    assert stacked("none")["device"] > 5 * stream


@pytest.mark.parametrize("policy", ["none", pytest.param("save_attention", marks=pytest.mark.slow)])
def test_unrolled_layers_change_nothing(runs, policy):
    """Neither the gradient nor, with a policy, what is forgotten: the recomputation stays its own."""
    parallel = Parallel(cases.mesh(1, 1, 1, 4))
    batch = cases.in_layout(cases.batch(rows=1), parallel)
    step, state = gradient(changed(remat=policy, unroll=cases.SMALL.layers), parallel)
    found = jax.device_get(step(state, batch))
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * np.abs(b).max())  # noqa: E731
    jax.tree.map(same, found, runs["none"][1])


def test_unrolled_layers_cannot_go_to_host_memory():
    with pytest.raises(ValueError, match="unroll 2 with remat 'offload'.*use unroll 1"):
        changed(remat="offload", unroll=2)


def test_offload_is_refused_without_host_memory(monkeypatch):
    class Device:
        platform = "toaster"

        def addressable_memories(self):
            return [type("Memory", (), {"kind": "device"})()]

    monkeypatch.setattr(remat_module.jax, "local_devices", lambda: [Device()])
    with pytest.raises(NotImplementedError, match="pinned host memory.*toaster devices here have device; use 'save"):
        remat_module.rematerialise(lambda x: x, "offload", Parallel())
