"""`ringjax bench generate`: prompts read and tokens written by a `Session`, beside what the memory allows.

    least time of a token = bytes of (weights + K and V of the context) / bytes a second of the memory
    FLOPs of a prompt     = 2 · parameters · T + 2 · layers · (N·H) · T²        (causal; the head counts once a token)
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh

from ringjax.attention import validate
from ringjax.attention.decode import decode_attention
from ringjax.attention.kernels import mosaic, reference
from ringjax.benchmarks.config import GenerateBench
from ringjax.benchmarks.memory import peak_bytes
from ringjax.benchmarks.profile import Profile, profiled
from ringjax.inference.sampling import Sampling
from ringjax.inference.session import BURST, Session
from ringjax.models.config import ModelConfig
from ringjax.models.parallel import Parallel
from ringjax.models.sizes import get_size
from ringjax.models.transformer import Transformer, for_decoding
from ringjax.training.utilisation import mfu, peak_bandwidth

GREEDY = Sampling(temperature=0)
# Between the kernel's own rounding (bfloat16's half a percent) and another function.
NONSENSE = 0.02


@dataclasses.dataclass(frozen=True)
class Result:
    """Of one model and context. Seconds; `kind` is prefill or token; `bound` is the least a token can take."""

    size: str
    kind: str
    context: int
    seconds: tuple[float, ...]
    devices: int
    flops: float
    mfu: float | None
    bytes_read: int
    bound: float | None
    peak_bytes: int | None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def share(self) -> float | None:
        """Of the memory's bandwidth that a token reached."""
        return None if self.bound is None else self.bound / self.median

    def plain(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "median": self.median, "share": self.share}


@dataclasses.dataclass(frozen=True)
class TokenProfile:
    """Where the time of a token after `context` goes; every figure of the profile is a token's."""

    size: str
    context: int
    profile: Profile

    def plain(self) -> dict[str, Any]:
        return {"size": self.size, "context": self.context, **self.profile.plain()}


def model_config(size: str, dtype: str) -> ModelConfig:
    """The text model of a size."""
    return dataclasses.replace(get_size(size), dtype=dtype, param_dtype=dtype, vision_vocab_size=0)


def run_generate(
    config: GenerateBench, done: Callable[[Result], None], seen: Callable[[TokenProfile], None],
    say: Callable[[str], None],
) -> None:  # fmt: skip
    """Each result to `done` as it comes, each profile to `seen`."""
    for size in config.sizes:
        session = _one_model(config, size, done)
        if config.profile:
            found = _profile(session, min(config.contexts), Path(config.profile, size), config.top, say)
            if found is not None:
                seen(TokenProfile(size, min(config.contexts), found))
        del session  # its memory serves the next model


def _one_model(config: GenerateBench, size: str, done: Callable[[Result], None]) -> Session:
    shape = model_config(size, config.dtype)
    devices = jax.devices()
    mesh = Mesh(np.array(devices), ("sp",), axis_types=(AxisType.Auto,))
    parallel = Parallel(mesh) if len(devices) > 1 else Parallel()
    model = for_decoding(Transformer.create(shape, config.seed, parallel))
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model)))
    table = shape.vocab_size * shape.width
    weights = (parameters - (0 if shape.tie_embeddings else table)) * shape.compute_dtype.itemsize
    prompts = sorted(config.prefill)
    step = 2 * parallel.ring_size  # what every layout can cut
    session = Session(model, (prompts[-1] + config.new_tokens) // step * step + step, parallel, config.chunk)
    session.reserve(session.capacity)
    del model
    ids = np.random.default_rng(config.seed).integers(0, shape.vocab_size, prompts[-1]).tolist()

    def result(kind: str, context: int, seconds: list[float]) -> Result:
        cache = 2 * shape.layers * context * shape.key_heads * shape.head_size * shape.compute_dtype.itemsize
        flops = 2.0 * parameters * context + 2.0 * shape.layers * shape.heads * shape.head_size * float(context) ** 2
        bandwidth = peak_bandwidth(devices[0].device_kind)
        # Every device reads all weights, and its own part of the cache.
        read = weights + cache // len(devices)
        used = bound = None
        if kind == "prefill":
            used = mfu(flops, statistics.median(seconds), devices[0].device_kind, len(devices))
        elif bandwidth is not None:
            bound = read / bandwidth
        return Result(size, kind, context, tuple(seconds), len(devices), flops, used, read, bound, peak_bytes())

    for length in prompts:
        read = functools.partial(_read, session, ids[:length])
        read()
        done(result("prefill", length, [_seconds(read) for _ in range(config.repeats)]))
    for context in sorted(config.contexts, reverse=True):
        _write(session, context, config.new_tokens)
        done(result("token", context, [_write(session, context, config.new_tokens) for _ in range(config.repeats)]))
    return session


def _profile(session: Session, context: int, folder: Path, top: int, say: Callable[[str], None]) -> Profile | None:
    """Of one token that is read and two bursts of tokens: every figure is divided by their number."""
    count = min(2 * BURST, session.capacity - context) + 1
    _write(session, context, count)
    return profiled(folder, lambda: _write(session, context, count), "", say, top=top, calls=count)


def _read(session: Session, ids: list[int]) -> None:
    session.rewind(0)
    list(session.generate(ids, max_new_tokens=1, sampling=GREEDY))


def _write(session: Session, context: int, count: int) -> float:
    """Seconds a token after the first `context` tokens; the first one, which waits for nothing, is not timed."""
    session.rewind(context - 1)
    times = []
    for _ in session.generate([1], max_new_tokens=count, sampling=GREEDY):
        times.append(time.perf_counter())
    return (times[-1] - times[0]) / (len(times) - 1)


def _seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@dataclasses.dataclass(frozen=True)
class Split:
    """One layer's attention of one token: seconds a call with the keys split, not split, and by XLA's products."""

    size: str
    context: int
    split: float | None
    unsplit: float | None
    xla: float
    bytes_read: int
    error: float

    def plain(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def run_splits(config: GenerateBench, done: Callable[[Split], None]) -> None:
    """The picture of Flash-Decoding, each kernel checked against the plain formula before it is timed."""
    for size in config.sizes:
        shape = model_config(size, config.dtype)
        for context in sorted(config.splits):
            done(_split(config, size, shape, context))


def _split(config: GenerateBench, size: str, shape: ModelConfig, context: int) -> Split:
    heads = (1, 1, shape.heads, shape.head_size), (1, context, shape.key_heads, shape.head_size)
    keys = jax.random.split(jax.random.key(config.seed), 3)
    q, k, v = (jax.random.normal(key, heads[i > 0], shape.compute_dtype) for i, key in enumerate(keys))
    score = validate.score(None, None, shape.head_size)
    lo, hi = jnp.zeros((1, 1), jnp.int32), jnp.full((1, 1), context, jnp.int32)
    ways = {"xla": lambda q, k, v: reference.forward(q, k, v, lo, hi, score).out}
    if mosaic.refuses_few(q, k[None], v[None], score) is None:
        from ringjax.attention.kernels.mosaic import split_kernel

        def forward(q, k, v, splits):
            return split_kernel.forward(q, k[None], v[None], jnp.int32(0), lo, hi, score, splits=splits).out

        ways |= {"split": functools.partial(forward, splits=None), "unsplit": functools.partial(forward, splits=1)}
    expected = np.asarray(jax.jit(ways["xla"])(q, k, v), np.float64)
    chosen = decode_attention(q, k, v, lengths=jnp.full(1, context))
    error = np.linalg.norm(np.asarray(chosen, np.float64) - expected) / np.linalg.norm(expected)
    if not error <= NONSENSE:
        raise ArithmeticError(f"attention over {context} tokens is {error:.2g} off the plain formula; it is not timed")
    seconds = {name: _seconds_a_call(way, q, k, v, config.repeats) for name, way in ways.items()}
    read = 2 * context * shape.key_heads * shape.head_size * shape.compute_dtype.itemsize
    return Split(
        size, context, seconds.get("split"), seconds.get("unsplit"), seconds["xla"], read, float(error)
    )


def _seconds_a_call(attend: Callable, q, k, v, repeats: int, calls: int = 40) -> float:
    """Each call's queries depend on the call before; one dispatch for all, so that the host's part does not count."""

    @jax.jit
    def loop(q, k, v):
        return jax.lax.fori_loop(0, calls, lambda _, q: (q + 1e-3 * attend(q, k, v)).astype(q.dtype), q)

    jax.block_until_ready(loop(q, k, v))
    return min(_seconds(lambda: jax.block_until_ready(loop(q, k, v))) for _ in range(repeats)) / calls


def copy_bandwidth(repeats: int = 5) -> float:
    """Bytes read and written a second by one device that adds 1 to 2 GiB: what its memory gives a plain program."""
    x = jnp.zeros(2**30, jnp.bfloat16)
    add = jax.jit(lambda x: x + 1)
    jax.block_until_ready(add(x))
    return 2 * x.nbytes / min(_seconds(lambda: jax.block_until_ready(add(x))) for _ in range(repeats))
