"""Seeds: tokenizers, chat templates and weights of other projects and of ours."""

import io
import json
import pickle
from pathlib import Path

import numpy as np

from tests.fuzz.seeds import Case, written

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
        written(lambda folder, a=architecture, k=kind, t=tied: made.write(folder, made.weights(a == "qwen2", t), k, a))
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

    return [written(lambda folder: save_file(tensors, folder / "model.safetensors", {"a": "b"})), written(sharded)]


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

    return [written(lambda folder: save_vqgan(_vqgan(), folder / "vqgan.safetensors"))]


def vqmodel() -> list[Case]:
    from tests.interop import vqgan_small

    return [written(vqgan_small.write)]


def pickled() -> list[Case]:
    from ringjax.models.vqgan.files import named_tensors
    from tests.fuzz.payloads import deep_pickle, memo_bomb

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
        written(lambda folder, fields=families.FAMILIES[name]: families.write(folder, fields))
        for name in ("llama3", "mistral", "qwen2", "yarn")
    ]
    with_tokenizer = written(published.write) | {"generation_config.json": ends}
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
        written(lambda folder, fields=fields: llava_small.write(folder, fields)) | more
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

    case = written(write)
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
        written(write)
        | {f"tokenizer/{name}": x for name, x in small.items()}
        | {"vision_tokenizer.safetensors": vqgan()[0]["vqgan.safetensors"]}
    ]
