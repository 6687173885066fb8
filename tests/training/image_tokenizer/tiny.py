"""A tokenizer of 16 × 16 pictures."""

from ringjax.training.load import parse_run

CONFIG = """
vqgan:
  {resolution: 16, hidden: 4, multipliers: [1, 2], res_blocks: 1, z_channels: 4, codes: 16, code_dim: 4, norm_groups: 2}
data: {sources: [{path: pictures/captions.jsonl}], heldout_share: 0.3, shift: 1, scale: 0.1, prefetch: 0}
training:
  {steps: 8, batch_size: 8, dtype: float32, average_decay: 0.8, usage_steps: 3, eval_every: 4, eval_pictures: 20}
losses: {adversarial: 0.5, adversarial_start: 4, discriminator_width: 4, discriminator_layers: 1}
optimizer: {learning_rate: 3.0e-3, warmup_steps: 2}
mesh: {shape: "2,4,1,1", simulated_devices: 8}
checkpoint: {every: 3}
logging: {progress: none, plot: false}
"""
FSQ = {"codebook.method": "fsq", "vqgan.levels": "[4, 4]", "vqgan.code_dim": "2"}


def tiny(**overrides):
    """The run with `section__key=value` laid over it."""
    return parse_run(CONFIG, overrides=[(key.replace("__", "."), str(value)) for key, value in overrides.items()])


def dotted(values: dict) -> dict:
    return {key.replace(".", "__"): value for key, value in values.items()}
