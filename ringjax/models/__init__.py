"""The any-to-any transformer and the image tokenizer.

    config        the shape of a model, checked when it is read
    sizes         named models and context-extension stages
    parallel      the one table from logical axes to mesh axes
    rope          rotary positions, exact for millions of tokens
    layers        linear, norm, embedding
    feed_forward  SwiGLU, also blockwise
    remat         what the backward pass computes again
    cache         keys and values during generation
    transformer   the model
    features      vectors of pictures in the places of tokens
    clip          the vision transformer that makes them
    llava         both together: LLaVA-1.5
    vqgan         the image tokenizer
"""

from ringjax.models.cache import KVCache
from ringjax.models.config import ModelConfig, RopeScaling
from ringjax.models.parallel import Parallel
from ringjax.models.sizes import SIZES, STAGES, get_size
from ringjax.models.transformer import Transformer

__all__ = ["SIZES", "STAGES", "KVCache", "ModelConfig", "Parallel", "RopeScaling", "Transformer", "get_size"]
