# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Ring attention, from one softmax to eight devices
#
# A sequence of a million tokens does not fit on one accelerator, and its attention matrix of $10^{12}$ numbers fits
# nowhere. This notebook builds *exact* attention for such sequences in small steps, each of which runs here:
#
# 1. a softmax that does not overflow, and that reads its input once;
# 2. the rule that **merges** attention over some keys with attention over others;
# 3. attention in **blocks**, with memory linear in the length;
# 4. a **ring** of devices, each with one piece of the sequence;
# 5. why a causal mask leaves half of a naive ring idle, and how **stripes** repair it;
# 6. windows, bytes on the wire, and what the compiler makes of it all.
#
# You should know what attention is. You need not know the papers; they are named where their idea appears.
# No accelerator is needed: eight devices are simulated on the CPU.

# %%
import importlib.util
import os
import subprocess
import sys

# Where ringjax comes from if it is not installed yet: the clone that this notebook lies in, or elsewhere (on Colab)
# the address of the repository that you opened it from, "git+https://…".
SOURCE = os.environ.get("RINGJAX_SOURCE", "..")

if importlib.util.find_spec("ringjax") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", SOURCE], check=True)

# %%
# %matplotlib inline
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import ringjax as rj
from ringjax.planning import pictures, work
from ringjax.planning.traffic import Traffic, hidden_from

# A mesh of accelerators where there is one; else eight simulated devices. Set before JAX starts its devices.
jax.config.update("jax_num_cpu_devices", 8)
DEVICES = jax.devices() if len(jax.devices()) >= 2 else jax.devices("cpu")
R = 8 if len(DEVICES) >= 8 else 4 if len(DEVICES) >= 4 else 2
if DEVICES[0].platform == "cpu":
    jax.config.update("jax_default_device", DEVICES[0])
jax.config.update("jax_default_matmul_precision", "highest")  # we compare results: no TF32

mesh = Mesh(np.array(DEVICES[:R]), ("sp",))  # "sp": the axis along which the sequence is sharded
print(f"ringjax {rj.__version__}, jax {jax.__version__}, a ring of {R} devices: {DEVICES[0].device_kind}")


# %% [markdown]
# ## 1. A softmax that does not overflow
#
# Attention gives each query $q$ an average of the values, weighted by a softmax of the scores $s_j = q \cdot k_j$:
#
# $$\text{out} = \frac{\sum_j e^{s_j} v_j}{\sum_j e^{s_j}}$$
#
# As written, this fails as soon as a score passes 88: $e^{89}$ is more than a float32 can hold, and
# $\infty / \infty$ is not a number.

# %%
def naive_softmax(s):
    return jnp.exp(s) / jnp.exp(s).sum()


scores = jnp.array([1.0, 50.0, 89.0])
print("naive   ", naive_softmax(scores))


# %% [markdown]
# Nothing changes if we subtract the same number from all scores, since numerator and denominator both shrink by the
# same factor. With the largest score subtracted, no exponent is above 0 and the largest term is exactly 1:

# %%
def safe_softmax(s):
    weights = jnp.exp(s - s.max())
    return weights / weights.sum()


print("safe    ", safe_softmax(scores))


# %% [markdown]
# The price is a second pass: the maximum must be known before the first exponential. *Online softmax* (Milakov &
# Gimelshein 2018, [arXiv:1805.02867](https://arxiv.org/abs/1805.02867)) needs only one. It keeps a running peak, and
# when a higher one turns up, it rescales what was summed so far:

# %%
def online_softmax_sum(s, v):
    """Σ softmax(s)_j v_j and the log-sum-exp of s, reading each score and value once."""

    def read(carry, score_and_value):
        peak, total, summed = carry
        score, value = score_and_value
        higher = jnp.maximum(peak, score)
        decay, weight = jnp.exp(peak - higher), jnp.exp(score - higher)
        return (higher, total * decay + weight, summed * decay + weight * value), None

    start = jnp.array(-jnp.inf), jnp.array(0.0), jnp.zeros(v.shape[1:])
    (peak, total, summed), _ = lax.scan(read, start, (s, v))
    return summed / total, peak + jnp.log(total)


values = jnp.eye(3)  # with one-hot values, the weighted average is the softmax itself
out, lse = online_softmax_sum(scores, values)
print("online  ", out, " log-sum-exp", lse)
np.testing.assert_allclose(out, safe_softmax(scores), rtol=1e-6)

# %% [markdown]
# ## 2. Partial results merge
#
# The online rule works for whole sets of keys, not only for one key after the other. All that must be known of a
# set is its output and the log-sum-exp of its scores, $(\text{out}, \text{lse})$. Two disjoint sets $a$ and $b$
# combine as
#
# $$\text{lse} = \log(e^{\text{lse}_a} + e^{\text{lse}_b}), \qquad
#   \text{out} = \text{out}_a\, e^{\text{lse}_a - \text{lse}} + \text{out}_b\, e^{\text{lse}_b - \text{lse}}$$
#
# In ringjax this rule is `rj.merge`. It is the only place where it is written down: blocks in a kernel, hops of a
# ring and shards of a cache all meet there.
#
# Let us take attention over 512 keys apart at arbitrary places, and put it together again.

# %%
T, HEADS, KV_HEADS, HEAD_DIM = 512, 4, 2, 32  # grouped queries: each key/value head serves two query heads


def draw(seed, heads):
    return jax.random.normal(jax.random.key(seed), (1, T, heads, HEAD_DIM), jnp.float32)


q, k, v = draw(0, HEADS), draw(1, KV_HEADS), draw(2, KV_HEADS)


def over_keys(start, stop):
    """Every query attends to the keys start … stop − 1: a `Partial(out, lse)`."""
    far = jnp.full((1, T), T, jnp.int32)
    everything = rj.Reach(behind=far, ahead=far)  # how many tokens each query sees behind and ahead of itself
    return rj.Partial(*rj.attention(q, k[:, start:stop], v[:, start:stop], reach=everything, return_lse=True))


def relative_error(a, b):
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


whole = over_keys(0, T)
a, b, c = over_keys(0, 100), over_keys(100, 101), over_keys(101, T)
print(f"merge(merge(a, b), c)   {relative_error(rj.merge(rj.merge(a, b), c).out, whole.out):.1e} from the whole")

# %% [markdown]
# The order does not matter (the rule is associative and commutative), so the pieces may come in any order and from
# anywhere. And there is a neutral element: the empty set of keys has output 0 and log-sum-exp $-\infty$. Code that
# merges needs no special case for "nothing visible here", and a query that sees nothing at all gets 0, not NaN.

# %%
nothing = rj.Partial(jnp.zeros_like(whole.out), jnp.full_like(whole.lse, -jnp.inf))

print(f"merge(c, merge(b, a))   {relative_error(rj.merge(c, rj.merge(b, a)).out, whole.out):.1e} from the whole")
print(f"merge(nothing, whole)   {relative_error(rj.merge(nothing, whole).out, whole.out):.1e} from the whole")
print("merge(nothing, nothing)", "0" if not rj.merge(nothing, nothing).out.any() else "not 0")

# %% [markdown]
# ## 3. Blocks
#
# Merging makes attention *blockwise*: go over the keys a block at a time and keep only the running `(out, lse)`.
# The $T \times T$ scores never exist; at any moment there are $T \times \text{block}$ of them (and with tiles of
# queries too, block × block). Rabe & Staats 2021 ([arXiv:2112.05682](https://arxiv.org/abs/2112.05682)) saw that
# memory need not be quadratic; FlashAttention (Dao et al. 2022,
# [arXiv:2205.14135](https://arxiv.org/abs/2205.14135)) made the fast kernel of it.

# %%
BLOCK = T // 8
blocks = [over_keys(start, start + BLOCK) for start in range(0, T, BLOCK)]
blockwise = functools.reduce(rj.merge, blocks, nothing)
dense = rj.attention(q, k, v, causal=False, backend="reference")
print(f"{len(blocks)} blocks of {BLOCK} keys: {relative_error(blockwise.out, dense):.1e} from dense attention")

# %% [markdown]
# ## 4. The ring
#
# Now give each of $R$ devices one block of the queries, keys and values. Every query must still meet every key,
# and no device can hold them all. *Ring Attention* (Liu et al. 2023,
# [arXiv:2310.01889](https://arxiv.org/abs/2310.01889)): the queries stay, keys and values travel. In each **hop**
# a device attends to the block that is visiting, and passes it on to its neighbour.

# %%
pictures.draw_ring(ring_size=4)


# %% [markdown]
# With `jax.shard_map` a program is written from the view of one device, and `lax.ppermute` passes an array on. A
# whole ring, without a mask and for the forward pass only, is the merge in a loop:

# %%
def my_ring(q, k, v):
    """Attention of this device's queries over the keys of all devices: R hops, R − 1 rotations."""
    around = [(device, (device + 1) % R) for device in range(R)]
    partial = rj.Partial(*rj.attention(q, k, v, causal=False, return_lse=True))
    for _ in range(R - 1):
        k, v = (lax.ppermute(x, "sp", around) for x in (k, v))
        partial = rj.merge(partial, rj.Partial(*rj.attention(q, k, v, causal=False, return_lse=True)))
    return partial.out


SHARDED = P(None, "sp")  # batch, sequence, …: the sequence is cut along "sp"
on_ring = functools.partial(jax.shard_map, mesh=mesh, in_specs=SHARDED, out_specs=SHARDED)
print(f"my_ring on {R} devices: {relative_error(jax.jit(on_ring(my_ring))(q, k, v), dense):.1e} from one device")


# %% [markdown]
# The library's `rj.ring_attention` is the same idea with everything that training needs: any mask, and gradients.
# The backward pass is a second trip around the ring. Each device recomputes its probabilities $e^{s - \text{lse}}$
# from the *merged* log-sum-exp, so they are those of the global softmax, and the sums $dK$, $dV$ travel in float32
# one hop behind the keys and values that they belong to.

# %%
def causal_ring(q, k, v):
    return rj.ring_attention(q, k, v, axis_name="sp", layout="contiguous")


def output_and_gradients(attend):
    def both(q, k, v, dout):
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(dout)

    return jax.jit(both)


dout = draw(3, HEADS)
one_device = output_and_gradients(rj.attention)(q, k, v, dout)
ring = output_and_gradients(on_ring(causal_ring))(q, k, v, dout)
for name, found, expected in zip(("out", "dq", "dk", "dv"), ring, one_device, strict=True):
    print(f"{name:4} {relative_error(found, expected):.1e} from one device")
    assert relative_error(found, expected) < 1e-5

# %% [markdown]
# ## 5. A causal mask leaves half of the ring idle
#
# That ring was *contiguous*: device 0 held the first tokens, the last device the last ones. Under a causal mask
# the first device has nothing to do after hop 0, since all other keys lie in the future of its queries. The last
# one has work in every hop, and everyone waits for it. `work.pairs` counts the visible (query, key) pairs of each
# device in each hop:

# %%
print(work.pairs("contiguous", ring_size=4, seq_len=64))  # rows: devices, columns: hops

# %% [markdown]
# Nearly half of the matrix is empty, and in every hop but the first somebody has a *full* block: no hop is ever
# cheap.
#
# The repair is to deal out the tokens differently. *Striped Attention* (Brandon et al. 2023,
# [arXiv:2311.09431](https://arxiv.org/abs/2311.09431)) gives each device every $R$-th token. *Zigzag* gives it one
# early chunk and the matching late one (Llama 3 cut its sequences so,
# [arXiv:2407.21783](https://arxiv.org/abs/2407.21783)).

# %%
pictures.draw_layouts(seq_len=16, ring_size=4)

# %% [markdown]
# Why do stripes help? Look at the queries of one device against the keys of another. Whoever the two are, the
# queries are spread over the whole sequence and so are the keys, and about half of the pairs are visible. The mask
# of *every* hop is a triangle; only its diagonal depends on who came first:

# %%
striped = rj.layouts.get("striped")
for device, source in ((2, 0), (0, 2)):
    queries, keys = (np.asarray(striped.slots(shard, 4, 6)) for shard in (device, source))
    print(f"queries of device {device}: {queries}    keys of device {source}: {keys}")
    print(np.where(queries[:, None] >= keys[None, :], "■", "·"), "\n")

# %% [markdown]
# In every layout the slots of a device are in ascending order, so what a query sees of a visiting block is one
# interval of its slots. This is all that the library needs to know of a layout: `slots` (which token is in slot
# $i$), and `slots_below` (how many slots hold a token before $x$). Causal, packed and windowed masks, or images
# whose tokens see each other, are all intervals, and no mask matrix is ever built or sent.
#
# Now count again, with eight devices:

# %%
pictures.draw_work(ring_size=8, seq_len=8192)

# %% [markdown]
# Per device, the contiguous ring takes the time of 7.5 full blocks for 4 blocks of work. At best, stripes are
# faster by $2 - 1/R$. Rings of real chips also send, and compute tiles that the mask cuts; the paper measured
# 1.45× on eight A100s and 1.65× on sixteen TPUv4 chips.

# %%
for ring_size in (2, 8, 64):
    print(f"{ring_size:3} devices: at most {work.causal_speed_up(ring_size, 2**20):.2f}× faster than contiguous")

# %% [markdown]
# The permutation is done once, where the sequence enters the devices: `permute` puts tokens, positions and targets
# in layout order, `restore` undoes it. The model in between never knows. On whole arrays, `rj.sharded_attention`
# wraps the `shard_map`:

# %%
for name in ("striped", "zigzag"):
    layout = rj.layouts.get(name)
    permuted = [layout.permute(x, R, axis=1) for x in (q, k, v)]
    out = layout.restore(rj.sharded_attention(*permuted, mesh=mesh, layout=name), R, axis=1)
    print(f"{name:8} {relative_error(out, one_device[0]):.1e} from one device")
    assert relative_error(out, one_device[0]) < 1e-5

# %% [markdown]
# ## 6. A window needs fewer hops
#
# If each token sees at most the last $W$ tokens, a contiguous device needs the keys of its neighbours only. The
# rotations that nobody needs are not made. A striped device still needs all others (its neighbours in the
# *sequence* are on all of them), unless the window is shorter than the ring. So with a short window over a long
# sequence, contiguous is the layout that sends least:

# %%
for name in rj.layouts.LAYOUTS:
    made = work.hops(name, ring_size=8, seq_len=8192, max_behind=1024 - 1)
    print(f"{name:10} 8192 tokens, window 1024: hops {made}")

pictures.draw_work(ring_size=8, seq_len=8192, reach=rj.Reach.causal(1, 8192, window=1024))

# %% [markdown]
# ## 7. Bytes on the wire
#
# A rotation sends the keys and values of one shard, in the type of the model. It never sends queries, scores or
# masks. Backward, keys and values go around again, and the sums $dK$, $dV$ follow in float32. So grouped queries
# (fewer key/value heads) shrink the whole bill, and windows most of it. Here for 128K tokens on 8 devices, heads
# of 128, bfloat16:

# %%
eight = functools.partial(Traffic.of, ring_size=8, seq_len=2**17, head_dim=128)
pictures.draw_traffic({
    "32 key/value heads": eight("striped", kv_heads=32),
    "8 key/value heads": eight("striped", kv_heads=8),
    "8 heads, window 16K": eight("contiguous", kv_heads=8, window=2**14),
})

# %% [markdown]
# Does anybody wait for these bytes? A rotation is issued *before* the hop's compute, so it is hidden as long as
# the compute takes longer. Compute grows with the square of the shard, bytes only linearly: beyond some length the
# ring is free. For two chips that attend at 600 TFLOP/s and send 268 GB/s each way (about what two H200 reach over
# NVLink):

# %%
for heads, kv_heads in ((32, 32), (32, 8)):
    shard = hidden_from(600e12, 268e9, heads=heads, kv_heads=kv_heads)
    print(f"{heads} query and {kv_heads:2} key/value heads: hidden from {shard:,.0f} tokens a device on")


# %% [markdown]
# ## 8. What the compiler makes of it
#
# A claim like "$R - 1$ rotations" can be read off the compiled program. Unrolled, each rotation is a
# `collective-permute` of its own; as a loop (which keeps compile time the same for a ring of 256) there is one, in
# the body of a loop that runs $R - 1$ times.

# %%
def program(**options):
    attend = on_ring(functools.partial(rj.ring_attention, axis_name="sp", **options))
    return jax.jit(attend).lower(q, k, v).compile().as_text()


def rotations(text):
    return len(re.findall(r" collective-permute(?:-start)?\(", text))


unrolled, loop = program(unroll=True), program(unroll=False)
trips = re.findall(r'known_trip_count"?:\{"n":"(\d+)"', loop)
print(f"ring of {R}, unrolled: {rotations(unrolled)} rotations in the program")
print(f"ring of {R}, as a loop: {rotations(loop)} in the body of a loop of {' '.join(trips)} trips")
assert rotations(unrolled) == R - 1 and rotations(loop) == 1 and str(R - 1) in trips
assert not re.search(r" all-gather(?:-start)?\(", unrolled + loop)  # nobody ever holds the whole sequence

# %% [markdown]
# ## Where to read on
#
# | idea | in the library |
# | --- | --- |
# | the merge | `ringjax/attention/merge.py` |
# | masks as intervals | `ringjax/attention/reach.py` |
# | contiguous, striped, zigzag | `ringjax/attention/layouts.py` |
# | the ring, forward and backward | `ringjax/attention/ring.py` |
# | blocks with memory linear in the length | `ringjax/attention/kernels/xla.py` |
# | Ulysses, all-gather, and both with a ring | `ringjax/attention/strategies.py` |
# | the counts and pictures of this notebook | `ringjax/planning/` |
#
# `docs/attention.md` says how to use them.
