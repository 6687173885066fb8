"""Seeds: what runs and evaluations leave, and what evaluations are given."""

import gzip
from pathlib import Path

from tests.fuzz.seeds import CONFIG, Case, lines_of, written

# --- runs -----------------------------------------------------------------------------------------------------------


def checkpoint() -> list[Case]:
    """A run's folder: config.yaml and one checkpoint."""
    import jax.numpy as jnp
    from flax import nnx

    from ringjax.models.transformer import Transformer
    from ringjax.training.checkpoint import CheckpointStore, describe_arrays
    from ringjax.training.config import CheckpointConfig
    from ringjax.training.load import parse_config, to_plain

    run = parse_config(CONFIG)
    _, state = nnx.split(Transformer.abstract(run.model))
    import jax

    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), state)
    info = {
        "step": 2,
        "stage": 0,
        "stage_step": 2,
        "config": to_plain(run),
        "parameters": describe_arrays(params),
        "notes": {"codes_of": "0" * 64},
        "data": {"epoch": 0},
    }

    def write(folder: Path) -> None:
        store = CheckpointStore(folder, CheckpointConfig(asynchronous=False), print)
        store.save(2, {"params": params}, info)
        (folder / "config.yaml").write_text(CONFIG)

    return [written(write)]


def manifest() -> list[Case]:
    from tests.fuzz.seals import sealed

    case = checkpoint()[0]
    start = "checkpoints/step_00000002/"
    files = {name.removeprefix(start): content for name, content in case.items() if name.startswith(start)}
    kept = {name: files[name] for name in sorted(files, key=lambda name: len(files[name]))[:2]}
    return [sealed({"ringjax.json": files["ringjax.json"], **kept}, "", listed=True)]


def results() -> list[Case]:
    base = {
        "method": "exact",
        "part": "needle",
        "length": 1024,
        "depth": 0.5,
        "index": 0,
        "score": 1.0,
        "seconds": 0.5,
        "tokens": 1000,
        "first_seconds": 0.1,
        "cache_bytes": 1 << 20,
        "peak_bytes": None,
        "answer": "a",
    }
    lost = {**base, "part": "perplexity", "losses": [2.0, 3.0], "counts": [10, 10], "characters": 80, "bytes": 80}
    head = {"format": 1, "asked": {"a": [1, 2]}, "about": {"model": "m"}}
    rows = [{**base, "index": i, "length": length} for i in range(2) for length in (1024, 2048)]
    return [
        {"results.jsonl": lines_of(head, *rows)},
        {"results.jsonl": lines_of(head, lost)},
        {"results.jsonl": lines_of(head, *rows)[:-9]},
    ]


def metrics() -> list[Case]:
    rows = [
        {"step": i, "stage": "train", "loss": 3.2 / i, "text_loss": 3.1, "vision_loss": None, "grad_norm": 0.8}
        for i in range(1, 30)
    ]
    rows += [{"step": 10, "eval": {"sample:digits": {"loss": 3.3}}}]
    return [{"metrics.jsonl": lines_of(*rows)}]


def texts() -> list[Case]:
    lines = lines_of({"text": "a document"}, {"text": "another"})
    passages = lines_of(
        {"context": "A b. C d.", "question": "What?", "answers": ["b", "d"]},
        {"context": "a", "question": "b", "answers": "c"},
    )
    bomb = gzip.compress(b"a" * (1 << 28))
    return [
        {"texts.jsonl": lines},
        {"texts.jsonl": passages},
        {"texts.txt": "plain é text".encode()},
        {"texts.jsonl.gz": gzip.compress(lines)},
        {"texts.txt.gz": bomb * 2},
        *({"texts.jsonl": x} for x in (lines, passages) * 8),
    ]
