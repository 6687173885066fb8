"""Pickles: arrays come out equal whatever wrote them, and nothing else comes out, or is called."""

import os
import pickle
import random
import sys
from collections import OrderedDict

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict

from ringjax.interop.pickled import load_vqgan_pickle, read_pickled_arrays
from ringjax.models import vqgan
from ringjax.models.vqgan.files import named_tensors
from tests.fuzz.payloads import memo_bomb

TINY = vqgan.VQGANConfig(
    resolution=8, channels=1, hidden=4, multipliers=(1, 2), res_blocks=1, z_channels=4, codes=16, code_dim=3,
    norm_groups=2,
)  # fmt: skip
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
X = np.arange(6, dtype=np.float32).reshape(2, 3)
ARRAYS = {
    "float32": X,
    "fortran": np.asfortranarray(X),
    "strided": np.arange(12.0).reshape(3, 4)[:, ::2],
    "bfloat16": X.astype(ml_dtypes.bfloat16),
    "bfloat16, fortran": np.asfortranarray(X.astype(ml_dtypes.bfloat16)),
    "float16": X.astype(np.float16),
    "int64": X.astype(np.int64),
    "uint8": np.arange(256, dtype=np.uint8),
    "bool": X > 2,
    "big endian": X.astype(">f4"),
    "scalar": np.array(3.0),
}


def read(path, content):
    path.write_bytes(content)
    return read_pickled_arrays(path)


def assert_same(a, b):
    assert isinstance(a, np.ndarray)
    assert a.dtype == b.dtype.newbyteorder("=") and a.shape == b.shape
    assert np.array_equal(a, b)


# --- what is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(tmp_path, name, protocol):
    found = read(tmp_path / "p", pickle.dumps({"a": {"b": ARRAYS[name], "c": X}, "d": ARRAYS[name]}, protocol))
    assert found.keys() == {"a", "d"} and found["a"].keys() == {"b", "c"}
    assert_same(found["a"]["b"], ARRAYS[name])
    assert_same(found["a"]["c"], X)
    assert_same(found["d"], ARRAYS[name])


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_jax_arrays_in_frozen_dicts(tmp_path, dtype, protocol):
    x = jnp.asarray(X, dtype)
    found = read(tmp_path / "p", pickle.dumps(FrozenDict({"params": {"a": x, "b": {}}}), protocol))
    assert_same(found["params"]["a"], np.asarray(x))
    assert found["params"]["b"] == {}


@pytest.mark.parametrize("protocol", [0, 1, 2, 3])
def test_numpy_1(tmp_path, protocol):
    """NumPy 2 has renamed the module that the published file names."""
    content = pickle.dumps({"a": X}, protocol)
    assert content.count(b"numpy._core.multiarray") == 1
    assert_same(read(tmp_path / "p", content.replace(b"numpy._core", b"numpy.core"))["a"], X)


def test_python_pickler(tmp_path):
    """The one in Python writes other opcodes than the one in C: PUT for MEMOIZE, and no frames."""
    assert_same(read(tmp_path / "p", pickle._dumps({"a": X}, 2))["a"], X)
    assert_same(read(tmp_path / "p", pickle._dumps({"a": X}, 4))["a"], X)


# --- what is refused ------------------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments, self.state = function, arguments, ()

    def __reduce__(self):
        return self.function, self.arguments, *self.state


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_system_call_is_refused_and_not_run(tmp_path, protocol):
    called = tmp_path / "called"
    content = pickle.dumps({"a": X, "b": Call(os.system, f"touch {called}")}, protocol)
    with pytest.raises(ValueError, match=r"p tries to call posix\.system; only arrays are read \(byte [0-9]+\)"):
        read(tmp_path / "p", content)
    assert not called.exists()
    pickle.loads(content)  # so that it is a call that is not made, not one that could not be
    assert called.exists()


def test_the_name_is_the_files(tmp_path):
    command = f"cos\nsystem\n(Vtouch {tmp_path / 'called'}\ntR.".encode()
    with pytest.raises(ValueError, match=r"p tries to call os\.system; only arrays are read \(byte 0\)"):
        read(tmp_path / "p", command)
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


@pytest.mark.parametrize(
    "name", ["builtins eval", "builtins getattr", "numpy load", "numpy.core.multiarray scalar", "_codecs decode",
             "numpy dtype.__reduce__", "flax.core.frozen_dict copy", "this s"],
)  # fmt: skip
def test_no_other_global(tmp_path, name):
    module, attribute = name.split()
    for content in (
        f"c{module}\n{attribute}\n.".encode(),
        b"\x80\x04\x8c" + bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(attribute)])
        + attribute.encode() + b"\x93.",
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"tries to call {module}.{attribute};"):
            read(tmp_path / "p", content)
    assert "this" not in sys.modules


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_objects_in_an_array(tmp_path, protocol):
    with pytest.raises(ValueError, match="p has an array of objects; only numbers are read"):
        read(tmp_path / "p", pickle.dumps({"a": np.array([{}, None], object)}, protocol))


@pytest.mark.parametrize(
    "value, message",
    [
        ({"a": 3}, "a value of type int at a"),
        ({"a": {"b": "text"}}, "'text' at a/b"),
        ({"a": (X,)}, "type tuple at a"),
        ({"a": np.ndarray}, "numpy.ndarray at a"),
        ({"a": np.dtype("f4")}, "type Dtype at a"),
        ({1: X}, "keys are not all texts"),
        (X, "holds a value of type Array, not a dict of arrays"),
        ({"a": [X]}, "needs EMPTY_LIST"),
        ({"a": {1, 2}}, "needs EMPTY_SET"),
        ({"a": np.float32(1)}, "scalar"),
        ({"a": OrderedDict()}, "collections.OrderedDict"),
        ({"a": np.array(["text"])}, "an array of type 'U4'"),
        ({"a": np.zeros(2, [("x", "f4")])}, "an array of type 'V4'"),
        ({"a": np.zeros(2, "M8[s]")}, "an array of type 'M8'"),
        ({"a": np.zeros(2, ml_dtypes.float8_e5m2)}, "ml_dtypes.float8_e5m2"),
        ({"a": np.ma.masked_array([1.0])}, "numpy.ma"),
        ({"a": Call(np.dtype, np.dtype("f4"))}, "an array of type a value of type Dtype"),
    ],
)
def test_other_values(tmp_path, value, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path / "p", pickle.dumps(value, 4))
    assert str(caught.value).startswith(str(tmp_path / "p"))


ODD = {
    "call of a text": (b"Vtext\n(tR.", "tries to call 'text'"),
    "call of a class": (b"cnumpy\nndarray\n(tR.", "tries to call numpy.ndarray"),
    "call with no tuple": (b"cnumpy\ndtype\nNR.", "tries to call numpy.dtype"),
    "four arguments": (b"cnumpy\ndtype\n(I1\nI2\nI3\nI4\ntR.", "REDUCE does not fit"),
    "a dict built": (b"}}b.", "tries to build a value of type dict"),
    "a global built": (b"cnumpy\ndtype\n}b.", "tries to build numpy.dtype"),
    "built from a dict": (b"cnumpy\ndtype\n(Vf4\ntR}b.", "tries to build a value of type Dtype"),
    "item of None": (b"NVkey\nNs.", "SETITEM does not fit"),
    "key alone": (b"}(Vkey\nu.", "SETITEMS does not fit"),
    "not remembered": (b"g0\n.", "GET does not fit"),
    "empty stack": (b"R.", "REDUCE does not fit"),
    "mark remembered": (b"(p0\n.", "PUT does not fit"),
    "no mark": (b"t.", "TUPLE does not fit"),
    "two values": (b"NN.", "with 2 values"),
    "more behind": (b"}.more", "ends at byte 2 of 6"),
    "persistent": (b"\x80\x04Pid\n.", "needs PERSID"),
    "instance": (b"(ios\nsystem\n.", "needs INST"),
    "extension": (b"\x80\x04\x82\x01.", "needs EXT1"),
    "new object": (b"cnumpy\ndtype\n)\x81.", "needs NEWOBJ"),
    "empty": (b"", "is empty"),
    "no pickle": (b"no pickle", "breaks off before byte"),
    # Small files that would be 2**60 values where they were copied, written or hashed, or too deep for Python's stack.
    "dict in itself": (b"}p0\nVa\ng0\ns.", "there twice"),
    "dict twice": (b"}(Va\n}p0\nVb\ng0\nu.", "b that is there twice"),
    "deep": (b"}(Va\n" * 50000 + b"}" + b"u" * 50000 + b".", "more than 32 levels"),
    "tree as a type": (
        b"cnumpy\ndtype\n)" + b"".join(b"p%d\ng%d\n\x86" % (i, i) for i in range(60)) + b"\x85R.", "type tuple"
    ),
    "deep as a byte order": (
        b"cnumpy\ndtype\n(Vf4\ntR(K\x03" + b")" + b"\x85" * 100000 + b"NNNtb.", "structured"
    ),
    "numbers with fields": (b"cnumpy\ndtype\n(Vf4\ntR(K\x03V<\nN(Vx\ntNtb.", "structured"),
    "deep as a key": (b"})" + b"\x85" * 100000 + b"Ns.", "keys are not all texts"),
    "long bytes": (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.", "breaks off"),
    "long number": (b"\x80\x04\x8b\xff\xff\xff\x7f.", "breaks off"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_pickles(tmp_path, name):
    content, message = ODD[name]
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "p", content)


def test_a_far_place_in_the_memo(tmp_path):
    """Python's unpickler makes room for all places before it: 32 GiB."""
    assert read(tmp_path / "p", b"\x80\x04}r\xff\xff\xff\xff.") == {}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_cut_at_any_byte(tmp_path, protocol):
    content = pickle.dumps({"a": X, "b": {"c": X.astype(ml_dtypes.bfloat16), "d": jnp.asarray(X)}}, protocol)
    for end in range(len(content)):
        with pytest.raises(ValueError, match="cut is (empty|no whole pickle: .*byte [0-9]+)"):
            read(tmp_path / "cut", content[:end])


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_tampered_at_any_byte(tmp_path, protocol):
    content = pickle.dumps({"a": X, "b": {"c": X.astype(ml_dtypes.bfloat16)}}, protocol)
    values, refused = random.Random(0), 0
    for at in range(len(content)):
        for value in {0, 255, content[at] ^ 1, values.randrange(256)} - {content[at]}:
            try:
                found = read(tmp_path / "p", content[:at] + bytes([value]) + content[at + 1 :])
            except ValueError as error:
                refused += 1
                assert str(error).startswith(str(tmp_path / "p"))
            else:
                assert isinstance(found, dict)
    assert refused > len(content)


@pytest.mark.parametrize(
    "shape, size", [((2, 3), 20), ((2, 3), 28), ((2**40, 2**40), 24), ((2**62,), 24), ((-1, -6), 24), (((), 3), 24),
                    ((True, 6), 24), ((1,) * 99, 4), (6, 24)],
)  # fmt: skip
def test_bytes_that_do_not_fit(tmp_path, shape, size):
    lying = Call(np._core.multiarray._reconstruct, np.ndarray, (0,), b"b")
    lying.state = ((1, shape, np.dtype("f4"), False, bytes(size)),)
    with pytest.raises(ValueError, match="bytes for an array f4|array f4 whose shape is not"):
        read(tmp_path / "p", pickle.dumps({"a": lying}, 4))


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_pickled_arrays(tmp_path / "nothing")


# --- the image tokenizer --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    """Every parameter drawn, none zero."""
    graph, state = nnx.split(vqgan.VQGAN.abstract(TINY))
    drawn = np.random.default_rng(0).standard_normal
    leaves = [(at, leaf.replace(jnp.asarray(drawn(leaf.get_value().shape), "f4"))) for at, leaf in
              nnx.to_flat_state(state)]  # fmt: skip
    return nnx.merge(graph, nnx.from_flat_state(leaves))


def tree(tensors):
    """Names cut at '/' into nested dicts."""
    found = {}
    for name, x in tensors.items():
        *levels, last = name.split("/")
        at = found
        for level in levels:
            at = at.setdefault(level, {})
        at[last] = x
    return found


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"params": x}, FrozenDict], ids=["bare", "params", "frozen"])
def test_a_vqgan_equals_its_safetensors(tmp_path, tiny, wrap):
    vqgan.save_vqgan(tiny, tmp_path / "ours.safetensors")
    (tmp_path / "theirs").write_bytes(pickle.dumps(wrap(tree(named_tensors(tiny)))))
    loaded = load_vqgan_pickle(tmp_path / "theirs", TINY)
    ours = vqgan.load_vqgan(tmp_path / "ours.safetensors")
    assert vqgan.vqgan_fingerprint(loaded) == vqgan.vqgan_fingerprint(ours)


def test_a_vqgan_in_bfloat16(tmp_path, tiny):
    tensors = {name: x.astype(ml_dtypes.bfloat16) for name, x in named_tensors(tiny).items()}
    (tmp_path / "p").write_bytes(pickle.dumps(tree(tensors)))
    for name, x in named_tensors(load_vqgan_pickle(tmp_path / "p", TINY)).items():
        assert np.array_equal(x, tensors[name].astype(np.float32))


def test_a_vqgan_with_other_tensors(tmp_path, tiny):
    tensors = named_tensors(tiny)
    del tensors["quantize/embeddings"]
    tensors["encoder/Extra_0/kernel"] = X
    tensors["quant_conv/bias"] = tensors["quant_conv/bias"][:-1]
    tensors["quant_conv/kernel"] = tensors["quant_conv/kernel"].astype(np.int32)
    (tmp_path / "p").write_bytes(pickle.dumps(tree(tensors)))
    with pytest.raises(ValueError, match="p does not fit its config") as caught:
        load_vqgan_pickle(tmp_path / "p", TINY)
    for fault in (
        "missing quantize/embeddings",
        "unknown encoder/Extra_0/kernel",
        "quant_conv/bias is (2,), not (3,)",
        "quant_conv/kernel is int32, not a float type",
    ):
        assert fault in str(caught.value)


def test_two_tensors_of_one_name(tmp_path, tiny):
    tensors = tree(named_tensors(tiny)) | {"quant_conv/bias": X}
    (tmp_path / "p").write_bytes(pickle.dumps(tensors))
    with pytest.raises(ValueError, match="two tensors of one name"):
        load_vqgan_pickle(tmp_path / "p", TINY)


def test_the_published_sizes_are_the_default(tmp_path, tiny):
    (tmp_path / "p").write_bytes(pickle.dumps(tree(named_tensors(tiny))))
    with pytest.raises(ValueError, match="missing .*and [0-9]+ more"):
        load_vqgan_pickle(tmp_path / "p")


def test_a_string_that_becomes_any_number_of_arrays(tmp_path):
    """Big-endian numbers are turned, each array in a copy of its own: 1 MB in the file, 4 GB of arrays."""
    assert read(tmp_path / "p", memo_bomb(1, 64))["a0"].shape == (16,)
    with pytest.raises(ValueError, match="makes more than 2[0-9]+ bytes of arrays, twice those of the file"):
        read(tmp_path / "p", memo_bomb(4000))


def test_more_opcodes_than_any_tree_needs(tmp_path):
    """A byte of the file makes a dict of 64."""
    with pytest.raises(ValueError, match="more than 1048576 opcodes"):
        read(tmp_path / "p", b"\x80\x04" + b"}" * (1 << 21) + b".")
