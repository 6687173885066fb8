"""Short names of models, by which an evaluation knows that it goes on with the same one."""

import hashlib
import json
from pathlib import Path

from ringjax.inference.run_text import is_run
from ringjax.training.checkpoint import FOLDER, step_folders
from ringjax.training.manifest import NAME as MANIFEST


def model_fingerprint(path: str) -> str:
    """A short name of a model's files: their names, sizes, beginnings and ends (not all of what may be terabytes); of
    a run, that of its last checkpoint."""
    if is_run(path):
        return _run_fingerprint(path)
    source, size = Path(path), 1 << 16
    digest = hashlib.sha256()
    for file in [source] if source.is_file() else sorted(f for f in source.iterdir() if f.is_file()):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
        with open(file, "rb") as data:
            digest.update(data.read(size))
            data.seek(max(0, file.stat().st_size - size))
            digest.update(data.read(size))
    return digest.hexdigest()[:16]


def _run_fingerprint(folder: str | Path) -> str:
    """A short name of a run's last checkpoint: the checksum of its manifest, which holds those of its files."""
    for _, path in step_folders(Path(folder) / FOLDER):
        if (path / MANIFEST).is_file():
            return json.loads((path / MANIFEST).read_text("utf-8").partition("\n")[0])["sha256"][:16]
    return "none"
