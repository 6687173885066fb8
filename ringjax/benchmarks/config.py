"""The options of `ringjax bench attention`, `ringjax bench train` and `ringjax bench generate`."""

import dataclasses
import re
from typing import Literal

from ringjax.attention.kernels import check_name
from ringjax.attention.strategies import BY_HOST, check_host_size
from ringjax.benchmarks.compare import combinations
from ringjax.models.sizes import get_size

PEERS = ("ringattention", "tokamax", "torch")
STRATEGIES = ("one_device", "ring", "all_gather", "ulysses", "hybrid")
MASK = re.compile(r"causal|full|packed|window:[1-9][0-9]*")
HEADS = re.compile(r"[1-9][0-9]*(/[1-9][0-9]*)?")

Pass = Literal["forward", "both"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _at_least(config, **least: int) -> None:
    for name, bound in least.items():
        value = getattr(config, name)
        _require(value >= bound, f"{name} is {value}; it must be at least {bound}")


@dataclasses.dataclass(frozen=True)
class AttentionBench:
    """Attention alone: forward, and forward with backward, beside the one-device kernel of the same process."""

    lengths: tuple[int, ...] = (8192, 32768)
    """Tokens of the whole sequence."""
    heads: tuple[str, ...] = ("32/8",)
    """Query heads / key and value heads; one number is both."""
    head_dim: int = 128
    """Size of a head."""
    batch: int = 1
    """Rows."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of queries, keys and values."""
    masks: tuple[str, ...] = ("causal",)
    """causal, full, packed (documents of log-normal lengths), window:W (the last W tokens)."""
    mean_document: int = 4096
    """Mean length of the documents of mask `packed`."""
    layouts: tuple[Literal["striped", "zigzag", "contiguous"], ...] = ("striped", "zigzag")
    """Which token sits on which device."""
    strategies: tuple[Literal["one_device", "ring", "two_level", "all_gather", "ulysses", "hybrid"], ...] = ()
    """How attention crosses the devices; none given: one_device, and ring where there are several devices."""
    backends: tuple[str, ...] = ("auto",)
    """Attention kernels."""
    passes: tuple[Pass, ...] = ("forward", "both")
    """forward, and forward with the gradients of q, k and v."""
    ulysses_size: int | None = None
    """Devices of a group of strategy hybrid; null: the largest that fits."""
    host_size: int | None = None
    """Neighbours that share fast links, for strategy two_level, and for hybrid without a ulysses_size; null: the
    devices of a process, on TPUs of a slice."""
    devices: int | None = None
    """Size of the ring; null: all devices."""
    simulated_devices: int = 0
    """CPU devices to simulate where there is no accelerator, 0: none."""
    share: int = 0
    """Time one device's share of a ring of so many, transfers left out, on one device; 0: a whole ring."""
    ranks: tuple[int, ...] = ()
    """Whose shares; none given: all of the ring's devices, one after the other."""
    repeats: int = 10
    """Timed runs of each program, in turn with the one-device kernel."""
    warmup: int = 2
    """Runs before those."""
    run_seconds: float = 0.05
    """A timed run makes so many calls back to back that it takes about this long (on accelerators)."""
    baseline_up_to: int = 131072
    """The longest sequence that the one-device kernel is timed on; longer ones are held against this length."""
    exposed: bool = True
    """Time the ring without its rotations too, and the rotations alone."""
    check: bool = True
    """Compare with float64 before timing."""
    check_length: int = 2048
    """Every query and key is checked at this length (or at `lengths`, if shorter); 0: no such check."""
    check_rows: int = 16
    """At `lengths`, this many queries anywhere and as many at the end are checked."""
    peers: tuple[Literal["ringattention", "tokamax", "torch"], ...] = ()
    """Other projects' attention, where it is installed, on the same devices."""
    torch_python: str | None = None
    """For peer torch: a Python that has PyTorch; null: this one."""
    profile: str | None = None
    """A folder for a profile of each case."""
    output: str | None = None
    """A folder for results.json, results.md and plot.png."""
    seed: int = 0
    """Of the inputs and the documents."""

    def __post_init__(self):
        for name in ("lengths", "heads", "masks", "layouts", "backends", "passes"):
            _require(len(getattr(self, name)) > 0, f"{name} is empty; give at least one")
        for length in self.lengths:
            _require(length >= 2, f"lengths has {length}; a sequence has at least 2 tokens")
        for heads in self.heads:
            split_heads(heads)
        for mask in self.masks:
            _require(
                MASK.fullmatch(mask) is not None,
                f"unknown mask {mask!r}; the masks are causal, full, packed and window:W, such as window:4096",
            )
        for backend in self.backends:
            check_name(backend)
        _at_least(self, head_dim=1, batch=1, mean_document=2, repeats=1, warmup=1, check_rows=1, baseline_up_to=2)
        _at_least(self, share=0, check_length=0, simulated_devices=0, seed=0)
        _require(
            self.ulysses_size is None or "hybrid" in self.strategies,
            f"ulysses_size {self.ulysses_size} is for strategy hybrid; name it, or leave ulysses_size out",
        )
        if self.host_size is not None:
            # A ulysses_size says how hybrid groups.
            grouped = [name for name in self.strategies if name in BY_HOST[: 2 if self.ulysses_size is None else 1]]
            free = "two_level and hybrid" if self.ulysses_size is None else "two_level, where hybrid has a ulysses_size"
            _require(bool(grouped), f"host_size {self.host_size} is for strategies {free}; name one, or leave it out")
            check_host_size(grouped[0], self.host_size)
        _require(self.devices is None or self.devices >= 1, f"devices is {self.devices}; it must be at least 1")
        _require(0 <= self.run_seconds <= 60, f"run_seconds is {self.run_seconds}; use 0 (one call) to 60")
        _require(self.share != 1, "share 1 is a whole sequence: use --strategies one_device, or a share of 2 or more")
        _require(not self.ranks or self.share > 0, f"ranks {self.ranks} are of a share; give --share too")
        for rank in self.ranks:
            _require(0 <= rank < self.share, f"ranks has {rank}; a ring of {self.share} has 0 to {self.share - 1}")


@dataclasses.dataclass(frozen=True)
class TrainBench:
    """Whole training steps of a config, by the functions that `ringjax train` uses; nothing is saved."""

    steps: int = 5
    """Timed steps."""
    warmup: int = 2
    """Steps before those; 0 where one takes minutes (what it compiles is compiled before)."""
    data: Literal["auto", "config", "synthetic"] = "auto"
    """The config's own data, random tokens (a document a row), or auto: its own if it can be opened."""
    stage: str | None = None
    """The name of the stage to measure; null: the first."""
    profile: str | None = None
    """A folder for a profile of one step."""
    top: int = 25
    """Kernels that the profile's table lists."""
    compare: str | None = None
    """Variants to measure in turn, each with each: "data.packing=masked,pad mesh.layout=striped,contiguous"."""
    output: str | None = None
    """A folder for results.json and results.md."""

    def __post_init__(self):
        _at_least(self, steps=1, warmup=0, top=1)
        combinations(self.compare)
        _require(
            self.compare is None or self.profile is None,
            "compare and profile: a profile is of one variant; leave one of them out",
        )


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """The command line of `ringjax bench train`: the config's own sections, and this one."""

    bench: TrainBench = TrainBench()


@dataclasses.dataclass(frozen=True)
class GenerateBench:
    """Prompts read and tokens written after them, by the session that `ringjax chat` uses; random weights, batch 1."""

    sizes: tuple[str, ...] = ("1b",)
    """Models, by the names of `ringjax.models.sizes`; text alone."""
    prefill: tuple[int, ...] = (32768, 131072)
    """Tokens of the prompts that are read, the longest last."""
    contexts: tuple[int, ...] = (8192, 32768, 131072)
    """Tokens in the cache when tokens are written; the longest prompt must hold them."""
    new_tokens: int = 65
    """Tokens that are written; all but the first are timed."""
    repeats: int = 3
    """Timed runs of each."""
    splits: tuple[int, ...] = ()
    """Contexts at which one layer's attention is timed with the keys split and not (Flash-Decoding)."""
    chunk: int | None = None
    """Tokens of a prompt that are read at once; null: the session's own choice."""
    peers: tuple[Literal["transformers"], ...] = ()
    """Others to time on the same GPU, in a process of its own."""
    peer_python: str | None = None
    """An interpreter that has them; null: this one."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of weights, cache and products."""
    simulated_devices: int = 0
    """CPU devices to simulate where there is no accelerator, 0: none."""
    profile: str | None = None
    """A folder for a profile of the tokens after the shortest of the contexts, for each model."""
    top: int = 12
    """Kernels that the profile's table lists."""
    output: str | None = None
    """A folder for results.json, results.md and plots."""
    seed: int = 0
    """Of weights and tokens."""

    def __post_init__(self):
        for name in ("sizes", "prefill", "contexts"):
            _require(len(getattr(self, name)) > 0, f"{name} is empty; give at least one")
        for size in self.sizes:
            get_size(size)
        _at_least(self, new_tokens=2, repeats=1, top=1, simulated_devices=0, seed=0)
        _require(self.chunk is None or self.chunk >= 1, f"chunk is {self.chunk}; it must be at least 1, or null")
        for name in ("prefill", "contexts", "splits"):
            least = min(getattr(self, name), default=2)
            _require(least >= 2, f"{name} has {least}; give 2 tokens or more")
        longest, read = max(self.contexts), max(self.prefill)
        _require(longest <= read, f"contexts has {longest}, the longest prompt {read} tokens; give --prefill {longest}")


def split_heads(heads: str) -> tuple[int, int]:
    """Query heads and key/value heads of "32/8" or "16"; raises ValueError for anything else.

    >>> split_heads("32/8"), split_heads("16")
    ((32, 8), (16, 16))
    """
    _require(
        HEADS.fullmatch(heads) is not None,
        f"heads {heads!r} must be query heads / key and value heads, such as 32/8, or one number",
    )
    query, _, kv = heads.partition("/")
    query_heads, kv_heads = int(query), int(kv or query)
    _require(
        query_heads % kv_heads == 0,
        f"heads {heads!r}: {kv_heads} key/value heads do not divide {query_heads} query heads",
    )
    return query_heads, kv_heads
