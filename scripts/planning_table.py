"""Compiles the steps of docs/results/planning.md for their slices and prints its table; needs libtpu, not a TPU.

    python scripts/planning_table.py                    # all, one after the other: an hour on two cores
    python scripts/planning_table.py 7b_v4_8M_paper     # some of them
    python scripts/planning_table.py --arithmetic       # without the compiler, at once

`paper` cells are in float32 with full checkpointing, as the Ring Attention paper trained; `best` ones are ours.
"""

import argparse
import dataclasses
import importlib.metadata

from ringjax.planning.compiled import Compiled, compile_stage
from ringjax.planning.devices import GIB, Target
from ringjax.planning.plan import StagePlan, plan_stage
from ringjax.training.config import RunConfig
from ringjax.training.load import load_config, parse_config

HEADER = """\
| cell | machine | mesh | keeps | arithmetic GiB | compiler GiB | off | of a chip | rotations | compiled in |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""
M = 2**20
V4, V5E, POD, HALF = "tpu:v4:8x8x16", "tpu:v5e:16x16", "tpu:v4:8x8x8", "tpu:v4:4x8x8"


def text_only(size: str, mesh: str, seq_len: int, **model) -> RunConfig:
    """A row of `seq_len` tokens through a text model with a blockwise feed-forward."""
    run = parse_config(
        f"{{model: {{size: {size}, vision_vocab_size: 0, ffn_chunk: 2048}}, data: {{}},"
        f" training: {{seq_len: {seq_len}, batch_size: 1}}, mesh: {{shape: '{mesh}'}}}}"
    )
    return dataclasses.replace(run, model=dataclasses.replace(run.model, **model))


def paper(size: str, mesh: str, seq_len: int) -> RunConfig:
    """The Ring Attention paper's setting."""
    return text_only(size, mesh, seq_len, dtype="float32", remat="full")


def small(seq_len: int, remat: str) -> RunConfig:
    """LWM's 1b on eight chips."""
    run = parse_config(
        f"{{model: {{size: 1b, remat: {remat}}}, data: {{}}, training: {{seq_len: {seq_len}, batch_size: 1}}}}"
    )
    return dataclasses.replace(run, mesh=dataclasses.replace(run.mesh, shape="1,1,1,-1"))


def stage(config: str, name: str, mesh: str | None = None, remat: str = "save_attention") -> RunConfig:
    """A stage of a config, perhaps with another mesh."""
    run = load_config(f"configs/{config}.yaml")
    (found,) = (stage for stage in run.stages if stage.name == name)
    model, shape = dataclasses.replace(found.model, remat=remat), mesh or found.mesh.shape
    found = dataclasses.replace(found, model=model, mesh=dataclasses.replace(found.mesh, shape=shape))
    return dataclasses.replace(run, stages=(found,))


# LWM's own meshes for its text stages (512 chips in the paper; by their batches they are for 256).
PAPER_MESHES = {"32k": "1,-1,4,1", "128k": "1,-1,8,1", "256k": "1,-1,16,1", "512k": "1,-1,16,2", "1m": "1,-1,16,4"}
CELLS: dict[str, tuple[str, RunConfig]] = {
    "1b_full_16k_v5p": ("tpu:v5p:2x2x2", small(8 * 16384, "full")),
    "1b_full_16k_v4": ("tpu:v4:2x2x2", small(8 * 16384, "full")),
    "1b_sa_16k_v5e": ("tpu:v5e:2x4", small(8 * 16384, "save_attention")),
    "3b_v4_16M_paper": (V4, paper("3b", "1,1,8,-1", 16 * M)),
    "3b_v4_16M_best": (V4, text_only("3b", "1,1,8,-1", 16 * M, remat="offload")),
    "7b_v4_8M_paper": (V4, paper("7b", "1,1,1,-1", 8 * M)),
    "7b_v4_32M_best": (V4, text_only("7b", "1,1,1,-1", 32 * M, remat="full")),
    "7b_v4_48M_best": (V4, text_only("7b", "1,1,1,-1", 48 * M, remat="full")),
    "13b_v4_4M_paper": (V4, paper("13b", "1,1,1,-1", 4 * M)),
    "13b_v4_16M_best": (V4, text_only("13b", "1,1,1,-1", 16 * M, remat="full")),
    "30b_v4_2M_paper": (V4, paper("30b", "1,1,2,-1", 2 * M)),
    "30b_v4_8M_best": (V4, text_only("30b", "1,1,2,-1", 8 * M, remat="full")),
    "3b_v5e_4M_paper": (V5E, paper("3b", "1,1,2,-1", 4 * M)),
    "3b_v5e_4M_best": (V5E, text_only("3b", "1,1,2,-1", 4 * M, remat="offload")),
    "7b_v5e_2M_paper": (V5E, paper("7b", "1,1,1,-1", 2 * M)),
    "7b_v5e_4M_best": (V5E, text_only("7b", "1,1,1,-1", 4 * M, remat="full")),
    **{f"text_{name}_1024": (POD, stage("lwm_text", name)) for name in PAPER_MESHES},
    **{f"text_{name}_512": (HALF, stage("lwm_text", name, mesh)) for name, mesh in PAPER_MESHES.items()},
    **{
        f"text_{name}_512_offload": (HALF, stage("lwm_text", name, mesh, "offload"))
        for name, mesh in PAPER_MESHES.items() if name != "32k"
    },
    **{f"vision_{name}_1024": (POD, stage("lwm_vision", name)) for name in ("1k", "8k", "32k", "128k", "1m")},
}  # fmt: skip


def row(name: str, plan: StagePlan, said: Compiled | None) -> str:
    """One line of the table."""
    usable, total = plan.target.device.usable, plan.memory.total
    mesh, keeps = ",".join(map(str, plan.sizes)), f"{plan.stage.model.remat}, {plan.stage.model.dtype}"
    cells = [name, str(plan.target), mesh, keeps, f"{total / GIB:.2f}"]
    if said is None:
        cells += ["", "", f"{total / usable:.0%}", "", ""]
    elif said.fits:
        off = "" if said.at_most else f"{total / said.used - 1:+.1%}"
        cells += [
            f"{'at most ' if said.at_most else ''}{said.used / GIB:.2f}",
            off,
            f"{said.used / usable:.0%}",
            said.rotations,
            f"{said.seconds:.0f} s",
        ]
    else:
        cells += [f"does not fit: {said.used / GIB:.2f}", "", f"{said.used / usable:.0%}", "", f"{said.seconds:.0f} s"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", metavar="CELL", help=", ".join(CELLS))
    parser.add_argument("--arithmetic", action="store_true", help="do not ask the compiler")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.cells if name not in CELLS]:
        parser.error(f"there is no cell {unknown[0]!r}; the cells are {', '.join(CELLS)}")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib"))
    print(f"{versions}\n\n{HEADER}")
    for name in arguments.cells or CELLS:
        machine, run = CELLS[name]
        plan = plan_stage(run, run.stage_list[0], Target.parse(machine))
        said = None if arguments.arithmetic else compile_stage(plan.stage, plan.target)
        print(row(name, plan, said), flush=True)


if __name__ == "__main__":
    main()
