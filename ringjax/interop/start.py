"""What a run can begin with (`init_from`): every published model that is read here, opened for `ringjax.training`."""

from pathlib import Path

from ringjax.data.tokenizers import CONTENT
from ringjax.interop import lwm
from ringjax.interop.load import load_params
from ringjax.interop.published import file_fingerprint, is_published, open_published
from ringjax.models.config import ModelConfig
from ringjax.models.parallel import Parallel
from ringjax.models.transformer import Transformer
from ringjax.training.start import Start


def open_start(path: str, heads: int | None = None) -> Start | None:
    """The published model at `path`; None for a run's folder.

    `heads` are for an LWM stream, which does not tell them; null: those of LWM's size with its shapes. Raises
    FileNotFoundError, ValueError or NotImplementedError for what is missing, damaged or not read.
    """
    if is_published(path):
        return _published(path)
    if Path(path).is_file():
        return _stream(Path(path), heads)
    return None


def _published(path: str) -> Start:
    published = open_published(path)
    shape = published.description.config
    folder = published.tokenizer
    has_tokenizer = not isinstance(folder, Path) or any(
        (folder / name).is_file() for name in (CONTENT, "tokenizer.model")
    )
    return Start(published.path, shape, published.load_config, file_fingerprint(published.path), has_tokenizer)


def _stream(path: Path, heads: int | None) -> Start:
    source = lwm.LwmSource(path)
    shape = lwm.shape_of_stream(source, heads)

    def load(config: ModelConfig, parallel: Parallel) -> Transformer:
        return load_params(config, source, lwm.lwm_recipes(config, lwm.is_scanned(source)), parallel)

    return Start(path, shape, load, file_fingerprint(path), has_tokenizer=False, unknown=("rope_theta", "rope_scaling"))
