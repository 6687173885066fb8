"""What a run leaves in its folder beside checkpoints and metrics.

    run_dir/config.yaml
            tokenizer/                      the files of its text tokenizer (and its chat template)
            vision_tokenizer.safetensors    its image tokenizer, where the config names one

so the folder is enough to use it. Checkpoints note the fingerprint of the image tokenizer under `CODES_OF`.
"""

import dataclasses
from pathlib import Path

from ringjax.data.config import DataConfig

TOKENIZER = "tokenizer"
VISION_TOKENIZER = "vision_tokenizer.safetensors"
CODES_OF = "codes_of"


def own_tokenizer(run_dir: str | Path, data: DataConfig) -> DataConfig:
    """`data` with the tokenizers that lie in the run's folder, where they do (older runs have none)."""
    folder, vision = Path(run_dir) / TOKENIZER, Path(run_dir) / VISION_TOKENIZER
    if folder.is_dir():
        data = dataclasses.replace(data, tokenizer=str(folder))
    return dataclasses.replace(data, vision_tokenizer=str(vision)) if vision.is_file() else data
