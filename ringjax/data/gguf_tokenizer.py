"""The tokenizer inside a GGUF file, as the tokenizer.json and the settings that Hugging Face's folders have.

    tokenizer.ggml.model   gpt2 (byte-level BPE) is read
    tokenizer.ggml.pre     how text is cut before the merges: a row of `_CUTS`

SentencePiece's ("llama") is not: it joins the leftmost of equal pairs, whichever pieces they are made of, and the
tokenizers library orders the merges of one piece by its parts, so runs such as "=====" may be cut otherwise.
"""

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ringjax.data.tokenizers import library_faults


class Gguf(Protocol):
    """A file whose header was read."""

    path: Path
    metadata: dict[str, Any]


_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_BYTES = {"add_prefix_space": False, "trim_offsets": True}


def _split(digits: str) -> list[dict[str, Any]]:
    """The regular expression of Llama 3 and Qwen2, which differ in how many digits stay together."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", **_BYTES, "use_regex": False},
    ]


_GPT2 = {"type": "ByteLevel", **_BYTES, "use_regex": True}
# As the tokenizer.json of each family has them: normalizer, pre-tokenizers, BPE's options, whether <bos> comes first.
_CUTS: dict[str, tuple] = {
    "gpt-2": (None, [_GPT2], {}, False),
    "smollm": (None, [{"type": "Digits", "individual_digits": True}, _GPT2], {}, False),
    "llama-bpe": (None, _split(r"\p{N}{1,3}"), {"ignore_merges": True}, True),
    "qwen2": ({"type": "NFC"}, _split(r"\p{N}"), {}, False),
}


def tokenizer_json(source: Gguf) -> str:
    """The text of a tokenizer.json that gives the ids of the file's tokenizer.

    As in the published ones, a byte that the vocabulary lacks is dropped (SmolLM2 has no 0x04, 0xF1 and 0xF2).

    Raises ValueError for a damaged vocabulary, NotImplementedError for a kind of tokenizer that is not read exactly.
    """
    import tokenizers

    normalizer, cuts, options, _ = _CUTS[_pre_tokenizer(source)]
    tokens, kinds = _vocabulary(source)
    added = [_added(i, tokens[i], kinds[i]) for i in range(len(tokens)) if kinds[i] in (_CONTROL, _USER_DEFINED)]
    made = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts},
        "post_processor": _begin(source, tokens),
        "decoder": {"type": "ByteLevel", **_BYTES, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": _merges(source),
            **options,
        },
    }
    text = json.dumps(made, ensure_ascii=False)
    with library_faults(source.path, "has tokens and merges that do not fit each other"):
        tokenizers.Tokenizer.from_str(text)
    return text


def tokenizer_settings(source: Gguf) -> dict[str, Any]:
    """bos_token, eos_token, pad_token, add_bos_token and chat_template, as a tokenizer_config.json has them.

    A token or template that the file does not have is None. Raises as `tokenizer_json` does.
    """
    first = _CUTS[_pre_tokenizer(source)][-1]
    tokens, _ = _vocabulary(source)
    return {
        "bos_token": _named_token(source, tokens, "bos"),
        "eos_token": _named_token(source, tokens, "eos"),
        "pad_token": _named_token(source, tokens, "padding"),
        "add_bos_token": _typed(source, "tokenizer.ggml.add_bos_token", bool, first),
        "chat_template": _typed(source, "tokenizer.chat_template", str, None),
    }


def _pre_tokenizer(source: Gguf) -> str:
    model, cut = (source.metadata.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    way_out = "give the tokenizer.json of the model's Hugging Face folder"
    if not isinstance(model, str) or model != "gpt2":
        why = ": SentencePiece's order of merges cannot be had exactly" if model == "llama" else ""
        raise NotImplementedError(
            f"{source.path}: tokenizer.ggml.model {model!r} is not 'gpt2' (byte-level BPE){why}; {way_out}"
        )
    if not isinstance(cut, str) or cut not in _CUTS:
        raise NotImplementedError(
            f"{source.path}: tokenizer.ggml.pre {cut!r} is not one of {', '.join(_CUTS)}; {way_out}"
        )
    return cut


def _vocabulary(source: Gguf) -> tuple[list[str], list[int]]:
    """The tokens and their types, without the unused ones that pad the end."""
    tokens = _typed(source, "tokenizer.ggml.tokens", list)
    kinds = _typed(source, "tokenizer.ggml.token_type", np.ndarray, np.full(len(tokens), _NORMAL)).tolist()
    if len(tokens) != len(kinds):
        raise ValueError(f"{source.path} has {len(tokens)} tokens and {len(kinds)} types of tokens")
    if len(set(tokens)) != len(tokens):
        raise ValueError(f"{source.path}: {len(tokens) - len(set(tokens))} of its tokens are there twice")
    while kinds and kinds[-1] == _UNUSED:
        kinds.pop()
    return tokens[: len(kinds)], kinds


def _added(token_id: int, token: str, kind: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": token, **flags, "special": kind == _CONTROL}


def _merges(source: Gguf) -> list[list[str]]:
    merges = [merge.split(" ") for merge in _typed(source, "tokenizer.ggml.merges", list)]
    odd = next((" ".join(merge) for merge in merges if len(merge) != 2), None)
    if odd is not None:
        raise ValueError(f"{source.path}: merge {odd!r} is not two tokens with a space between them")
    return merges


def _begin(source: Gguf, tokens: list[str]) -> dict[str, Any]:
    """What comes before a text when special tokens are asked for."""
    settings = tokenizer_settings(source)
    bos = settings["bos_token"]
    if not settings["add_bos_token"] or bos is None:
        return {"type": "ByteLevel", **_BYTES, "use_regex": True}
    single, more = ({"SpecialToken": {"id": bos, "type_id": i}} for i in (0, 1))
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [single, first],
        "pair": [single, first, more, second],
        "special_tokens": {bos: {"id": bos, "ids": [tokens.index(bos)], "tokens": [bos]}},
    }


def _named_token(source: Gguf, tokens: list[str], name: str) -> str | None:
    key = f"tokenizer.ggml.{name}_token_id"
    token_id = _typed(source, key, int, None)
    if token_id is None:
        return None
    if not 0 <= token_id < len(tokens):
        raise ValueError(f"{source.path}: {key} {token_id} is not one of {len(tokens)} tokens")
    return tokens[token_id]


_NEEDED = object()


def _typed(source: Gguf, key: str, kind: type, otherwise: Any = _NEEDED) -> Any:
    """The value of a key, of type `kind`."""
    found = source.metadata.get(key, otherwise)
    if found is _NEEDED:
        raise ValueError(f"{source.path} has no {key}")
    if found is not otherwise and type(found) is not kind:
        raise ValueError(f"{source.path}: {key} is a {type(found).__name__}, not a {kind.__name__}")
    return found
