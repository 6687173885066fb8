"""What docs/data.md shows is so."""

import re
from pathlib import Path

DOC = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def test_the_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)
    assert len(blocks) == 2
    names = {}
    exec(blocks[0], names)
    example = names["example"]
    assert example.tokens.tolist()[:7] == [1, 3, 11, 12, 13, 14, 101]
    assert example.modality.tolist()[:7] == [False, False, True, True, True, True, True]
    assert names["load_tokenizer"]("sample").decode(example.tokens[example.loss].tolist()) == "a cat"
    exec(blocks[1], names)
    assert names["batch"]["tokens"].shape == (8, 1024)
    names["loader"].close()


def test_every_setting_is_named():
    import dataclasses

    from ringjax.data.config import DataConfig, SourceConfig

    unnamed = [f.name for kind in (DataConfig, SourceConfig) for f in dataclasses.fields(kind) if f.name not in DOC]
    assert set(unnamed) <= {"shuffle", "prefetch", "window"}
