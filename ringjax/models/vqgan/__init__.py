"""The VQ image tokenizer: a picture becomes a small grid of codes that a transformer reads and writes as tokens.

    config.py     VQGANConfig, the published LWM size and the small one for digits
    layers.py     residual blocks, encoder, decoder
    model.py      VQGAN: encode, decode, the training forward pass
    scalar.py     finite scalar quantization, the codebook that nothing has to learn
    codebook.py   nearest code, straight-through gradient, moving averages that keep every code in use
    pictures.py   between uint8 pictures and pixels in [-1, 1]; whole data sets at a time
    files.py      safetensors in and out, fingerprint
"""

from ringjax.models.vqgan.codebook import CodebookAverages, nearest_code, straight_through, update_codebook
from ringjax.models.vqgan.config import DIGITS, LWM, VQGANConfig
from ringjax.models.vqgan.files import load_vqgan, published_name, save_vqgan, vqgan_fingerprint
from ringjax.models.vqgan.model import VQGAN, VQGANOutput
from ringjax.models.vqgan.pictures import decode_pictures, encode_pictures, to_pixels, to_uint8

__all__ = [
    "DIGITS",
    "LWM",
    "VQGAN",
    "CodebookAverages",
    "VQGANConfig",
    "VQGANOutput",
    "decode_pictures",
    "encode_pictures",
    "load_vqgan",
    "nearest_code",
    "published_name",
    "save_vqgan",
    "straight_through",
    "to_pixels",
    "to_uint8",
    "update_codebook",
    "vqgan_fingerprint",
]
