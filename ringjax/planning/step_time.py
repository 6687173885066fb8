"""How long a training step takes: what is computed, moved and sent on one device, over the rates of `devices.py`.

    products      6 · parameters a token, and what is computed again       / (share · peak)
    attention     2 + 5 products a visible pair                            / (share · peak), slower on short rows
    elementwise   every array of a block read or written `PASSES` times    / memory bandwidth
    stacking      what a block keeps, in and out of arrays of all blocks   / memory bandwidth (none when unrolled)
    exposed       what is sent and not hidden (`communication.py`)

A ring waits for its busiest device, so attention is divided by how busy the layout keeps it (`work.py`). Nothing here
is measured but the shares: docs/results/planning.md compares the result with docs/results/training.md.
"""

import dataclasses

from ringjax.planning import communication
from ringjax.planning.devices import Target
from ringjax.planning.flops import StepFlops, pairs_per_row, step_flops
from ringjax.planning.memory import kept_bytes
from ringjax.training.config import StageConfig
from ringjax.training.utilisation import useful_flops

# Times that each array of a block goes through memory in a step, for norms, RoPE, SwiGLU, casts, residuals.
PASSES = 7
# AdamW reads weight, gradient and two moments and writes three of them; the gradient was written,
# and read to be clipped.
OPTIMIZER_PASSES = 9
# float32 products at full precision take six of bfloat16 on a TPU; a GPU has no tensor cores for them.
FLOAT32_COST = {"tpu": 6.0, "gpu": 15.0}
# A GPU multiplies float32 as TF32 by default, at half of bfloat16's rate; a TPU as bfloat16.
FLOAT32_PRODUCTS = {"tpu": 1.0, "gpu": 2.0}
REFERENCE_HEAD = 128
# Host memory of `remat: offload`: bytes a second of one device each way (PCIe 5.0 × 16 gives 64 GB/s at most).
HOST_BANDWIDTH = 50e9


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one step on each device, by what takes them; `flops` are the useful ones of the whole step."""

    products: float
    attention: float
    waiting: float
    elementwise: float
    stacking: float
    exposed: float
    hidden: float
    offload: float
    flops: float
    peak: float

    @property
    def seconds(self) -> float:
        """The step. What is hidden takes no time of its own."""
        return (
            self.products
            + self.attention
            + self.waiting
            + self.elementwise
            + self.stacking
            + self.exposed
            + self.offload
        )

    @property
    def mfu(self) -> float:
        """Useful FLOPs over the peak of all devices (`ringjax.training.utilisation`)."""
        return self.flops / self.seconds / self.peak

    def parts(self) -> dict[str, float]:
        """Seconds by what takes them."""
        return {
            "products": self.products, "attention": self.attention, "waiting": self.waiting,
            "elementwise": self.elementwise, "stacking": self.stacking, "exposed communication": self.exposed,
            "offload": self.offload,
        }  # fmt: skip

    @property
    def bound(self) -> str:
        """What takes most of the step."""
        parts = self.parts()
        return max(parts, key=parts.get)


def of_stage(stage: StageConfig, sizes: tuple[int, int, int, int], target: Target, parameters: int) -> StepTime:
    """The step of a stage on a mesh of `sizes` dp, fsdp, tp, sp of `target`; `parameters` are the whole model's."""
    model, training, device = stage.model, stage.training, target.device
    tokens = training.batch_size * training.seq_len / target.count
    rates, flops = device.rates, step_flops(model, training.seq_len)
    wide = model.dtype != "bfloat16"
    products = (flops.products + flops.repeated) * tokens / (rates.products * device.flops)
    attention = tokens * _attention_seconds(flops, stage, target, sizes[3])
    sent = communication.of_stage(stage, sizes, target, attention / model.layers)
    memory = device.bandwidth * rates.memory
    state = parameters * 4 / (sizes[1] * sizes[2] * sizes[3])
    elementwise = (PASSES * model.layers * tokens * _block_bytes(stage, sizes[2]) + OPTIMIZER_PASSES * state) / memory
    kept = model.layers * tokens * sizes[2] * kept_bytes(model, sizes[2])
    offload = model.remat == "offload"
    row = useful_flops(model, parameters, training.seq_len, pairs_per_row(training.seq_len, model.window))
    return StepTime(
        products=products * (FLOAT32_PRODUCTS[device.platform] if wide else 1),
        attention=attention,
        waiting=attention * (communication.waiting(stage, sizes, target) - 1),
        elementwise=elementwise,
        stacking=0.0 if offload or model.unroll >= model.layers else 4 * kept / memory,
        exposed=sent.exposed,
        hidden=sent.hidden,
        offload=max(0.0, 2 * kept / HOST_BANDWIDTH - attention) if offload else 0.0,
        flops=training.batch_size * row,
        peak=target.count * device.flops,
    )


def _attention_seconds(flops: StepFlops, stage: StageConfig, target: Target, sp: int) -> float:
    """Seconds that attention to and from one token takes.

    A pair costs its products and an exponential, so small heads are slower: rate · H / (H + e), e ≈ 50 on an H100.
    """
    model, device = stage.model, target.device
    rates = device.rates
    piece = stage.training.seq_len / sp
    visible = min(stage.model.window or piece, piece)
    share = visible / (visible + rates.ramp)
    head = model.head_size / (model.head_size + rates.exponent) * (REFERENCE_HEAD + rates.exponent) / REFERENCE_HEAD
    cost = FLOAT32_COST[device.platform] if model.dtype != "bfloat16" else 1.0
    forward, backward = (rate * device.flops * share * head / cost for rate in rates.attention)
    return flops.attention_forward / forward + flops.attention_backward / backward


def _block_bytes(stage: StageConfig, tp: int) -> float:
    """Bytes of a block's arrays for one token, all its devices of tp together: 4·D each, q, k, v, out, and 3·F."""
    model = stage.model
    heads = 2 * (model.heads + model.key_heads) * model.head_size
    return (4 * model.width * tp + heads + 3 * model.ffn_width) * model.compute_dtype.itemsize
