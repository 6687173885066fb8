"""Small valid files of every kind that is read here, as folders in memory: what the fuzzer changes.

A case is the files of a folder by name; `first` names those that matter least last.
"""

import dataclasses
import gzip
import io
import json
import pickle
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

Case = dict[str, bytes]


def files_of(folder: Path) -> Case:
    """Every file below a folder by its path there."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _written(write: Callable[[Path], object]) -> Case:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return files_of(Path(folder))


def _lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


# --- data -----------------------------------------------------------------------------------------------------------


def jsonl() -> list[Case]:
    codes = list(range(8))
    return [
        {"lines.jsonl": _lines({"text": "hello world", "fields": "text"}, {"fields": "[a],b+a", "a": "x", "b": "y z"})},
        {
            "lines.jsonl": _lines(
                {
                    "fields": ["[instruction],vision", "[vision],caption"],
                    "vision": codes,
                    "instruction": "Draw",
                    "caption": "a",
                },
                {"fields": '"Draw \\"it\\""+a,<|eos|>', "a": "a cat é 漢"},
                {"vision": codes, "caption": "b", "fields": "vision"},
            )
        },
        {"lines.jsonl": _lines({"fields": "a,[b,c],d", **{name: name * 9 for name in "abcd"}}) + b"\n\n{}\n"},
        {
            "lines.jsonl": b'{"fields": "a\\u00007\\u0000b", "a": "x"}\n{"fields": "a", "a": "\\ud800"}\n'
            + b'{"a": "'
            + b"x" * 5000
            + b'"}'
        },
        {
            "lines.jsonl": _lines(
                {"fields": '"' + '\\"' * 60_000, "a": "x"}, {"fields": "vision", "vision": "@"}
            ).replace(b'"@"', b"[" * 60 + b"1" + b"]" * 60)
        },
    ]


def _example(length: int):
    from ringjax.data.example import Example

    rng = np.random.default_rng(length)
    return Example(rng.integers(0, 250, length, np.int32), rng.random(length) < 0.2, rng.random(length) < 0.7)


def record() -> list[Case]:
    from ringjax.data.records import encode_record

    return [{"a.record": encode_record(_example(length))} for length in (1, 7, 300)]


def records() -> list[Case]:
    import random

    from ringjax.data.records import FORMAT, META, encode_record, write_shard
    from tests.fuzz.targets import _finish_records

    def write(folder: Path, shards: tuple[tuple[int, ...], ...]) -> None:
        written = [
            write_shard(folder / f"{n:05d}.array_record", [encode_record(_example(size)) for size in sizes])
            for n, sizes in enumerate(shards)
        ]
        meta = {
            "format": FORMAT,
            "tokenizer": "bytes",
            "tokenizer_fingerprint": "bytes",
            "has_vision": True,
            "codes_per_frame": 256,
            "vision_codes": 8192,
            "shards": [dataclasses.asdict(shard) for shard in written],
        }
        (folder / META).write_text(json.dumps(meta))

    def bomb(folder: Path) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        write(folder, ((5, 9, 40),))
        writer = ArrayRecordWriter(str(folder / "00000.array_record"), "group_size:1")
        for size in (1 << 29, 3, 3):
            writer.write(b"\0" * size)
        writer.close()

    kinds = (((5, 9, 40),), ((3, 300), (4000,)))
    return [_written(lambda folder, shards=shards: write(folder, shards)) for shards in kinds] + [
        _finish_records(random.Random(1), _written(bomb))
    ]


def _drawn(mode: str, size: tuple[int, int], seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), np.uint8)
    return (
        Image.fromarray(noise, "RGBA").convert(mode)
        if mode != "I;16"
        else Image.fromarray(noise[..., 0].astype(np.uint16) * 200)
    )


def _encoded(mode: str, kind: str, frames: int = 1, **options) -> bytes:
    file = io.BytesIO()
    pictures = [_drawn(mode, (13, 11), i) for i in range(frames)]
    more = {"save_all": True, "append_images": pictures[1:], "duration": 40} if frames > 1 else {}
    pictures[0].save(file, kind, **more, **options)
    return file.getvalue()


def _exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x8769] = 6, "a camera", {0x9003: "2001:01:01 00:00:00"}
    return exif.tobytes()


def pictures() -> list[Case]:
    found = {
        "png": [_encoded(mode, "PNG") for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")]
        + [_encoded("RGB", "PNG", frames=3), _encoded("RGB", "PNG", exif=_exif())],
        "jpg": [_encoded(mode, "JPEG") for mode in ("RGB", "L", "CMYK")]
        + [_encoded("RGB", "JPEG", exif=_exif(), progressive=True)],
        "gif": [_encoded("P", "GIF"), _encoded("RGB", "GIF", frames=4), _encoded("P", "GIF", transparency=3)],
        "webp": [
            _encoded("RGB", "WEBP"),
            _encoded("RGBA", "WEBP", lossless=True),
            _encoded("RGB", "WEBP", frames=3),
            _encoded("RGB", "WEBP", exif=_exif()),
        ],
    }
    return [{f"picture.{kind}": content} for kind, contents in found.items() for content in contents] + [
        {"picture.png": many_frames_png(2**31 - 1)},
        {"picture.gif": many_frames_gif(3000)},
        {"picture.png": blank_png(20_000, 20_000)},
        {"picture.png": blank_png(4000, 4000)},
        {"picture.gif": many_frames_gif(200, 8000)},
    ]


def blank_png(width: int, height: int) -> bytes:
    """A picture that is small in the file and large in memory."""
    import zlib

    from tests.fuzz.formats import png

    packer = zlib.compressobj(9)
    row = b"\0" * (1 + width // 8)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    return png([(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)), (b"IDAT", data), (b"IEND", b"")])


def many_frames_png(claimed: int) -> bytes:
    """An animated PNG that claims so many frames and has one."""
    from tests.fuzz.formats import png, png_chunks

    chunks = png_chunks(_encoded("RGB", "PNG", frames=2))
    return png([(kind, struct.pack(">II", claimed, 0) if kind == b"acTL" else data) for kind, data in chunks])


def many_frames_gif(frames: int, size: int = 16) -> bytes:
    """A GIF whose frames are one pixel each, on a canvas of `size` × `size`."""
    head = b"GIF89a" + struct.pack("<HH", size, size) + b"\x80\0\0" + b"\0\0\0\xff\xff\xff"
    frame = b"\x2c" + struct.pack("<HHHH", 0, 0, 1, 1) + b"\0\x02\x02D\x01\0"
    return head + frame * frames + b";"


def picture_set() -> list[Case]:
    rows = [{"file": "a.png", "caption": "a"}, {"file": "b.gif", "caption": "b"}, {"file": "sub/c.webp", "caption": ""}]
    files = {
        "a.png": _encoded("RGB", "PNG"),
        "b.gif": _encoded("RGB", "GIF", frames=3),
        "sub/c.webp": _encoded("RGB", "WEBP"),
    }
    return [{"captions.jsonl": _lines(*rows), **files}]


CONFIG = """\
model:
  width: 16
  ffn_width: 16
  layers: 1
  heads: 2
  vocab_size: 512
  vision_codes: 64
  vision_vocab_size: 66
  rope_scaling: {kind: linear, factor: 2.0}
  dtype: float32
data:
  sources:
    - {path: "sample:digits", weight: 1}
    - path: sample:prose
      weight: 1.5
      fields: "[a],b"
  codes_per_frame: 16
  vision_codes: 64
  prefetch: 0
training: {steps: 2, seq_len: 64, batch_size: 2}
optimizer: {learning_rate: 1e-3, schedule: cosine}
mesh: {shape: "1,1,1,8", layout: striped}
logging: {progress: none}
"""
STAGES = """\
model: {size: 7b, rope_theta: 1.0e6}
training: {seq_len: 32768, steps: 1200, batch_size: 128}
mesh: {shape: "1,-1,1,4"}
stages:
  - {name: 32k}
  - name: 128k
    model: {rope_theta: 1.0e7}
    training: {seq_len: 131072, steps: 3000, batch_size: 32}
"""


def config() -> list[Case]:
    root = Path(__file__).parents[2] / "configs"
    own = [{"config.yaml": path.read_bytes()} for path in sorted(root.glob("*.yaml"))]
    return [{"config.yaml": CONFIG.encode()}, {"config.yaml": STAGES.encode()}, *own]


# --- tokenizers -----------------------------------------------------------------------------------------------------


def tokenizer() -> list[Case]:
    from ringjax.data import samples
    from tests.interop.tokenizers_small import SPECIALS, TEMPLATE, tokenizer_json

    settings = {"bos_token": SPECIALS[1], "eos_token": {"content": SPECIALS[2]}, "chat_template": TEMPLATE}
    added = json.loads(tokenizer_json())
    added["normalizer"] = {
        "type": "Sequence",
        "normalizers": [{"type": "NFC"}, {"type": "Replace", "pattern": {"Regex": "[a-c]+"}, "content": "x"}],
    }
    added["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    added["padding"] = {
        "strategy": {"Fixed": 8},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    unigram = {
        **added,
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="},
        "model": {
            "type": "Unigram",
            "unk_id": 0,
            "vocab": [["<unk>", 0.0], ["a", -1.5], ["▁a", -2.0]],
            "byte_fallback": False,
        },
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    }
    words = {
        **added,
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {"[UNK]": 0, "a": 1, "##b": 2},
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    }
    levels = {
        **added,
        "model": {"type": "WordLevel", "unk_token": "a", "vocab": {"a": 0, "b": 1}},
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a|b)*c?"}, "behavior": "Isolated", "invert": False},
    }
    texts = (
        tokenizer_json(),
        samples.path("prose_tokenizer.json").read_text(),
        *map(json.dumps, (added, unigram, words, levels)),
    )
    return [{"tokenizer.json": text.encode(), "tokenizer_config.json": json.dumps(settings).encode()} for text in texts]


def sentencepiece() -> list[Case]:
    from sentencepiece import SentencePieceTrainer

    texts = [
        f"the {a} {b} of a thing, and another {b}" for a in ("red", "blue", "old") for b in ("cat", "house", "sea")
    ]
    found = []
    for kind in ("bpe", "unigram"):
        model = io.BytesIO()
        SentencePieceTrainer.train(
            sentence_iterator=iter(texts * 5),
            model_writer=model,
            vocab_size=280,
            model_type=kind,
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        found.append({"tokenizer.model": model.getvalue()})
    return found


def template() -> list[Case]:
    from ringjax.inference.chat_template import BUILT_IN
    from tests.interop.tokenizers_small import TEMPLATE

    more = (
        "{%- set ns = namespace(first=true) -%}{%- for message in messages -%}{%- if message['role'] == 'user' -%}"
        "{{- '[INST] ' + message['content'] | trim + ' [/INST]' -}}{%- elif ns.first -%}{%- set ns.first = false -%}"
        "{{ bos_token }}"
        "{%- else -%}{{ raise_exception('no') }}{%- endif -%}{%- endfor -%}",
        "{% macro turn(m) %}{{ m.role|upper ~ ': ' ~ m.content.strip() }}{% endmacro %}{% for m in messages[1:] %}"
        "{{ turn(m) }}{{ loop.index0 % 2 }}{% if not loop.last %}\n{% endif %}{% endfor %}{{ messages|tojson }}"
        "{{ messages[::-1][0].content.split('o')[-1] }}",
    )
    return [{"template.jinja": text.encode()} for text in (*BUILT_IN.values(), TEMPLATE, *more)]


# --- weights --------------------------------------------------------------------------------------------------------


def gguf() -> list[Case]:
    from tests.interop import test_gguf as made

    kinds = (("llama", "F32", False), ("llama", "Q8_0", True), ("qwen2", "Q4_1", False))
    return [
        _written(lambda folder, a=architecture, k=kind, t=tied: made.write(folder, made.weights(a == "qwen2", t), k, a))
        for architecture, kind, tied in kinds
    ]


def safetensors() -> list[Case]:
    from safetensors.numpy import save_file

    tensors = {"a": np.ones((3, 4), np.float32), "b.c": np.ones((2,), np.float16), "d": np.ones((), np.float32)}

    def sharded(folder: Path) -> None:
        save_file({"a": tensors["a"]}, folder / "model-00001-of-00002.safetensors")
        save_file({"d": tensors["d"]}, folder / "model-00002-of-00002.safetensors", {"format": "pt"})
        places = {"a": "model-00001-of-00002.safetensors", "d": "model-00002-of-00002.safetensors"}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))

    return [_written(lambda folder: save_file(tensors, folder / "model.safetensors", {"a": "b"})), _written(sharded)]


def vqgan_config():
    """Of the smallest image tokenizer."""
    from ringjax.models.vqgan import VQGANConfig

    return VQGANConfig(
        resolution=8, hidden=4, multipliers=(1, 1), res_blocks=1, z_channels=4, codes=8, code_dim=4, norm_groups=2
    )


def _vqgan():
    from flax import nnx

    from ringjax.models.vqgan import VQGAN

    return VQGAN(vqgan_config(), nnx.Rngs(0))


def vqgan() -> list[Case]:
    from ringjax.models.vqgan import save_vqgan

    return [_written(lambda folder: save_vqgan(_vqgan(), folder / "vqgan.safetensors"))]


def vqmodel() -> list[Case]:
    from tests.interop import vqgan_small

    return [_written(vqgan_small.write)]


def pickled() -> list[Case]:
    from ringjax.models.vqgan.files import named_tensors
    from tests.fuzz.formats import deep_pickle, memo_bomb

    tree: dict = {}
    for name, tensor in named_tensors(_vqgan()).items():
        *levels, last = name.split("/")
        at = tree
        for level in levels:
            at = at.setdefault(level, {})
        at[last] = np.asarray(tensor)
    small = {
        "a": {"b": np.arange(6, dtype=">f4").reshape(2, 3)},
        "c": np.asfortranarray(np.ones((2, 2), "<i8")),
        "d": np.float32(1),
    }
    small = {"a": small["a"], "c": small["c"]}
    return [
        *({"vqgan.pickle": pickle.dumps(tree, protocol)} for protocol in (2, 4)),
        *({"vqgan.pickle": pickle.dumps(small, protocol)} for protocol in range(6)),
        {"vqgan.pickle": memo_bomb(2, 64)},
        {"vqgan.pickle": memo_bomb(4000)},
        {"vqgan.pickle": deep_pickle(100_000)},
    ]


def lwm() -> list[Case]:
    from tests.interop import test_lwm as made

    return [{"stream.msgpack": made.packed(made.theirs(made.drawn(made.TEXT), scanned))} for scanned in (True, False)]


def hf_config() -> list[Case]:
    from tests.interop import families

    return [{"config.json": json.dumps(fields).encode()} for fields in families.FAMILIES.values()]


def hf() -> list[Case]:
    from tests.inference import published
    from tests.interop import families

    ends = json.dumps({"eos_token_id": [1, 2]}).encode()
    plain = [
        _written(lambda folder, fields=families.FAMILIES[name]: families.write(folder, fields))
        for name in ("llama3", "mistral", "qwen2", "yarn")
    ]
    with_tokenizer = _written(published.write) | {"generation_config.json": ends}
    return [with_tokenizer, *({**case, **{k: with_tokenizer[k] for k in _TOKENIZER}} for case in plain)]


_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def llava() -> list[Case]:
    from tests.interop import llava_small

    preprocessing = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 12},
        "do_center_crop": True,
        "crop_size": {"height": 12, "width": 12},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    more = {"preprocessor_config.json": json.dumps(preprocessing).encode()}
    return [
        _written(lambda folder, fields=fields: llava_small.write(folder, fields)) | more
        for fields in llava_small.FAMILIES.values()
    ]


def llava_config() -> list[Case]:
    return [{name: content for name, content in case.items() if name.endswith(".json")} for case in llava()]


def peft() -> list[Case]:
    from tests.inference import published
    from tests.interop import test_peft as made

    def write(folder: Path) -> None:
        base = published.write(folder / "base", tie_word_embeddings=False)
        adapters, _ = made.theirs(base)
        made.write(folder / "adapter", adapters)
        changes = {"context": 256, "model": {"rope_theta": 5e5, "rope_scaling": {"kind": "linear", "factor": 2.0}}}
        (folder / "adapter" / "ringjax_changes.json").write_text(json.dumps(changes))

    case = _written(write)
    return [{name.removeprefix("adapter/"): x for name, x in case.items() if name.startswith("adapter/")}]


def release() -> list[Case]:
    from flax import nnx
    from safetensors.numpy import save_file

    from ringjax.interop import release as module
    from ringjax.models.config import ModelConfig
    from ringjax.models.transformer import Transformer
    from ringjax.training.load import to_plain

    config = ModelConfig(width=8, ffn_width=8, layers=2, heads=2, vocab_size=259, vision_codes=8, vision_vocab_size=10)
    state = nnx.to_flat_state(nnx.state(Transformer.abstract(config)))
    tensors = {".".join(path): np.ones(leaf.get_value().shape, np.float32) for path, leaf in state}
    about = {
        "format": module.FORMAT,
        "model": to_plain(config),
        "context": 64,
        "codes_of": "0" * 64,
        "data": {
            "codes_per_frame": 16,
            "vision_codes": 8,
            "separator": " ",
            "add_bos": True,
            "max_frames": None,
            "bidirectional_frames": False,
        },
    }

    def write(folder: Path) -> None:
        save_file(tensors, folder / module.WEIGHTS)
        (folder / module.ABOUT).write_text(json.dumps(about))

    small = tokenizer()[0]
    return [
        _written(write)
        | {f"tokenizer/{name}": x for name, x in small.items()}
        | {"vision_tokenizer.safetensors": vqgan()[0]["vqgan.safetensors"]}
    ]


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

    return [_written(write)]


def manifest() -> list[Case]:
    from tests.fuzz.targets import sealed

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
        {"results.jsonl": _lines(head, *rows)},
        {"results.jsonl": _lines(head, lost)},
        {"results.jsonl": _lines(head, *rows)[:-9]},
    ]


def metrics() -> list[Case]:
    rows = [
        {"step": i, "stage": "train", "loss": 3.2 / i, "text_loss": 3.1, "vision_loss": None, "grad_norm": 0.8}
        for i in range(1, 30)
    ]
    rows += [{"step": 10, "eval": {"sample:digits": {"loss": 3.3}}}]
    return [{"metrics.jsonl": _lines(*rows)}]


def texts() -> list[Case]:
    lines = _lines({"text": "a document"}, {"text": "another"})
    passages = _lines(
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
