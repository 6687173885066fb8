"""VQGAN: pictures to codes, codes to pictures, and the forward pass that trains both."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ringjax.models.vqgan.codebook import nearest_code, straight_through
from ringjax.models.vqgan.config import VQGANConfig
from ringjax.models.vqgan.layers import Decoder, Dtype, Encoder
from ringjax.models.vqgan.scalar import bound, scalar_codes, scalar_entries


class VQGANOutput(NamedTuple):
    """What a training step needs."""

    pixels: Float[Array, "B H W C"]
    """The reconstruction, not clipped, float32."""
    features: Float[Array, "B H W E"]
    """What the decoder's last convolution made them of."""
    latents: Float[Array, "B h w D"]
    """What was quantized; `update_codebook` learns from it."""
    codes: Int[Array, "B h w"]
    commitment_loss: Float[Array, ""]
    """Pulls latents to their codes: mean |z − stop(e)|²; 0 with finite scalar quantization, as the next one."""
    codebook_loss: Float[Array, ""]
    """Pulls codes to their latents: mean |stop(z) − e|². Leave it out where `update_codebook` moves the codebook."""


class VQGAN(nnx.Module):
    """Encoder, codebook and decoder of Esser et al. 2021 (arXiv:2012.09841).

        codes  = nearest_code(quant_conv(encoder(pixels)), codebook)
        pixels = decoder(post_quant_conv(codebook[codes]))

    Pixels are in [−1, 1]. With `config.levels` the codes are those of finite scalar quantization, without a codebook.
    """

    def __init__(self, config: VQGANConfig, rngs: nnx.Rngs, dtype: Dtype = None):
        """`dtype`: what encoder and decoder compute in; weights, statistics of norms and latents stay float32."""
        self.config = config
        self.encoder = Encoder(config, rngs, dtype)
        self.decoder = Decoder(config, rngs, dtype)
        # Latents are float32: bfloat16 has too few bits to tell codes apart.
        self.quant_conv = nnx.Conv(config.z_channels, config.code_dim, (1, 1), rngs=rngs, dtype=jnp.float32)
        self.post_quant_conv = nnx.Conv(config.code_dim, config.z_channels, (1, 1), rngs=rngs, dtype=dtype)
        if not config.levels:
            self.codebook = nnx.Param(
                jax.random.uniform(rngs.params(), (config.codes, config.code_dim), minval=-1, maxval=1) / config.codes
            )

    @classmethod
    def abstract(cls, config: VQGANConfig, dtype: Dtype = None) -> "VQGAN":
        """The model with shapes in place of arrays; nothing is allocated."""
        return nnx.eval_shape(lambda: cls(config, nnx.Rngs(0), dtype))

    def latents(self, pixels: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        """Before quantization.

        Raises:
            ValueError: the pictures have another size than the config's.
        """
        wanted = (self.config.resolution, self.config.resolution, self.config.channels)
        if pixels.ndim != 4 or pixels.shape[1:] != wanted:
            raise ValueError(f"pixels of shape {pixels.shape} do not fit this VQGAN; give {('B', *wanted)}")
        with jax.named_scope("vqgan/encode"):
            return self.quant_conv(self.encoder(pixels))

    def encode(self, pixels: Float[Array, "B H W C"]) -> Int[Array, "B h w"]:
        """The codes of pictures, rows from the top, each from the left."""
        return self.nearest(self.latents(pixels))

    def nearest(self, latents: Float[Array, "B h w D"]) -> Int[Array, "B h w"]:
        """The code of each latent."""
        levels = self.config.levels
        return scalar_codes(bound(latents, levels), levels) if levels else nearest_code(latents, self.codebook[...])

    def entries(self, codes: Int[Array, "B h w"]) -> Float[Array, "B h w D"]:
        """What the decoder sees of each code."""
        levels = self.config.levels
        return scalar_entries(codes, levels) if levels else self.codebook[...][codes]

    def decode(self, codes: Int[Array, "B h w"]) -> Float[Array, "B H W C"]:
        """Pictures of codes, clipped to [−1, 1].

        Raises:
            ValueError: the codes are not `[B, grid, grid]` of an integer type.
        """
        grid = self.config.grid
        if codes.ndim != 3 or codes.shape[1:] != (grid, grid) or not jnp.issubdtype(codes.dtype, jnp.integer):
            raise ValueError(f"codes of shape {codes.shape}, type {codes.dtype}: give integers [B, {grid}, {grid}]")
        return jnp.clip(self._decode_entries(self.entries(codes)), -1, 1)

    def _decode_entries(self, entries: Float[Array, "B h w D"]) -> Float[Array, "B H W C"]:
        with jax.named_scope("vqgan/decode"):
            return self.decoder(self.post_quant_conv(entries)).astype(jnp.float32)

    def __call__(self, pixels: Float[Array, "B H W C"]) -> VQGANOutput:
        """Reconstruct, with a gradient straight through the quantizer."""
        latents = self.latents(pixels)
        codes = self.nearest(jax.lax.stop_gradient(latents))
        entries = self.entries(codes)
        commitment_loss = codebook_loss = jnp.float32(0)
        if self.config.levels:
            scale = jnp.asarray(self.config.levels) // 2
            passed = straight_through(bound(latents, self.config.levels) / scale, entries)
        else:
            commitment_loss = jnp.mean((latents - jax.lax.stop_gradient(entries)) ** 2)
            codebook_loss = jnp.mean((jax.lax.stop_gradient(latents) - entries) ** 2)
            passed = straight_through(latents, entries)
        with jax.named_scope("vqgan/decode"):
            features = self.decoder.features(self.post_quant_conv(passed))
            reconstruction = self.decoder.conv_out(features).astype(jnp.float32)
        return VQGANOutput(reconstruction, features, latents, codes, commitment_loss, codebook_loss)
