"""What a training step sends between devices, and how much of it nothing hides.

| | bytes a device and layer | hidden behind |
| --- | --- | --- |
| ring, forward | (R − 1) · kv (`traffic.py`) | the hop's attention |
| ring, backward | (R − 1) · (kv + sums), and dK, dV once more to go home | the hop's attention; the first is not |
| two_level | as the ring, hosts − 1 times by the slow links | a hop; across hosts, all hops of a turn |
| hybrid | ulysses inside a host, and a ring of (groups − 1) rotations between | nothing; the ring as a ring |
| all_gather | (R − 1) · kv forward, again backward, and the sums' reduce-scatter | nothing |
| ulysses | (R − 1)/R of q, k, v and out forward, twice as much backward | nothing |
| fsdp, sp | weights gathered forward and backward in the model's type, gradients scattered in float32 | half of it |
| … across hosts | each host's like devices first, so a byte crosses once a host and not once a device | |
| tp | 2 sums of the stream forward, 2 backward, and what is computed again | nothing |
| dp | gradients, once a step | nothing |

A ring's hop hides its rotation when `tokens a device ≥ FLOP/s ÷ bandwidth` (Liu et al. 2023, arXiv:2310.01889, §3, with
full masks, no GQA and bfloat16; `traffic.hidden_from` has the general form).
"""

import dataclasses
import math

from ringjax.attention import strategies
from ringjax.planning import traffic, work
from ringjax.planning.devices import Target
from ringjax.training.config import StageConfig
from ringjax.training.mesh import AXES, across_slices

FLOAT32 = 4
# Of weights that are gathered and gradients that are scattered, XLA hides this share behind the layer's products.
WEIGHTS_HIDDEN = 0.5


@dataclasses.dataclass(frozen=True)
class Sent:
    """Seconds of a whole step that one device's links are busy: waited for, and beside compute."""

    exposed: float
    hidden: float

    def plus(self, other: "Sent") -> "Sent":
        """Both, one after the other."""
        return Sent(self.exposed + other.exposed, self.hidden + other.hidden)


@dataclasses.dataclass(frozen=True)
class Hop:
    """One rotation of a ring's forward pass and the attention that hides it."""

    bytes: float
    tokens: float
    needed_tokens: float

    @property
    def hidden(self) -> bool:
        """Whether a device holds enough tokens: C ≥ FLOP/s ÷ bandwidth · K/N · bytes / (2 · visible)."""
        return self.tokens >= self.needed_tokens


def near(sizes: tuple[int, int, int, int], target: Target, *axes: str) -> int:
    """Devices along these axes (none given: sp, a ring's neighbours) of one host of GPUs, or of one TPU slice.

    Hosts of GPUs are filled along sp first, then tp, fsdp and dp; slices as `across_slices` says.
    """
    if target.topology is not None:
        here = [size // across for size, across in zip(sizes, across_slices(sizes, target.slices))]
    else:
        here, left = [], target.device.per_host
        for size in sizes[::-1]:
            here.insert(0, min(size, left))
            left = max(1, left // size)
    return math.prod(size for axis, size in zip(AXES, here) if axis in (axes or ("sp",)))


def inside(stage: StageConfig, sizes: tuple[int, int, int, int], target: Target) -> int:
    """Neighbours that strategies two_level and hybrid group."""
    return min(sizes[3], stage.mesh.host_size or near(sizes, target))


def _link(sizes: tuple[int, int, int, int], target: Target) -> float:
    """Bytes a second from one device of a ring to the next, by the slowest link there."""
    return target.link(near(sizes, target) < sizes[3])


def _collective(sizes: tuple[int, int, int, int], target: Target, axes: tuple[str, ...], size: float) -> float:
    """Seconds in which `size` bytes are gathered from the devices along the axes, or sums of them scattered.

    First from like devices of other hosts, by all adapters at once, then inside: size/L · (M − 1)/M by slow links and
    size · (L − 1)/L by fast ones, for M hosts of L. A ring of a torus uses its links both ways.
    """
    here = near(sizes, target, *axes)
    hosts = math.prod(size for axis, size in zip(AXES, sizes) if axis in axes) / here
    both = 2 if target.device.platform == "tpu" else 1
    across = size / here * (hosts - 1) / hosts / target.link(across=True)
    return across + size * (here - 1) / here / (target.link(across=False) * both)


def group(stage: StageConfig, sizes: tuple[int, int, int, int], target: Target) -> int:
    """Devices among which hybrid trades heads."""
    dp, fsdp, tp, sp = sizes
    heads, kv_heads = stage.model.heads // tp, max(1, stage.model.key_heads // tp)
    return strategies.widest(heads, kv_heads, sp, most=inside(stage, sizes, target))


def hop_of(stage: StageConfig, sizes: tuple[int, int, int, int], target: Target) -> Hop | None:
    """The hop of a stage's ring, of two_level the turn that hides a transfer across hosts; None without a ring."""
    dp, fsdp, tp, sp = sizes
    if sp == 1 or stage.mesh.strategy in ("all_gather", "ulysses"):
        return None
    if stage.mesh.strategy == "hybrid" and group(stage, sizes, target) == sp:
        return None
    sent, device, model = _traffic(stage, sizes), target.device, stage.model
    visible = 1.0 if stage.mesh.layout == "contiguous" else 0.5
    wide = 6.0 if model.dtype != "bfloat16" and device.platform == "tpu" else 1.0
    needed = traffic.hidden_from(
        device.rates.attention[0] * device.flops / wide, _link(sizes, target), heads=model.heads,
        kv_heads=model.key_heads, visible=visible, dtype=model.dtype,
    )  # fmt: skip
    tokens = stage.training.seq_len / sp
    if stage.mesh.strategy == "two_level":
        return Hop(sent.kv, tokens, needed / inside(stage, sizes, target))
    if stage.mesh.strategy == "hybrid":  # a group's tokens, and of its heads one device's
        width = group(stage, sizes, target)
        copies = _copies_of_heads(stage, sizes, width)
        return Hop(sent.kv * copies, tokens * width, needed * copies)
    return Hop(sent.kv, tokens, needed)


def of_stage(stage: StageConfig, sizes: tuple[int, int, int, int], target: Target, attention: float) -> Sent:
    """What a stage's step sends; `attention` are the seconds of one layer's, forward and backward."""
    model, training = stage.model, stage.training
    layers, micro = model.layers, training.accumulation
    found = Sent(0.0, 0.0)
    for sent in (
        _attention(stage, sizes, target, attention / micro),
        _weights(stage, sizes, target),
        _sums(stage, sizes, target),
    ):
        found = found.plus(Sent(sent.exposed * layers * micro, sent.hidden * layers * micro))
    return found.plus(_copies(stage, sizes, target))


def waiting(stage: StageConfig, sizes: tuple[int, int, int, int], target: Target) -> float:
    """How many times as long attention takes as the work that it is, for the busiest device of each hop.

    Contiguous shards leave half of the machine idle under a causal mask, striped and zigzag ones nothing (`work.py`).
    A window that is shorter than a shard leaves no hop but two.
    """
    groups = sizes[3]
    if stage.mesh.strategy == "hybrid":
        groups //= group(stage, sizes, target)
    if groups == 1 or stage.mesh.layout != "contiguous" or stage.mesh.strategy == "ulysses":
        return 1.0
    if stage.mesh.strategy == "all_gather":  # the last shard sees everything, the mean one half
        return 2.0 - 1.0 / groups
    return work.causal_speed_up(groups, stage.training.seq_len)


def _traffic(stage: StageConfig, sizes: tuple[int, int, int, int]) -> traffic.Traffic:
    model, training = stage.model, stage.training
    dp, fsdp, tp, sp = sizes
    rows = training.batch_size // training.accumulation // (dp * fsdp)
    return traffic.Traffic.of(
        stage.mesh.layout, sp, training.seq_len, kv_heads=max(1, model.key_heads // tp), head_dim=model.head_size,
        batch=rows, dtype=model.dtype, window=model.window,
    )  # fmt: skip


def _copies_of_heads(stage: StageConfig, sizes: tuple[int, int, int, int], width: int) -> float:
    """Times that K and V grow where fewer heads than devices of a group are sent to all that need them."""
    return max(1.0, width / max(1, stage.model.key_heads // sizes[2]))


def _attention(stage: StageConfig, sizes: tuple[int, int, int, int], target: Target, attention: float) -> Sent:
    """One layer's attention across sp."""
    dp, fsdp, tp, sp = sizes
    if sp == 1:
        return Sent(0.0, 0.0)
    model, sent, link = stage.model, _traffic(stage, sizes), _link(sizes, target)
    forwards = 2 if model.remat == "full" else 1
    if stage.mesh.strategy == "all_gather":
        return Sent(((sp - 1) * (sent.kv * (forwards + 1) + sent.sums)) / link, 0.0)
    if stage.mesh.strategy == "ulysses":
        queries = sent.kv * model.heads / model.key_heads  # q and out are as large as k and v of so many heads
        return Sent((sent.kv + queries) * (sp - 1) / sp * (forwards + 2) / link, 0.0)
    parts = attention / (forwards + 2.5)
    grouped = inside(stage, sizes, target)
    fast = target.link(grouped > near(sizes, target))
    if stage.mesh.strategy == "hybrid":
        width = group(stage, sizes, target)
        copies, queries = _copies_of_heads(stage, sizes, width), sent.kv * model.heads / model.key_heads
        traded = (sent.kv * copies + queries) * (width - 1) / width * (forwards + 2) / fast
        rotations = min(sp // width - 1, -(-sent.rotations // width))
        return _ring(rotations, sent.kv * copies, sent.sums * copies, link, parts, forwards).plus(Sent(traded, 0.0))
    if stage.mesh.strategy == "two_level" and grouped < sp:
        turns = min(sp // grouped, -(-sent.rotations // grouped) + 1)
        return _two_level(turns, grouped, sent, fast, link, parts, forwards)
    return _ring(sent.rotations, sent.kv, sent.sums, link, parts, forwards)


def _ring(rotations: int, kv: float, sums: float, link: float, parts: float, forwards: int) -> Sent:
    """A ring whose hops together take `parts` seconds forward, and 2.5 times that backward."""
    if rotations == 0:
        return Sent(0.0, 0.0)
    hops = rotations + 1
    exposed, busy = kv / link, rotations * (forwards * kv + kv + sums) / link
    exposed += forwards * rotations * max(0.0, kv / link - parts / hops)
    # Backward K and V and the sums go the same way.
    exposed += rotations * max(0.0, (kv + sums) / link - 2.5 * parts / hops)
    return Sent(exposed, max(0.0, busy - exposed))


def _two_level(
    turns: int, near: int, sent: traffic.Traffic, fast: float, slow: float, parts: float, forwards: int
) -> Sent:
    """`turns` rings inside hosts of `near` devices, and the transfers across hosts, each beside one of them.

        forward     turns · (near − 1) · kv by the fast links,  (turns − 1) · kv by the slow ones
        backward    the same of kv + sums; nothing hides kv's first way across, nor its first inside in each turn
    """
    hop = parts / min(sent.rotations + 1, turns * near)
    rotations, both = turns * (near - 1), sent.kv + sent.sums
    exposed = forwards * rotations * max(0.0, sent.kv / fast - hop)
    exposed += forwards * (turns - 1) * max(0.0, sent.kv / slow - near * hop)
    exposed += rotations * max(0.0, both / fast - 2.5 * hop)
    exposed += (turns - 1) * max(0.0, both / slow - 2.5 * near * hop)
    exposed += (turns * sent.kv / fast if near > 1 else 0.0) + (sent.kv / slow if turns > 1 else 0.0)
    busy = rotations * (forwards * sent.kv + both) / fast + (turns - 1) * (forwards * sent.kv + both) / slow
    return Sent(exposed, max(0.0, busy - exposed))


def _weights(stage: StageConfig, sizes: tuple[int, int, int, int], target: Target) -> Sent:
    """One layer's weights, cut over fsdp and sp, gathered where they are used and their gradients scattered."""
    dp, fsdp, tp, sp = sizes
    shards = fsdp * sp
    if shards == 1:
        return Sent(0.0, 0.0)
    model = stage.model
    block = 2 * model.width * (model.heads + model.key_heads) * model.head_size + 3 * model.width * model.ffn_width
    gathers = 3 if model.remat in ("full", "save_attention", "offload") else 2
    size = block / tp * (gathers * model.compute_dtype.itemsize + FLOAT32)
    seconds = _collective(sizes, target, ("fsdp", "sp"), size)
    return Sent(seconds * (1 - WEIGHTS_HIDDEN), seconds * WEIGHTS_HIDDEN)


def _sums(stage: StageConfig, sizes: tuple[int, int, int, int], target: Target) -> Sent:
    """One layer's sums over tp: the stream after attention and after the feed-forward, and their gradients."""
    dp, fsdp, tp, sp = sizes
    if tp == 1:
        return Sent(0.0, 0.0)
    model, training = stage.model, stage.training
    tokens = training.batch_size / training.accumulation / (dp * fsdp) * training.seq_len / sp
    # An output projection is computed again (not the feed-forward's: nobody needs its result).
    sums = 5 if model.remat in ("full", "save_attention", "offload") else 4
    size = sums * tokens * model.width * model.compute_dtype.itemsize
    return Sent(2 * _collective(sizes, target, ("tp",), size), 0.0)


def _copies(stage: StageConfig, sizes: tuple[int, int, int, int], target: Target) -> Sent:
    """Gradients summed over dp, once a step."""
    dp, fsdp, tp, sp = sizes
    if dp == 1:
        return Sent(0.0, 0.0)
    size = stage.model.parameter_count() * FLOAT32 / (fsdp * tp * sp)
    return Sent(2 * _collective(sizes, target, ("dp",), size), 0.0)
