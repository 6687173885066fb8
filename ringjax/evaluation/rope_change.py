"""RoPE stretched to a longer context without training, by `factor` = new context / old context.

ntk      theta' = theta · factor^(H / (H − 2)): the slowest pair turns as far as before, the fastest is untouched
yarn     blended by turns, with sharper attention (Peng et al. 2023, arXiv:2309.00071)
linear   every position divided by factor (Chen et al. 2023, arXiv:2306.15595)
"""

from ringjax.models.config import ModelConfig, RopeScaling

KINDS = ("ntk", "yarn", "linear")


def rope_changes(config: ModelConfig, context: int, kind: str, factor: float) -> dict[str, object]:
    """Fields of the config that differ; none where the factor is 1.

    Raises NotImplementedError for a model that is stretched already.
    """
    if factor == 1:
        return {}
    if config.rope_scaling is not None:
        raise NotImplementedError(
            f"{kind} on a model whose RoPE is scaled already ({config.rope_scaling.kind}, factor"
            f" {config.rope_scaling.factor}): use --rope_theta, or the model as it is"
        )
    if kind == "ntk":
        size = config.head_size
        return {"rope_theta": config.rope_theta * factor ** (size / (size - 2))}
    original = None if kind == "linear" else context
    return {"rope_scaling": RopeScaling(kind, factor, original)}
