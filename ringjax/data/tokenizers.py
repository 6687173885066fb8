"""Text tokenizers behind one small interface.

    bytes                 every UTF-8 byte is a token: ids 3 … 258, after <pad> 0, <s> 1, </s> 2
    sample                the byte-level BPE of the sample data, 512 ids
    …/tokenizer.json      any Hugging Face tokenizers file, or the folder that holds one
    …/tokenizer.model     SentencePiece (needs the extra `sentencepiece`)
    ….gguf                the tokenizer inside a model of llama.cpp's

None of them adds a begin or end token on its own: the example language says where they stand. Text never turns
into a special token: `</s>` in a document is five characters.

Begin, end and padding token of a tokenizer.json are those with the usual names, except where a tokenizer_config.json
beside it (or the GGUF file) says otherwise: the end token is its `eos_token`, and its `bos_token` begins examples only
where the model's own tokenizer puts it (`add_bos_token`): that of SmolLM2-Instruct, `<|im_start|>`, begins a turn.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ringjax.data import gguf_header
from ringjax.json_text import parse_json

VISION_START = "<vision>"
VISION_END = "</vision>"

CONTENT, SETTINGS = "tokenizer.json", "tokenizer_config.json"
FILES = (CONTENT, "tokenizer.model", SETTINGS, "special_tokens_map.json", "chat_template.jinja")
"""What a folder with a tokenizer may hold."""

_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]", "<bos>", "<|endoftext|>")
_EOS_NAMES = ("</s>", "<|end_of_text|>", "[EOS]", "<eos>", "<|im_end|>", "<|endoftext|>")
_PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>")


@runtime_checkable
class TextTokenizer(Protocol):
    """Text to ids and back."""

    bos_id: int
    eos_id: int
    pad_id: int
    vocab_size: int
    fingerprint: str
    specials: Mapping[str, int]
    """Special tokens by their names; text never turns into one."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without begin and end tokens."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of ids; begin, end and padding vanish."""
        ...

    def marker(self, name: str) -> list[int]:
        """The ids of `<vision>` or `</vision>`: its own id where the tokenizer has one, plain text otherwise."""
        ...


def load_tokenizer(spec: str) -> TextTokenizer:
    """The tokenizer that `spec` names.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or of no known kind, or has no begin and end tokens.
    """
    if spec == "bytes":
        return ByteTokenizer()
    if spec == "sample":
        from ringjax.data import samples

        return JsonTokenizer(samples.path("prose_tokenizer.json"))
    path = Path(spec)
    if path.is_dir():
        path = next((path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()), path)
    kinds = "give 'sample', 'bytes', a .json, .model or .gguf file"
    if not path.exists():
        raise FileNotFoundError(f"tokenizer {spec!r} does not exist; {kinds}")
    if path.suffix == ".json":
        return JsonTokenizer(path)
    if path.suffix == ".model":
        return SentencePieceTokenizer(path)
    if path.suffix == gguf_header.SUFFIX:
        files = gguf_files(path)
        return JsonTokenizer(path, files[CONTENT].encode(), json.loads(files[SETTINGS]))
    raise ValueError(f"tokenizer {spec!r} is of no known kind; {kinds}")


def tokenizer_files(spec: str) -> dict[str, bytes]:
    """The files of the tokenizer that `spec` names, by name: what a folder needs to be such a tokenizer itself.

    `bytes` needs none. Raises as `load_tokenizer` does for what is not there.
    """
    if spec == "bytes":
        return {}
    if spec == "sample":
        from ringjax.data import samples

        return {CONTENT: samples.path("prose_tokenizer.json").read_bytes()}
    path = Path(spec)
    if path.suffix == gguf_header.SUFFIX:
        return {name: text.encode() for name, text in gguf_files(path).items()}
    if path.is_dir():
        return {name: (path / name).read_bytes() for name in FILES if (path / name).is_file()}
    name = "tokenizer.model" if path.suffix == ".model" else CONTENT
    beside = [path.parent / more for more in FILES[2:]]
    return {name: path.read_bytes()} | {file.name: file.read_bytes() for file in beside if file.is_file()}


def gguf_files(path: Path) -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json of the tokenizer in a GGUF file, as texts."""
    from ringjax.data.gguf_tokenizer import tokenizer_json, tokenizer_settings

    header = gguf_header.GgufHeader.read(path)
    settings = json.dumps(tokenizer_settings(header), indent=2, ensure_ascii=False) + "\n"
    return {CONTENT: tokenizer_json(header), SETTINGS: settings}


@contextlib.contextmanager
def library_faults(path: str | Path, what: str):
    """What a tokenizers library raises, as a ValueError that names the file and says `what` is wrong.

    They raise bare Exceptions, and panics of Rust, which are none. What Python itself raises goes through.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{path} {what}: {str(error)[:300]}") from None


class ByteTokenizer:
    """UTF-8 bytes, numbered as LLaMA's byte tokens are."""

    pad_id, bos_id, eos_id = 0, 1, 2
    vocab_size = 259
    fingerprint = "bytes"
    specials: Mapping[str, int] = {"<pad>": 0, "<s>": 1, "</s>": 2}

    def encode(self, text: str) -> list[int]:
        return [byte + 3 for byte in text.encode("utf-8")]

    def decode(self, ids: list[int]) -> str:
        return bytes(i - 3 for i in ids if 3 <= i < self.vocab_size).decode("utf-8", errors="replace")

    def marker(self, name: str) -> list[int]:
        return self.encode(name)


class JsonTokenizer:
    """A `tokenizer.json` of the tokenizers library; `content` and `settings` in place of the files at `path`."""

    def __init__(self, path: str | Path, content: bytes | None = None, settings: Mapping[str, Any] | None = None):
        import tokenizers

        path = Path(path)
        if content is None:
            content, settings = path.read_bytes(), _settings(path.parent / SETTINGS)
        self._path = path
        with library_faults(path, "is not a whole tokenizer.json"):
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        # Otherwise "</s>" typed in a document would end it.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        said = _named(settings or {})
        begins = said.get("bos") if (settings or {}).get("add_bos_token") else None
        self.bos_id = self._special(path, (begins, *_BOS_NAMES, said.get("bos")), "begin")
        self.eos_id = self._special(path, (said.get("eos"), *_EOS_NAMES), "end")
        self.pad_id = self._first_known((said.get("pad"), *_PAD_NAMES), otherwise=self.eos_id)
        # Examples end with another token where the settings say so.
        ends = b"" if self.eos_id == self._first_known(_EOS_NAMES, None) else f"eos {self.eos_id}".encode()
        self.fingerprint = _digest(content + ends)
        added = self._tokenizer.get_added_tokens_decoder()
        self.specials = {token.content: i for i, token in added.items() if token.special}

    def encode(self, text: str) -> list[int]:
        with library_faults(self._path, "cannot encode this text"):
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        with library_faults(self._path, "cannot decode these ids"):
            return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def marker(self, name: str) -> list[int]:
        own = self._tokenizer.token_to_id(name)
        return self.encode(name) if own is None else [own]

    def _first_known(self, names: tuple[str | None, ...], otherwise: int | None) -> int | None:
        ids = (self._tokenizer.token_to_id(name) for name in names if name is not None)
        return next((i for i in ids if i is not None), otherwise)

    def _special(self, path: Path, names: tuple[str | None, ...], role: str) -> int:
        found = self._first_known(names, otherwise=None)
        if found is None:
            usual = ", ".join(name for name in names if name is not None)
            raise ValueError(f"{path} has no {role} token; add one of {usual[:300]} to its added tokens")
        return found


class SentencePieceTokenizer:
    """A SentencePiece `.model`, the kind that LLaMA and LWM use."""

    def __init__(self, path: str | Path):
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError:
            raise ImportError(f"{path} needs SentencePiece: pip install 'ringjax[sentencepiece]'") from None
        content, self._path = Path(path).read_bytes(), path
        with library_faults(path, "is not a whole SentencePiece model"):
            self._processor = SentencePieceProcessor(model_proto=content)
            self.vocab_size = self._processor.vocab_size()
            ids = (i for i in range(self.vocab_size) if self._processor.is_control(i))
            self.specials = {self._processor.id_to_piece(i): i for i in ids}
        self.bos_id, self.eos_id = self._processor.bos_id(), self._processor.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(f"{path} has no begin or end token; train it with bos_id and eos_id")
        # LLaMA's model has no padding token; a padded slot is masked, so any id will do.
        self.pad_id = max(self._processor.pad_id(), 0)
        self.fingerprint = _digest(content)

    def encode(self, text: str) -> list[int]:
        with library_faults(self._path, "cannot encode this text"):
            return self._processor.encode(text, add_bos=False, add_eos=False)

    def decode(self, ids: list[int]) -> str:
        with library_faults(self._path, "cannot decode these ids"):
            return self._processor.decode([int(i) for i in ids])

    def marker(self, name: str) -> list[int]:
        own = self._processor.piece_to_id(name)
        return self.encode(name) if own == self._processor.unk_id() else [own]


def _settings(file: Path) -> dict[str, Any]:
    """What a tokenizer_config.json says; nothing where there is none."""
    if not file.is_file():
        return {}
    try:
        found = parse_json(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not whole JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__}, not an object")
    return found


def _named(settings: Mapping[str, Any]) -> dict[str, str]:
    """The begin, end and padding token; a tokenizer_config.json has them as text or as an object."""
    found = {}
    for role in ("bos", "eos", "pad"):
        token = settings.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[role] = token
    return found


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
