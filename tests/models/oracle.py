"""The transformer in plain float64 numpy, straight from the formulas: the specification of the model."""

import numpy as np

from ringjax.models import ModelConfig, Transformer


def parameters(model: Transformer) -> dict[str, np.ndarray]:
    """Every parameter in float64, by its path such as 'h/attention/wq/kernel'."""
    from flax import nnx

    flat = nnx.to_flat_state(nnx.state(model))
    return {"/".join(map(str, path)): np.asarray(leaf[...], np.float64) for path, leaf in flat}


def hidden(params: dict[str, np.ndarray], config: ModelConfig, batch: dict[str, np.ndarray]) -> np.ndarray:
    """`[B, T, D]` after the final norm, for a batch in ascending order."""
    text = params["wte/embedding"][np.where(batch["modality"], 0, batch["tokens"])]
    x = text
    if config.vision_vocab_size:
        vision = params["vte/embedding"][np.where(batch["modality"], batch["tokens"], 0)]
        x = np.where(batch["modality"][..., None], vision, text)
    mask = _mask(batch, config.window)
    for layer in range(config.layers):
        block = {name[2:]: value[layer] for name, value in params.items() if name.startswith("h/")}
        x = x + _attention(block, config, _norm(x, block["attention_norm/kernel"], config), batch["positions"], mask)
        y = _norm(x, block["ffn_norm/kernel"], config)
        a, b = y @ block["feed_forward/w1/kernel"], y @ block["feed_forward/w3/kernel"]
        x = x + (a / (1 + np.exp(-a)) * b) @ block["feed_forward/w2/kernel"]
    return _norm(x, params["ln_f/kernel"], config)


def rotate(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """RoPE as multiplication of complex numbers: pair (2i, 2i+1) is one."""
    frequency = theta ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])
    turn = np.exp(1j * positions[..., None, None] * frequency)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def nll(params: dict[str, np.ndarray], config: ModelConfig, states: np.ndarray, batch) -> np.ndarray:
    """`[B, T]`: the negative log-likelihood of each target under the head of its modality."""
    losses = []
    for table, head, targets in (
        ("wte", "lm_head", np.where(batch["target_modality"], 0, batch["targets"])),
        ("vte", "vision_head", np.where(batch["target_modality"], batch["targets"], 0)),
    ):
        if f"{table}/embedding" not in params:
            continue
        kernel = params[f"{table}/embedding"].T if config.tie_embeddings else params[f"{head}/kernel"]
        logits = states @ kernel
        lse = np.log(np.sum(np.exp(logits - logits.max(-1, keepdims=True)), -1)) + logits.max(-1)
        losses.append(lse - np.take_along_axis(logits, targets[..., None], -1)[..., 0])
    return np.where(batch["target_modality"], losses[-1], losses[0])


def loss(params: dict[str, np.ndarray], config: ModelConfig, batch: dict[str, np.ndarray]) -> float:
    """`Σ w·nll / Σ w`."""
    weights = batch["loss_weights"].astype(np.float64)
    return float(np.sum(weights * nll(params, config, hidden(params, config, batch), batch)) / np.sum(weights))


def _norm(x, kernel, config: ModelConfig):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm_eps) * kernel


def _mask(batch, window: int | None) -> np.ndarray:
    g = np.arange(batch["tokens"].shape[1])
    mask = (g >= (g - batch["behind"])[..., None]) & (g <= (g + batch["ahead"])[..., None])
    return mask if window is None else mask & (np.abs(g[:, None] - g) < window)


def _attention(block, config: ModelConfig, x, positions, mask):
    def project(name, heads):
        y = x @ block[f"attention/{name}/kernel"] + block.get(f"attention/{name}/bias", 0.0)
        return y.reshape(*x.shape[:2], heads, config.head_size)

    q = rotate(project("wq", config.heads), positions, config.rope_theta)
    k = rotate(project("wk", config.key_heads), positions, config.rope_theta)
    v = project("wv", config.key_heads)
    k, v = (np.repeat(y, config.heads // config.key_heads, axis=2) for y in (k, v))
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(config.head_size)
    if config.softcap is not None:
        scores = config.softcap * np.tanh(scores / config.softcap)
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * mask[:, None]
    total = weights.sum(-1, keepdims=True)
    out = np.einsum("bnts,bsnh->btnh", weights / np.where(total > 0, total, 1), v)
    return out.reshape(*x.shape[:2], -1) @ block["attention/wo/kernel"]
