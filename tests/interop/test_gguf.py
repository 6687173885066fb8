"""GGUF files: slices, the metadata, the tokenizer; and that a damaged file gives ValueError and takes no memory."""

import json
import os
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from ringjax.data.gguf_tokenizer import tokenizer_json, tokenizer_settings
from ringjax.data.tokenizers import JsonTokenizer, load_tokenizer, tokenizer_files
from ringjax.interop.gguf import GgufSource, gguf_config, gguf_split_halves
from ringjax.interop.load import check_tensors
from ringjax.interop.names import gguf_recipes
from ringjax.models.config import RopeScaling

gguf = pytest.importorskip("gguf")

KIND = gguf.GGMLQuantizationType
WIDTH, FFN, LAYERS, HEADS, KV_HEADS = 64, 96, 2, 4, 2
KINDS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "Q8_0": np.float32, "Q4_1": np.float32}

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["1 2", "12 3", "h e", "l l", "he ll", "hell o", "Ġ w"]
TOKENS = SPECIAL + sorted(ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in MERGES]
FIELDS = {
    "block_count": LAYERS, "context_length": 256, "embedding_length": WIDTH, "feed_forward_length": FFN,
    "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 5e4, "rope.dimension_count": WIDTH // HEADS, "vocab_size": len(TOKENS),
}  # fmt: skip
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)),
    "tokenizer.ggml.merges": MERGES, "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 2, "tokenizer.chat_template": "{{ messages }}",
}  # fmt: skip
TEXT = "hello world 12345, it's a naïve café — 漢字 🙂 e\u0301\n\tdef f(x):  return x**2\r\n   <|im_start|>"


def weights(qkv_bias=False, tied=False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    kv = WIDTH // HEADS * KV_HEADS
    shapes = {"token_embd.weight": (len(TOKENS), WIDTH), "output_norm.weight": (WIDTH,)}
    if not tied:
        shapes["output.weight"] = len(TOKENS), WIDTH
    for i in range(LAYERS):
        rows = {"attn_q": WIDTH, "attn_k": kv, "attn_v": kv, "attn_output": WIDTH, "ffn_gate": FFN, "ffn_up": FFN}
        shapes |= {f"blk.{i}.{name}.weight": (size, WIDTH) for name, size in rows.items()}
        shapes |= {f"blk.{i}.{name}.weight": (WIDTH,) for name in ("attn_norm", "ffn_norm")}
        shapes[f"blk.{i}.ffn_down.weight"] = WIDTH, FFN
        if qkv_bias:
            shapes |= {f"blk.{i}.attn_{x}.bias": (size,) for x, size in (("q", WIDTH), ("k", kv), ("v", kv))}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write(folder, tensors, kind="F32", architecture="llama", general=None, **fields):
    """A file of the tiny model; a field or key that is None is left out."""
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    keys = {f"{architecture}.{name}": x for name, x in (FIELDS | fields).items()} | TOKENIZER | (general or {})
    for key, value in keys.items():
        if value is not None:
            add(writer, key, value)
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and kind != "F32":
            writer.add_tensor(name, gguf.quants.quantize(tensor, KIND[kind]), raw_dtype=KIND[kind])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer, key, value):
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)


def whole(source, name):
    return source.read(name, tuple(slice(None) for _ in source.shapes[name]))


@pytest.fixture
def tiny(tmp_path):
    return write(tmp_path, weights())


@pytest.mark.parametrize("kind", KINDS)
def test_slices_are_those_of_the_whole(tmp_path, kind):
    tensors = weights()
    source = GgufSource(write(tmp_path, tensors, kind))
    assert source.shapes == {name: tensor.shape for name, tensor in tensors.items()}
    for name in ("blk.1.ffn_down.weight", "blk.0.attn_k.weight"):
        stored = gguf.quants.quantize(tensors[name], KIND[kind])
        found = whole(source, name)
        assert found.dtype == KINDS[kind]
        np.testing.assert_array_equal(found.astype(np.float32), gguf.quants.dequantize(stored, KIND[kind]))
        for index in np.s_[3:7, 5:41], np.s_[:, 32:64], np.s_[2:3, :1], np.s_[10:2:-3, 60:7:-5], np.s_[::7, 1::9]:
            np.testing.assert_array_equal(source.read(name, index), found[index])
        assert source.read(name, np.s_[0:0, 0:3]).shape == (0, 3)


def test_only_the_blocks_of_the_part_are_dequantised(tmp_path, monkeypatch):
    source, seen = GgufSource(write(tmp_path, weights(), "Q8_0")), []
    dequantize = gguf.quants.dequantize
    monkeypatch.setattr(gguf.quants, "dequantize", lambda x, kind: seen.append(x.shape) or dequantize(x, kind))
    source.read("blk.0.ffn_down.weight", np.s_[8:12, 40:50])
    block_bytes = gguf.GGML_QUANT_SIZES[KIND.Q8_0][1]
    assert seen == [(4, block_bytes)]


def test_the_librarys_reader_sees_the_same_file(tiny):
    source, theirs = GgufSource(tiny), gguf.GGUFReader(tiny)
    assert source.shapes == {tensor.name: tuple(tensor.shape.tolist()[::-1]) for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        np.testing.assert_array_equal(whole(source, tensor.name), tensor.data)
    ours = {key: x.tolist() if isinstance(x, np.ndarray) else x for key, x in source.metadata.items()}
    found = {key: x.contents() for key, x in theirs.fields.items() if not key.startswith("GGUF.")}
    for key, value in found.items():
        assert ours.pop(key) == pytest.approx(value) if isinstance(value, float) else ours.pop(key, None) == value
    assert not ours


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_config_fits_its_tensors(tmp_path, architecture, tied):
    bias = architecture == "qwen2"
    source = GgufSource(write(tmp_path, weights(bias, tied), architecture=architecture))
    config, context = gguf_config(source)
    assert (config.tie_embeddings, config.qkv_bias, gguf_split_halves(source)) == (tied, bias, bias)
    assert (config.width, config.ffn_width, config.layers, config.heads) == (WIDTH, FFN, LAYERS, HEADS)
    assert (config.key_heads, config.head_size, config.vision_vocab_size) == (KV_HEADS, WIDTH // HEADS, 0)
    # Not 9.999999747378752e-06, which float32 metadata would be.
    assert (config.norm_eps, config.rope_theta, config.vocab_size, context) == (1e-5, 5e4, len(TOKENS), 256)
    assert config.rope_scaling is None and config.window is None
    check_tensors(source, gguf_recipes(config, split_halves=bias), lambda name: False)


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"attention.head_count_kv": [2, 2]}, {"kv_heads": 2}),
        ({"attention.head_count_kv": None}, {"kv_heads": HEADS}),
        ({"attention.key_length": 32, "rope.dimension_count": 32}, {"head_dim": 32}),
        ({"attention.sliding_window": 128}, {"window": 128}),
        ({"attention.sliding_window": 0}, {"window": None}),
        ({"rope.freq_base": None}, {"rope_theta": 10000.0}),
        ({"vocab_size": None}, {"vocab_size": len(TOKENS)}),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {"rope_scaling": None}),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_scaling": RopeScaling("linear", 4.0)}),
        ({"rope.scale_linear": 2.0}, {"rope_scaling": RopeScaling("linear", 2.0)}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64},
            {"rope_scaling": RopeScaling("yarn", 4.0, original_max_position=64)},
        ),
        ({"expert_count": 0}, {}),
    ],
)
def test_fields(tmp_path, fields, expected):
    config, _ = gguf_config(GgufSource(write(tmp_path, weights(), **fields)))
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    "fields, error, words",
    [
        ({"architecture": "gemma2"}, NotImplementedError, "'gemma2' is not one of llama, qwen2"),
        ({"expert_count": 8}, NotImplementedError, "expert_count 8"),
        ({"attention.head_count_kv": [2, 1]}, NotImplementedError, "same size"),
        ({"rope.scaling.type": "longrope"}, NotImplementedError, "longrope"),
        ({"rope.dimension_count": 8}, NotImplementedError, "size of a head, 16"),
        ({"rope.scaling.attn_factor": 1.5}, NotImplementedError, "attn_factor 1.5"),
        ({"logit_scale": 0.5}, NotImplementedError, "logit_scale 0.5"),
        ({"block_count": None}, ValueError, "no llama.block_count"),
        ({"block_count": 3}, ValueError, "no blk.2.attn_norm.weight"),
        ({"attention.head_count": 0}, ValueError, "heads 0"),
        ({"embedding_length": "64"}, ValueError, "not of type int"),
    ],
)
def test_refused_configs(tmp_path, fields, error, words):
    path = write(tmp_path, weights(), **fields)
    with pytest.raises(error, match=words) as raised:
        gguf_config(GgufSource(path))
    assert path.name in str(raised.value)


def test_factors_of_rope(tmp_path):
    ones = np.ones(WIDTH // HEADS // 2, np.float32)
    gguf_config(GgufSource(write(tmp_path, weights() | {"rope_freqs.weight": ones})))
    source = GgufSource(write(tmp_path, weights() | {"rope_freqs.weight": ones * 8}))
    with pytest.raises(NotImplementedError, match="llama3"):
        gguf_config(source)


def test_refused_sources(tmp_path):
    path = tmp_path / "odd.gguf"
    block = gguf.GGML_QUANT_SIZES[KIND.Q8_K][1]
    for tensor, kind, words in (
        (np.zeros((4, block), np.uint8), KIND.Q8_K, "Q8_K cannot be turned into floats"),
        (np.zeros((4, 32), np.int8), None, "I8 cannot"),
    ):
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_tensor("odd", tensor, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(ValueError, match=words):
            GgufSource(path)
    with pytest.raises(ValueError, match="one of 3 parts"):
        GgufSource(write(tmp_path, weights(), general={"split.count": 3}))
    with pytest.raises(FileNotFoundError):
        GgufSource(tmp_path / "absent.gguf")


def header_size(path) -> int:
    return int(gguf.GGUFReader(path).data_offset)


def test_a_cut_file_is_refused(tiny):
    content, header = tiny.read_bytes(), header_size(tiny)
    for size in [*range(200), *range(200, header, 41), header, header + 100, len(content) - 33]:
        tiny.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"model\.gguf is not a whole GGUF file"):
            GgufSource(tiny)


def test_absurd_lengths_take_no_memory(tiny):
    """Counts of tensors and keys, the length of the first key, that of an array, and the sizes of a tensor."""
    content = tiny.read_bytes()
    tokens = content.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 8
    embedding = content.index(b"token_embd.weight") + len(b"token_embd.weight") + 4
    faults = {8: "tensors at byte 8 do not fit", 16: "keys at byte 16 do not fit", 24: "are left"}
    faults |= {tokens: "numbers at byte .* do not fit", embedding: "past the end|rows", embedding + 8: "past the end"}
    for place, words in faults.items():
        for count in (2**20, 2**40, 2**63, 2**64 - 1):
            tiny.write_bytes(content[:place] + struct.pack("<Q", count) + content[place + 8 :])
            tracemalloc.start()
            with pytest.raises(ValueError, match=rf"model\.gguf.*{words}"):
                GgufSource(tiny)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 2**20


@pytest.mark.parametrize("flip", [0x01, 0xFF])
def test_a_tampered_header_is_read_or_refused(tiny, flip):
    content, header = tiny.read_bytes(), header_size(tiny)
    first, last = content.index(TOKENS[3].encode()), content.index(b"tokenizer.ggml.token_type")
    places = [*range(32), *range(32, first, 7), *range(first, last, 97), *range(last, header, 19)]
    refused = 0
    for place in places:
        with tiny.open("r+b") as file:
            file.seek(place)
            file.write(bytes([content[place] ^ flip]))
        try:
            source = GgufSource(tiny)
            gguf_config(source)
            tokenizer_json(source)
        except (ValueError, NotImplementedError) as error:
            assert "model.gguf" in str(error)
            refused += 1
        with tiny.open("r+b") as file:
            file.seek(place)
            file.write(content[place : place + 1])
    assert refused > len(places) / 2


@pytest.mark.parametrize(
    "pre, pieces",
    [
        ("gpt-2", ["hello", "Ġw", "Ġ", "123", "4"]),
        ("smollm", ["hello", "Ġw", "Ġ", "1", "2", "3", "4"]),
        ("qwen2", ["hello", "Ġw", "Ġ", "1", "2", "3", "4"]),
        ("llama-bpe", ["hello", "Ġw", "Ġ", "123", "4"]),
    ],
)
def test_tokenizer(tmp_path, pre, pieces):
    source = GgufSource(write(tmp_path, weights(), general={"tokenizer.ggml.pre": pre}))
    made = tokenizers.Tokenizer.from_str(tokenizer_json(source))
    assert made.encode("hello w 1234", add_special_tokens=False).tokens == pieces
    # Added tokens are special, in the places that the file gives them.
    assert made.encode("<|im_start|>he<|im_end|>", add_special_tokens=False).ids == [1, TOKENS.index("he"), 2]
    assert [made.token_to_id(token) for token in TOKENS] == list(range(len(TOKENS)))
    begins = made.encode("he").ids[0] == 1
    assert begins == tokenizer_settings(source)["add_bos_token"] == (pre == "llama-bpe")

    (tmp_path / "tokenizer.json").write_text(tokenizer_json(source), encoding="utf-8")
    loaded = JsonTokenizer(tmp_path / "tokenizer.json")
    assert loaded.vocab_size == len(TOKENS)
    ids = loaded.encode(TEXT)
    assert min(ids) >= len(SPECIAL)
    expected = TEXT.replace("e\u0301", "é") if pre == "qwen2" else TEXT  # Qwen's normalises to NFC
    assert loaded.decode(ids) == expected


@pytest.mark.parametrize(
    "pre, pieces",
    [
        ("gpt-2", ["we", "'", "LL", "Ġ1234", "ĊĊ", "Ġx"]),
        ("smollm", ["we", "'", "LL", "Ġ", "1", "2", "3", "4", "ĊĊ", "Ġx"]),
        ("qwen2", ["we", "'LL", "Ġ", "1", "2", "3", "4", "ĊĊ", "Ġx"]),
        ("llama-bpe", ["we", "'LL", "Ġ", "123", "4", "ĊĊ", "Ġx"]),
    ],
)
def test_text_is_cut_before_the_merges(tmp_path, pre, pieces):
    source = GgufSource(write(tmp_path, weights(), general={"tokenizer.ggml.pre": pre}))
    made = tokenizers.Tokenizer.from_str(tokenizer_json(source))
    assert [piece for piece, _ in made.pre_tokenizer.pre_tokenize_str("we'LL 1234\n\n x")] == pieces


def test_settings(tmp_path):
    source = GgufSource(write(tmp_path, weights(), general={"tokenizer.ggml.add_bos_token": True}))
    assert tokenizer_settings(source) == {
        "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "add_bos_token": True,
        "chat_template": "{{ messages }}",
    }  # fmt: skip
    absent = dict.fromkeys(("tokenizer.ggml.bos_token_id", "tokenizer.chat_template"))
    settings = tokenizer_settings(GgufSource(write(tmp_path, weights(), general=absent)))
    assert settings["bos_token"] is None and settings["chat_template"] is None and not settings["add_bos_token"]


def test_a_tokenizer_for_training_data(tiny, tmp_path):
    loaded = load_tokenizer(str(tiny))
    # <|im_start|> begins a turn, not an example: the file doesn't say that it comes before texts.
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (0, 2, 2)
    assert loaded.encode("hello") == [TOKENS.index("hello")] and "<|im_start|>" in loaded.specials
    folder = tmp_path / "copy"
    folder.mkdir()
    for name, content in tokenizer_files(str(tiny)).items():
        (folder / name).write_bytes(content)
    again = load_tokenizer(str(folder))
    assert (again.fingerprint, again.bos_id, again.eos_id) == (loaded.fingerprint, 0, 2)
    tiny.write_bytes(tiny.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a whole GGUF"):
        load_tokenizer(str(tiny))


def test_types_of_tokens(tmp_path):
    kinds = [*TOKENIZER["tokenizer.ggml.token_type"], 4, 5]
    tokens = [*TOKENS, "w 1", "[PAD]"]
    general = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    made = json.loads(tokenizer_json(GgufSource(write(tmp_path, weights(), general=general))))
    assert [(x["content"], x["id"], x["special"]) for x in made["added_tokens"]] == [
        *((token, i, True) for i, token in enumerate(SPECIAL)),
        ("w 1", len(TOKENS), False),
    ]
    assert "[PAD]" not in made["model"]["vocab"]


@pytest.mark.parametrize(
    "general, error, words",
    [
        ({"tokenizer.ggml.pre": "tekken"}, NotImplementedError, "'tekken' is not one of gpt-2, smollm"),
        ({"tokenizer.ggml.pre": None}, NotImplementedError, "None is not one of"),
        ({"tokenizer.ggml.model": "llama"}, NotImplementedError, "SentencePiece.*give the tokenizer.json"),
        ({"tokenizer.ggml.merges": ["1 2", "123"]}, ValueError, "'123' is not two tokens"),
        ({"tokenizer.ggml.merges": ["1 2", "zz y"]}, ValueError, "do not fit each other"),
        ({"tokenizer.ggml.tokens": None}, ValueError, "no tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.tokens": [*TOKENS[:-1], "a"]}, ValueError, "there twice"),
        ({"tokenizer.ggml.token_type": [1, 1]}, ValueError, "2 types"),
        ({"tokenizer.ggml.eos_token_id": 4096}, ValueError, "eos_token_id 4096"),
    ],
)
def test_refused_tokenizers(tmp_path, general, error, words):
    source = GgufSource(write(tmp_path, weights(), general=general))
    with pytest.raises(error, match=words):
        tokenizer_json(source)


@pytest.mark.skipif("RINGJAX_SMOLLM2" not in os.environ, reason="RINGJAX_SMOLLM2 names no SmolLM2 .gguf")
def test_smollm2(tmp_path):
    source = GgufSource(os.environ["RINGJAX_SMOLLM2"])
    config, context = gguf_config(source)
    check_tensors(source, gguf_recipes(config, split_halves=False), lambda name: False)
    assert (config.layers, config.width, config.head_size, config.rope_theta, context) == (30, 576, 64, 1e5, 8192)
    (tmp_path / "tokenizer.json").write_text(tokenizer_json(source), encoding="utf-8")
    tokenizer = JsonTokenizer(tmp_path / "tokenizer.json")
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT and min(ids) > 16 and max(ids) < tokenizer.vocab_size == 49152
    assert [tokenizer.marker(token) for token in SPECIAL] == [[0], [1], [2]]


def test_more_layers_than_tensors(tmp_path):
    """A tensor may be called as the last of a billion layers is."""
    tensors = weights() | {"blk.4000.attn_norm.weight": np.zeros(WIDTH, np.float32)}
    with pytest.raises(ValueError, match="block_count is 4001"):
        gguf_config(GgufSource(write(tmp_path, tensors, block_count=4001)))
    with pytest.raises(ValueError, match="layers 1000000000 is more than 4096"):
        gguf_config(GgufSource(write(tmp_path, weights(), block_count=10**9)))
