"""What the backward pass keeps of each block and what it computes again, by name.

| name | kept of a token, in the model's type | computed again |
| --- | --- | --- |
| none | everything | nothing |
| save_products | the next row's, and queries, keys and values | norms and what is cheap |
| save_feed_forward | the next row's, the stream after attention, both inner products of the feed-forward | + q, k, v |
| save_attention | the block's input, attention's output and lse | + everything but attention |
| offload | the same, in host memory | the same |
| full | the block's input | everything, attention too |

A value costs 2 bytes a token and layer in bfloat16 and saves the product that makes it, whose work is the same a value
for all of them: keep as many as fit. Attention is the exception: it costs as little to keep and most to repeat.
"""

import functools
from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

from ringjax.models.parallel import Parallel

BLOCK_INPUT = "block_input"
# The names that attention's gradient rule gives to what its backward pass needs (ringjax/attention/vjp.py).
ATTENTION = ("attention_out", "attention_lse")
# The names that a block gives to its products (transformer.py, feed_forward.py).
FEED_FORWARD = ("attended_stream", "ffn_gate", "ffn_up")
PROJECTIONS = ("query", "key", "value")

_SAVED = {
    "save_attention": ATTENTION,
    "save_feed_forward": (*ATTENTION, *FEED_FORWARD),
    "save_products": (*ATTENTION, *FEED_FORWARD, *PROJECTIONS),
}


def rematerialise(block: Callable, name: str, parallel: Parallel, unrolled: bool = False) -> Callable:
    """`block(x, …)` under the policy called `name` (`ModelConfig.remat`), for use inside a scan, `unrolled` or not.

    Raises NotImplementedError for 'offload' on devices without pinned host memory.
    """
    if name == "none":
        return block
    if name == "offload":
        _require_host_memory(parallel)

    @functools.wraps(block)
    def named(x, *rest):
        # By this name a policy can put the input elsewhere; unnamed inputs always stay in device memory.
        return block(checkpoint_name(x, BLOCK_INPUT), *rest)

    # Nothing outside a scan's body can be merged with its recomputation, so barriers would only slow it down; several
    # blocks in one body can, and what was to be forgotten would be kept.
    return jax.checkpoint(named, policy=_policy(name), prevent_cse=unrolled)


def _policy(name: str) -> Callable:
    policies = jax.checkpoint_policies
    if name == "full":
        return policies.nothing_saveable
    if name in _SAVED:
        return policies.save_only_these_names(*_SAVED[name])
    return policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[BLOCK_INPUT, *ATTENTION],
        offload_src="device",
        offload_dst="pinned_host",
    )


def _require_host_memory(parallel: Parallel) -> None:
    device = jax.local_devices()[0] if parallel.mesh is None else parallel.mesh.local_devices[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if kinds and "pinned_host" not in kinds:  # devices that are only compiled for say nothing of their memories
        raise NotImplementedError(
            f"remat 'offload' needs pinned host memory, and {device.platform} devices here have {', '.join(kinds)};"
            " use 'save_attention'"
        )
