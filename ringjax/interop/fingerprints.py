"""Short names of the contents of models and files: what several processes compare, and evaluations note."""

from collections.abc import Iterable
from pathlib import Path

from ringjax.interop.published import file_fingerprint
from ringjax.interop.release import is_release, release_folder
from ringjax.interop.runs import Checkpoint, is_run
from ringjax.training.manifest import digest_of


def model_fingerprint(path: str | Path, stage: str | None = None) -> str:
    """Of a run's last checkpoint (of its `stage`), of a released model, or of a published model's files.

    Raises FileNotFoundError or CheckpointError where there is none.
    """
    if is_release(path):
        return file_fingerprint(release_folder(path))
    if is_run(path):
        return digest_of(Checkpoint.find(path, stage).path)[:16]
    if not Path(path).exists():
        raise FileNotFoundError(f"no model at {path}; give a run's folder or a published model (hubs are not asked)")
    return file_fingerprint(path)


def file_facts(paths: Iterable[str | Path | None]) -> dict[str, str]:
    """Name and fingerprint of each file or folder; of those that are none (names of samples) nothing."""
    there = [path for path in paths if path is not None and Path(path).exists()]
    return {f"file {path}": file_fingerprint(path) for path in there}
