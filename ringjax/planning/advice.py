"""What to change where a stage ran out of memory, by the planner's arithmetic; for any machine, simulated ones too."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from ringjax.planning import memory
from ringjax.planning.search import BLOCKWISE, REMATS
from ringjax.training.config import StageConfig
from ringjax.training.load import check_stage_devices, mesh_shape
from ringjax.training.mesh import is_simulated, resolve_shape

LEAST, SHOWN = 0.05, 4
Changed = tuple[str, StageConfig]


def advice(stage: Any) -> list[str]:
    """Lines: what a device needs and of what, and the changes that need least. Nothing for what is no transformer's."""
    if not isinstance(stage, StageConfig):
        return []
    needed = _memory(stage)
    parts = ", ".join(f"{name} {size / 2**30:.3g}" for name, size in needed.parts().items())
    lines = [f"by the planner's arithmetic a device needs {needed.total / 2**30:.3g} GiB ({parts}) when all is trained"]
    tried = [(words, _fitting(changed)) for words, changed in changes(stage)]
    found = [(words, memory.total) for words, memory in tried if memory is not None]
    less = sorted((total, words) for words, total in found if total < (1 - LEAST) * needed.total)
    lines += [f"  {words}: {total / 2**30:.3g} GiB" for total, words in less[:SHOWN]]
    if not less:
        lines.append("  no single change of the config lessens it by much: more devices, or a smaller model")
    return [*lines, "ringjax plan CONFIG --target KIND:COUNT --search true looks at every mesh"]


def changes(stage: StageConfig) -> Iterator[Changed]:
    """Single changes that trade time for memory; some may be impossible."""
    model, training = stage.model, stage.training
    for remat in REMATS[REMATS.index(model.remat) + 1 :] if model.remat in REMATS else REMATS:
        unroll = 1 if remat == "offload" else model.unroll
        yield f"--model.remat {remat}", _with(stage, model=dataclasses.replace(model, remat=remat, unroll=unroll))
    if model.ffn_chunk is None:
        yield f"--model.ffn_chunk {BLOCKWISE}", _with(stage, model=dataclasses.replace(model, ffn_chunk=BLOCKWISE))
    for times in (2, 4):
        pieces = training.accumulation * times
        if training.batch_size % pieces == 0:
            more = dataclasses.replace(training, accumulation=pieces)
            yield f"--training.accumulation {pieces}", _with(stage, training=more)
    dp, fsdp, tp, sp = _sizes(stage)
    for shape in dict.fromkeys(((1, dp * fsdp, tp, sp), (1, fsdp, tp, dp * sp), (1, 1, tp, dp * fsdp * sp))):
        if shape != (dp, fsdp, tp, sp):
            text = ",".join(map(str, shape))
            mesh = dataclasses.replace(stage.mesh, shape=text, simulated_shape=None)
            yield f"--mesh.shape {text}", _with(stage, mesh=mesh)


def _with(stage: StageConfig, **sections) -> StageConfig:
    return dataclasses.replace(stage, **sections)


def _sizes(stage: StageConfig) -> tuple[int, int, int, int]:
    return resolve_shape(mesh_shape(stage, is_simulated()), len(jax.devices()))


def _memory(stage: StageConfig) -> memory.Memory:
    platform = "tpu" if jax.devices()[0].platform == "tpu" else "gpu"
    return memory.of_stage(stage, _sizes(stage), platform)


def _fitting(stage: StageConfig) -> memory.Memory | None:
    try:
        check_stage_devices(stage, len(jax.devices()), is_simulated())
        return _memory(stage)
    except (ValueError, NotImplementedError):
        return None
