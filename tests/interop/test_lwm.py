"""LWM's streams: written as LWM writes them, read in slices; ours read by flax; cut and tampered ones refused."""

import random
import tracemalloc
from types import SimpleNamespace

import jax
import ml_dtypes
import msgpack
import numpy as np
import pytest
from flax import nnx, serialization

from ringjax.interop import lwm
from ringjax.interop.load import check_tensors, load_params
from ringjax.models.config import ModelConfig
from ringjax.models.parallel import Parallel
from ringjax.models.sizes import SIZES
from ringjax.models.transformer import Transformer

TINY = ModelConfig(width=32, ffn_width=48, layers=2, heads=4, vocab_size=64, vision_vocab_size=18, vision_codes=16)
TEXT = ModelConfig(width=32, ffn_width=48, layers=2, heads=4, vocab_size=64, vision_vocab_size=0)
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32, "float64": np.float64}


def drawn(config=TINY, dtype=ml_dtypes.bfloat16):
    """Parameters by path, layers stacked."""
    random_numbers = np.random.default_rng(0)
    return {
        path: random_numbers.standard_normal(leaf.get_value().shape).astype(dtype)
        for path, leaf in nnx.to_flat_state(nnx.state(Transformer.abstract(config)))
    }


def their_name(path, layer):
    """As facts/lwm.md has it; written here apart from the code that is tested."""
    joined = "/".join(path)
    if path[0] == "h":
        return f"transformer/h/{layer}/{joined[2:]}"
    return joined if "head" in path[0] else f"transformer/{joined}"


def theirs(params, scanned):
    """The tensors of a stream by name."""
    found = {}
    for path, value in params.items():
        if path[0] == "h" and not scanned:
            found |= {their_name(path, i): layer for i, layer in enumerate(value)}
        else:
            found[their_name(path, "scan_decoder")] = value
    return found


def packed(tensors, prefix=1):
    """As LWM's checkpointer packs: a stream of (key, flax bytes)."""
    keys = ((*["params"] * prefix, *name.split("/")) for name in tensors)
    return b"".join(msgpack.packb((key, serialization.to_bytes(x))) for key, x in zip(keys, tensors.values()))


def source_of(path, content):
    path.write_bytes(content)
    return lwm.LwmSource(path)


def whole(shape):
    return tuple(slice(None) for _ in shape)


def assert_same(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert a.tobytes() == b.tobytes()


def assert_holds(source, params, config=TINY):
    recipes = lwm.lwm_recipes(config, lwm.is_scanned(source))
    check_tensors(source, recipes, lambda name: False)
    assert recipes.keys() == params.keys()
    for path, recipe in recipes.items():
        assert recipe.our_shape == params[path].shape
        assert_same(recipe.read(source, whole(recipe.our_shape)), params[path])


def save(params, target, scanned=True, layers=2):
    lwm.save_lwm(((path, lambda x=x: x) for path, x in params.items()), target, scanned=scanned, layers=layers)


# --- round trips ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("scanned", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_what_lwm_wrote(tmp_path, dtype, scanned, prefix):
    params = drawn(dtype=DTYPES[dtype])
    source = source_of(tmp_path / "params", packed(theirs(params, scanned), prefix))
    assert lwm.is_scanned(source) == scanned
    assert source.shapes == {name: x.shape for name, x in theirs(params, scanned).items()}
    assert_holds(source, params)


@pytest.mark.parametrize("config", [TINY, TEXT], ids=["vision", "text"])
@pytest.mark.parametrize("scanned", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_we_write_flax_reads(tmp_path, dtype, scanned, config):
    params, path = drawn(config, DTYPES[dtype]), tmp_path / "ours"
    save(params, path, scanned)
    with path.open("rb") as file:
        found = {tuple(key): serialization.msgpack_restore(value) for key, value in msgpack.Unpacker(file)}
    wanted = {("params", *name.split("/")): x for name, x in theirs(params, scanned).items()}
    assert found.keys() == wanted.keys()
    for key, x in wanted.items():
        assert_same(np.asarray(found[key]), x)
    assert_holds(lwm.LwmSource(path), params, config)


def test_loads_a_model_onto_a_mesh(tmp_path):
    params = drawn(dtype=np.float32)
    save(params, tmp_path / "ours")
    source = lwm.LwmSource(tmp_path / "ours")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(1, 2, 2, 1), ("dp", "fsdp", "tp", "sp"))
    model = load_params(TINY, source, lwm.lwm_recipes(TINY, True), Parallel(mesh))
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        assert_same(np.asarray(leaf.get_value()), params[path])


@pytest.mark.parametrize("scanned", [True, False])
@pytest.mark.parametrize("chunk", [2, 100, 1000])
def test_chunked_arrays(tmp_path, monkeypatch, chunk, scanned):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", chunk)
    monkeypatch.setattr(lwm, "_MAX_CHUNK", chunk)
    config = ModelConfig(width=4, ffn_width=6, layers=2, heads=2, vocab_size=30, vision_vocab_size=0)
    params = drawn(config)
    source = source_of(tmp_path / "theirs", packed(theirs(params, scanned)))
    assert any(len(place.chunks) > 1 for place in source._places.values()) == (chunk < 1000)
    assert_holds(source, params, config)
    save(params, tmp_path / "ours", scanned)
    assert_holds(lwm.LwmSource(tmp_path / "ours"), params, config)
    with (tmp_path / "ours").open("rb") as file:
        for (_, *key), value in msgpack.Unpacker(file):
            assert_same(np.asarray(serialization.msgpack_restore(value)), theirs(params, scanned)["/".join(key)])


@pytest.mark.parametrize("chunk", [2**30, 14, 34, 60])
def test_slices_equal_the_whole(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", chunk)
    tensors = {"a": np.arange(2 * 3 * 5, dtype=ml_dtypes.bfloat16).reshape(2, 3, 5), "b": np.arange(9, dtype="<f2")}
    source = source_of(tmp_path / "params", packed(tensors))
    cuts = [slice(None), slice(0, 1), slice(1, 2), slice(0, 3), slice(2, 5), slice(1, 1), slice(0, 9, 2)]
    for cut in cuts:
        assert_same(source.read("b", (cut,)), tensors["b"][cut].copy())
        for other in cuts:
            for index in ((cut, other, slice(None)), (slice(None), cut, other), (cut, slice(1, 2), other)):
                assert_same(source.read("a", index), tensors["a"][index].copy())


def test_what_is_read_is_a_copy(tmp_path):
    source = source_of(tmp_path / "params", packed({"a": np.zeros((2, 2), np.float32)}))
    part = source.read("a", whole((2, 2)))
    part[0] = 1
    assert not source.read("a", whole((2, 2))).any()


def test_a_scalar_and_long_heads(tmp_path):
    tensors = {"/".join(["long name " * 20, *"abcdefghijklmnop"[:14]]): np.array(3, "f4"), "b": np.ones(70000)}
    source = source_of(tmp_path / "params", packed(tensors))
    for name, x in tensors.items():
        assert_same(source.read(name, whole(x.shape)), x)


def test_a_slice_of_a_large_file_takes_little_memory(tmp_path):
    rows, row = 2**15, 2**13
    size = rows * row
    inner = b"\x93" + msgpack.packb((rows, row)) + msgpack.packb("bfloat16") + b"\xc6" + (2 * size).to_bytes(4, "big")
    ext = b"\xc9" + (len(inner) + 2 * size).to_bytes(4, "big") + b"\x01" + inner
    head = b"\x92" + msgpack.packb(("a",)) + b"\xc6" + (len(ext) + 2 * size).to_bytes(4, "big") + ext
    with (tmp_path / "params").open("wb") as file:  # 512 MiB, all but the end a hole
        file.write(head)
        file.seek(2 * (size - 1), 1)
        file.write(np.ones(1, ml_dtypes.bfloat16).tobytes())
    tracemalloc.start()
    source = lwm.LwmSource(tmp_path / "params")
    part = source.read("a", (slice(rows - 2, rows), slice(row - 4, row)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20
    assert part.tolist() == [[0, 0, 0, 0], [0, 0, 0, 1]]


# --- sizes and names ------------------------------------------------------------------------------------------------


def shapes_of(config, scanned):
    recipes = lwm.lwm_recipes(config, scanned).values()
    return SimpleNamespace(path="params", shapes={name: x.shape for x in recipes for name in x.names})


@pytest.mark.parametrize("scanned", [True, False])
@pytest.mark.parametrize("name", ["debug", "7b", "65b"])
def test_shapes_tell_the_size(name, scanned):
    source = shapes_of(SIZES[name], scanned)
    assert lwm.is_scanned(source) == scanned
    assert lwm.shape_of_stream(source) == SIZES[name]
    del source.shapes["transformer/vte/embedding"]
    assert lwm.shape_of_stream(source).vision_vocab_size == 0


def test_a_size_that_lwm_does_not_have():
    with pytest.raises(ValueError, match="params has width 32, ffn_width 48, layers 2, and no size of LWM has"):
        lwm.shape_of_stream(shapes_of(TEXT, True))
    assert lwm.shape_of_stream(shapes_of(TEXT, True), heads=4) == TEXT


def test_a_stream_that_is_no_model():
    with pytest.raises(ValueError, match="params has no tensor under transformer/h"):
        lwm.is_scanned(SimpleNamespace(path="params", shapes={"a": (1,)}))
    source = shapes_of(TEXT, True)
    source.shapes["transformer/wte/embedding"] = (1,)
    with pytest.raises(ValueError, match=r"transformer/wte/embedding is \[1\], and 2 axes"):
        lwm.shape_of_stream(source)


def test_biases_are_not_lwms():
    with pytest.raises(ValueError, match="qkv_bias True"):
        lwm.lwm_recipes(ModelConfig(width=8, ffn_width=8, layers=1, heads=2, qkv_bias=True), True)


# --- files that are not whole ---------------------------------------------------------------------------------------


def small_stream(monkeypatch):
    """Two records, one chunked: a few hundred bytes, so that every one can be tried."""
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 16)
    tensors = {"transformer/a": np.ones((2, 3), np.float32), "lm_head/b": np.ones((3,), ml_dtypes.bfloat16)}
    return tensors, packed(tensors)


def test_cut_at_any_byte(tmp_path, monkeypatch):
    tensors, content = small_stream(monkeypatch)
    boundary = len(packed(dict([*tensors.items()][:1])))
    for end in range(len(content)):
        if end == boundary:  # whole in itself: the recipes find what is missing
            assert source_of(tmp_path / "cut", content[:end]).shapes.keys() == {"transformer/a"}
            continue
        with pytest.raises(ValueError, match="cut is (empty|not a whole LWM stream of parameters: byte [0-9]+)"):
            source_of(tmp_path / "cut", content[:end])


def test_a_model_cut_between_records(tmp_path):
    content = packed(theirs(drawn(), True))
    first = len(packed(dict([*theirs(drawn(), True).items()][:1])))
    with pytest.raises(ValueError, match="cut does not fit its config: missing transformer/h/scan_decoder"):
        check_tensors(source_of(tmp_path / "cut", content[:first]), lwm.lwm_recipes(TINY, True), lambda name: False)


def test_tampered_at_any_byte(tmp_path, monkeypatch):
    _, content = small_stream(monkeypatch)
    values, refused = random.Random(0), 0
    for at in range(len(content)):
        for value in {0, 255, content[at] ^ 1, values.randrange(256), values.randrange(256)} - {content[at]}:
            tampered = content[:at] + bytes([value]) + content[at + 1 :]
            try:
                source = source_of(tmp_path / "tampered", tampered)
            except ValueError as error:
                refused += 1
                assert "tampered is not a whole LWM stream" in str(error)
            else:  # a number or a letter of a name was changed, nothing that tells where things lie
                assert all(source.read(name, whole(shape)).shape == shape for name, shape in source.shapes.items())
    assert refused > 2 * len(content)


def array(shape, dtype, content):
    return msgpack.packb(msgpack.ExtType(1, msgpack.packb((shape, dtype, content))))


def record(key, value):
    return msgpack.packb((key, value))


def chunked(**fields):
    return msgpack.packb({"__msgpack_chunked_array__": True, **fields})


ONE = array((1,), "float32", bytes(4))
CHUNK = msgpack.ExtType(1, msgpack.packb(((1,), "float32", bytes(4))))
GOOD = record(("params", "a"), ONE)
BAD = {
    "empty": (b"", "is empty"),
    "a pickle": (b"\x80\x04}.", "byte 0: map, where array"),
    "text": (b"not msgpack", "byte 0: int, where array"),
    "never used": (b"\xc1", "0xc1"),
    "three parts": (msgpack.packb((("a",), ONE, 1)), "not a pair"),
    "key is a text": (record("a", ONE), "text, where array"),
    "key of bytes": (record((b"a",), ONE), "bytes, where text"),
    "key of numbers": (record((1,), ONE), "int, where text"),
    "key of nothing": (record((), ONE), "a key of 0 parts"),
    "long key": (record(["a"] * 17, ONE), "a key of 17 parts"),
    "long name": (record(["a" * 257], ONE), "text of 257 bytes"),
    "no UTF-8": (b"\x92\x91\xa1\xff\xc4\x00", "byte 2: text that is not UTF-8"),
    "nested key": (record((("a",),), ONE), "array, where text"),
    "deep": (b"\x92" + b"\x91" * 100000, "array, where text"),
    "twice": (GOOD + GOOD, f"byte {len(GOOD)}, a: this tensor is there twice"),
    "twice by prefix": (GOOD + record(("a",), ONE), "this tensor is there twice"),
    "a number": (record(("a",), msgpack.packb(3)), "int, where ext"),
    "no bytes": (record(("a",), 3), "int, where bytes"),
    "other ext": (record(("a",), msgpack.packb(msgpack.ExtType(3, b"x"))), "ext type 3"),
    "ext of junk": (record(("a",), msgpack.packb(msgpack.ExtType(1, b"x"))), "int, where array"),
    "more in the ext": (
        record(("a",), msgpack.packb(msgpack.ExtType(1, msgpack.packb(((1,), "float32", bytes(4))) + b"\x01"))),
        "1 bytes too many",
    ),
    "int32": (record(("a",), array((1,), "int32", bytes(4))), "a: int32, not one of bfloat16"),
    "objects": (record(("a",), array((1,), "object", bytes(8))), "object, not one of"),
    "void": (record(("a",), array((1,), "V2", bytes(2))), "V2, not one of"),
    "too few": (record(("a",), array((2,), "float32", bytes(4))), r"4 bytes, and float32\[2\] takes 8"),
    "too many": (record(("a",), array((2,), "float32", bytes(12))), r"12 bytes, and float32\[2\] takes 8"),
    "huge shape": (record(("a",), array((2**63, 2**63), "float32", bytes(4))), "4 bytes"),
    "negative shape": (record(("a",), array((-1,), "float32", bytes(4))), "which parameters do not need"),
    "no numbers": (record(("a",), array((0,), "float32", b"")), r"an empty array, \[0\]"),
    "many axes": (record(("a",), array((1,) * 9, "float32", bytes(4))), "9 axes"),
    "more behind": (record(("a",), ONE + b"\x01"), "1 bytes too many"),
    "long array": (b"\x92\xdd\xff\xff\xff\xff", "a key of 4294967295 parts"),
    "long bytes": (b"\x92\x91\xa1a\xc6\xff\xff\xff\xff\x00", "byte 9, a: breaks off"),
    "long chunks": (record(("a",), b"\x83\xa6chunks\xdf\xff\xff\xff\xff"), "a map of 4294967295 items"),
    "chunk fields": (record(("a",), chunked()), "has not 3 fields"),
    "other fields": (record(("a",), chunked(shape={}, pieces={})), "'pieces'"),
    "same field": (record(("a",), b"\x83" + 3 * (b"\xa5shape\x80")), "without"),
    "unmarked": (record(("a",), msgpack.packb({"__msgpack_chunked_array__": 1, "shape": {}, "chunks": {}})), "true"),
    "no chunks": (record(("a",), chunked(shape={"0": 1}, chunks={})), r"chunks of \[\] numbers"),
    "chunk missing": (record(("a",), chunked(shape={"0": 2}, chunks={"0": CHUNK})), r"for shape \[2\]"),
    "chunk misnamed": (record(("a",), chunked(shape={"0": 1}, chunks={"1": CHUNK})), "not called so"),
    "shape of texts": (record(("a",), chunked(shape={"0": "1"}, chunks={"0": CHUNK})), "text, where int"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(tmp_path, name):
    content, message = BAD[name]
    with pytest.raises(ValueError, match=message) as caught:
        source_of(tmp_path / "stream", content)
    assert str(tmp_path / "stream") in str(caught.value)
    assert name == "empty" or "byte " in str(caught.value)


def test_chunks_of_two_types(tmp_path):
    other = msgpack.ExtType(1, msgpack.packb(((1,), "float16", bytes(2))))
    with pytest.raises(ValueError, match="numbers of 2 types"):
        source_of(tmp_path / "s", record(("a",), chunked(shape={"0": 2}, chunks={"0": CHUNK, "1": other})))


def test_too_many_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(lwm, "_MOST_TENSORS", 2)
    with pytest.raises(ValueError, match="more than 2 tensors"):
        source_of(tmp_path / "s", b"".join(record((name,), ONE) for name in "abc"))


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        lwm.LwmSource(tmp_path / "nothing")


# --- writing --------------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_what_was_there(tmp_path):
    def fail():
        raise RuntimeError("no memory")

    target = tmp_path / "params"
    target.write_bytes(b"before")
    with pytest.raises(RuntimeError, match="no memory"):
        lwm.save_lwm([(("ln_f", "kernel"), lambda: np.ones(4)), (("lm_head", "kernel"), fail)], target,
                     scanned=True, layers=1)  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["params"]
    assert target.read_bytes() == b"before"


@pytest.mark.parametrize("scanned", [True, False])
def test_what_cannot_be_written(tmp_path, monkeypatch, scanned):
    with pytest.raises(ValueError, match="ln_f/kernel is int64"):
        save({("ln_f", "kernel"): np.arange(4)}, tmp_path / "a", scanned)
    with pytest.raises(ValueError, match=r"h/ffn_norm/kernel is \[3, 4\]; its first axis must be the 2 layers"):
        save({("h", "ffn_norm", "kernel"): np.ones((3, 4))}, tmp_path / "a", scanned)
    monkeypatch.setattr(lwm, "_MAX_RECORD", 100)
    with pytest.raises(ValueError, match="takes .* bytes, and a record at most 100; write with scanned=False"):
        save({("ln_f", "kernel"): np.ones(100)}, tmp_path / "a", scanned)
    assert not list(tmp_path.iterdir())


def test_any_memory_layout_is_written(tmp_path):
    tensors = {
        ("wte", "embedding"): np.arange(6, dtype=np.float32).reshape(2, 3).T,
        ("ln_f", "kernel"): np.arange(6, dtype=">f4")[::2],
    }
    save(tensors, tmp_path / "a")
    source = lwm.LwmSource(tmp_path / "a")
    assert source.read("transformer/wte/embedding", whole((3, 2))).tolist() == [[0, 3], [1, 4], [2, 5]]
    assert source.read("transformer/ln_f/kernel", whole((3,))).tolist() == [0, 2, 4]
