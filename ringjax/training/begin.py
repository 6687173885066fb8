"""Where the parameters of a run's first step come from: a published model, or the last checkpoint of another run.

Under adapters they are the base, which checkpoints do not hold: it is read again whenever the run goes on, and must be
the same one.
"""

from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from ringjax.training import distributed
from ringjax.training.arrays import CheckpointError, check_same_arrays, describe_arrays, load_arrays
from ringjax.training.checkpoint import FOLDER, best_or, last_whole
from ringjax.training.config import RunConfig
from ringjax.training.manifest import digest_of
from ringjax.training.start import OpenStart
from ringjax.training.task import Task, Trains


class Begun(NamedTuple):
    """Parameters where they live, what to say about them, and what they are: `{"path", "fingerprint"}`.

    `notes` is what their checkpoint says of its data.
    """

    params: Any
    said: list[str]
    identity: dict[str, str]
    notes: dict[str, Any]


def begin_from(config: RunConfig, task: Task, trainer: Trains, mesh: Mesh, open_start: OpenStart | None) -> Begun:
    """The parameters that `init_from` names.

    Raises CheckpointError where it is a run without a whole checkpoint, or one of another model.
    """
    path = config.init_from
    start = task.open_start(path, open_start)
    if start is not None:
        params, said = task.first_params(start, mesh, config.seed)
        return Begun(params, said, {"path": path, "fingerprint": start.fingerprint}, {})
    said: list[str] = []
    found = distributed.same_on_all(lambda: _last(path, config.checkpoint.verify, said))
    if found is None:
        raise CheckpointError(f"init_from {path} holds no whole checkpoint; give a run's folder")
    folder, parameters, fingerprint, alone, notes = found
    if alone:
        raise CheckpointError(
            f"init_from {path} is a run of adapters alone: merge them into their model first (ringjax convert {path}"
            " MERGED) and name that"
        )
    base = task.base(trainer)
    check_same_arrays(parameters, describe_arrays(base), folder)
    params = load_arrays(Path(folder), "params", base)
    return Begun(params, [*said, f"parameters from {folder}"], {"path": path, "fingerprint": fingerprint}, notes)


def check_same_base(saved: dict[str, str], found: dict[str, str]) -> None:
    """Raises CheckpointError where the model under a run's adapters is not the one that they were trained on."""
    if saved["fingerprint"] != found["fingerprint"]:
        raise CheckpointError(
            f"init_from {found['path']} is not the model that this run's adapters were trained on (it was"
            f" {saved['path']}, fingerprint {saved['fingerprint']}, and is {found['fingerprint']}); name that one"
        )


def _last(path: str, verify: bool, said: list[str]) -> list | None:
    found = last_whole(Path(path) / FOLDER, verify, said.append)
    if found is None:
        return None
    where, info = best_or(found, Path(path) / FOLDER, said.append)
    return [str(where), info["parameters"], digest_of(where), "base" in info, info.get("notes", {})]
