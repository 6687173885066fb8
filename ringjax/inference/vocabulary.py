"""A published tokenizer with its special tokens: text that people type never turns into one, a template's does."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers

from ringjax.data.tokenizers import SentencePieceTokenizer, library_faults
from ringjax.interop.published import Published

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Vocabulary:
    """Text to ids and back. `bos_id` begins a text where the model's own tokenizer does so (None: nothing does)."""

    def __init__(self, encode, encode_special, decode, ids: Mapping[str, int], bos_id: int | None):
        self._encode, self._encode_special, self._decode = encode, encode_special, decode
        self.specials = dict(ids)
        """Special tokens and their ids."""
        self.bos_id = bos_id

    @classmethod
    def of(cls, published: Published) -> "Vocabulary":
        """Raises FileNotFoundError for a model without a tokenizer, ValueError for a damaged one."""
        if isinstance(published.tokenizer, Mapping):
            return cls._json(published.tokenizer["tokenizer.json"], published, str(published.path))
        file = published.tokenizer / "tokenizer.json"
        if file.is_file():
            return cls._json(_text_of(file), published, str(file))
        file = published.tokenizer / "tokenizer.model"
        if file.is_file():
            return cls._sentencepiece(file)
        raise FileNotFoundError(f"{published.path} has neither tokenizer.json nor tokenizer.model; put its own there")

    @classmethod
    def _json(cls, text: str, published: Published, where: str) -> "Vocabulary":
        plain, special = _tokenizer(text, where), _tokenizer(text, where)
        encodes, decodes = (
            library_faults(where, f"cannot {what}") for what in ("encode this text", "decode these ids")
        )
        plain.encode_special_tokens = True  # "<|im_end|>" typed by a person is ten characters
        ids = {token.content: i for i, token in special.get_added_tokens_decoder().items() if token.special}
        bos = published.description.bos_id
        # What the tokenizer itself puts before a text: its post-processor knows, or the settings say so.
        with library_faults(where, "cannot encode an empty text"):
            first = special.encode("", add_special_tokens=True).ids
        begins = bos is not None and (first[:1] == [bos] or bool(published.settings.get("add_bos_token")))
        begins = begins if published.begins is None else published.begins
        return cls(
            encodes(lambda text: plain.encode(text, add_special_tokens=False).ids),
            encodes(lambda text: special.encode(text, add_special_tokens=False).ids),
            decodes(lambda ids: plain.decode(ids, skip_special_tokens=True)),
            ids, bos if begins else None,
        )  # fmt: skip

    @classmethod
    def _sentencepiece(cls, file: Path) -> "Vocabulary":
        own = SentencePieceTokenizer(file)
        ids = {"<s>": own.bos_id, "</s>": own.eos_id}

        def encode_special(text: str) -> list[int]:
            parts = re.split(f"({'|'.join(map(re.escape, ids))})", text)
            return [i for part in parts if part for i in ([ids[part]] if part in ids else own.encode(part))]

        return cls(own.encode, encode_special, own.decode, ids, own.bos_id)

    def encode(self, text: str) -> list[int]:
        """A text as people write it: nothing in it becomes a special token."""
        return self._encode(text)

    def prompt(self, text: str) -> list[int]:
        """A text from its beginning."""
        return ([] if self.bos_id is None else [self.bos_id]) + self.encode(text)

    def encode_template(self, text: str, contents: Sequence[str]) -> list[int]:
        """A rendered chat template, whose special tokens are special, unless one of the `contents` brought them.

        Raises ValueError where a message holds the text of a special token: it would end its own turn.
        """
        for content in contents:
            found = next((name for name in self.specials if name in content), None)
            if found is not None:
                raise ValueError(f"the message holds {found!r}, which would end or begin a turn; write it differently")
        return self._encode_special(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        return self._decode([int(i) for i in ids])

    def whole_text(self, ids: Sequence[int]) -> str:
        """The text of ids so far, without a character whose last bytes are still to come."""
        return self.decode(ids).rstrip(_UNFINISHED)


def _text_of(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text (byte {error.start})") from None


def _tokenizer(text: str, where: str) -> tokenizers.Tokenizer:
    with library_faults(where, "is not a whole tokenizer.json"):
        made = tokenizers.Tokenizer.from_str(text)
    made.no_truncation()
    made.no_padding()
    return made
