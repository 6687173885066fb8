"""LWM's published weights of text and vision, to see, draw and write with (`ringjax.inference.trained`)."""

import dataclasses
from pathlib import Path

import jax

from ringjax.data.config import DataConfig, SourceConfig
from ringjax.inference.trained import PromptForm, TrainedRun
from ringjax.interop import lwm
from ringjax.interop.load import load_params
from ringjax.models.parallel import Parallel
from ringjax.models.transformer import for_decoding

SUFFIX = ".msgpack"
_ONE_DEVICE = Parallel()


def load_stream(
    path: str | Path,
    *,
    tokenizer: str | None,
    rope_theta: float | None,
    heads: int | None = None,
    image_tokenizer: str | None = None,
    prompt_form: PromptForm = "lwm",
    parallel: Parallel = _ONE_DEVICE,
) -> TrainedRun:
    """The model in an LWM stream, which holds neither a tokenizer nor RoPE's base: both must be named.

    In bfloat16, but float32 on CPUs. Raises ValueError where one of them is missing, FileNotFoundError for a file
    that is not there.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no LWM stream at {path}")
    if tokenizer is None:
        raise ValueError(f"{path} holds no tokenizer; name LWM's: --tokenizer tokenizer.model")
    if rope_theta is None:
        raise ValueError(
            f"{path} does not say RoPE's base; give it: --rope_theta 5e7 for LWM's 1M-token models (2.5e7: 512K, 1e7:"
            " 128K and 256K)"
        )
    source, dtype = lwm.LwmSource(path), "float32" if jax.default_backend() == "cpu" else "bfloat16"
    shape = lwm.shape_of_stream(source, heads)
    shape = dataclasses.replace(shape, rope_theta=rope_theta, dtype=dtype, param_dtype=dtype)
    model = for_decoding(load_params(shape, source, lwm.lwm_recipes(shape, lwm.is_scanned(source)), parallel))
    data = DataConfig(sources=(SourceConfig(str(path)),), tokenizer=tokenizer)  # 256 codes a frame, of 8192
    return TrainedRun(model, data, parallel, image_tokenizer, prompt_form)
