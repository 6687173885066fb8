"""What a run leaves in its folder beside checkpoints and metrics.

    run_dir/config.yaml
            tokenizer/      the files of its text tokenizer (and its chat template): the folder is enough to use it
"""

import dataclasses
from pathlib import Path

from ringjax.data.config import DataConfig

TOKENIZER = "tokenizer"


def own_tokenizer(run_dir: str | Path, data: DataConfig) -> DataConfig:
    """`data` with the tokenizer that lies in the run's folder, where one does (older runs have none)."""
    folder = Path(run_dir) / TOKENIZER
    return dataclasses.replace(data, tokenizer=str(folder)) if folder.is_dir() else data
