"""A tiny published model with a tokenizer and a chat template, in a folder."""

import json
from pathlib import Path

from tests.interop import families
from tests.interop.tokenizers_small import SPECIALS, TEMPLATE, tokenizer_json

VOCAB = 260


def write(folder: Path, *, template: str | None = TEMPLATE, **changes) -> Path:
    """A LLaMA of VOCAB tokens; `changes` to its config.json."""
    fields = {**families.FAMILIES["tied"], "vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, **changes}
    families.write(folder, fields)
    (folder / "tokenizer.json").write_text(tokenizer_json())
    settings = {"bos_token": SPECIALS[1], "eos_token": {"content": SPECIALS[2]}, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
