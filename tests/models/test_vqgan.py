"""The image tokenizer: the published architecture, the quantizer, training, files, the shipped tokenizer."""

import importlib.util
import json
import re
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from ringjax.data import samples
from ringjax.models import vqgan
from ringjax.models.vqgan.files import HEADER_KEY, named_tensors

# Of the shipped file; scripts/train_digit_tokenizer.py prints it.
FINGERPRINT = "76f29006d1560b0f876b3f5c10cddb345e7c3211b4badf406c18abda8d99d234"

TINY = vqgan.VQGANConfig(
    resolution=8, channels=1, hidden=4, multipliers=(1, 2), res_blocks=1, z_channels=4, codes=16, code_dim=3,
    norm_groups=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    return vqgan.VQGAN(TINY, nnx.Rngs(0))


@pytest.fixture(scope="module")
def shipped():
    return vqgan.load_vqgan(samples.path("digits_vqgan.safetensors"))


@pytest.fixture(scope="module")
def heldout_codes(shipped):
    return vqgan.encode_pictures(shipped, samples.digits("heldout").images)


@cache
def shapes(config):
    state = nnx.state(vqgan.VQGAN.abstract(config))
    return {vqgan.published_name(path): value.shape for path, value in nnx.to_flat_state(state)}


# --- architecture ---------------------------------------------------------------------------------------------------


def test_lwm_has_the_published_tensors():
    tensors = shapes(vqgan.LWM)
    assert len(tensors) == 277
    assert sum(int(np.prod(shape)) for shape in tensors.values()) == 146_244_675
    assert (vqgan.LWM.grid, vqgan.LWM.codes_per_picture, vqgan.LWM.downscale) == (16, 256, 16)


@pytest.mark.parametrize(
    "name, shape",
    [
        ("quantize/embeddings", (8192, 64)),
        ("quant_conv/kernel", (1, 1, 64, 64)),
        ("post_quant_conv/bias", (64,)),
        ("encoder/Conv_0/kernel", (3, 3, 3, 128)),
        ("encoder/Conv_1/kernel", (3, 3, 768, 64)),
        ("encoder/GroupNorm_0/scale", (768,)),
        ("encoder/DownsamplingBlock_1/ResnetBlock_0/Conv_2/kernel", (1, 1, 128, 256)),
        ("encoder/DownsamplingBlock_3/ResnetBlock_1/GroupNorm_1/bias", (512,)),
        ("encoder/DownsamplingBlock_0/Downsample_0/Conv_0/kernel", (3, 3, 128, 128)),
        ("encoder/MidBlock_0/ResnetBlock_1/Conv_1/kernel", (3, 3, 768, 768)),
        ("decoder/Conv_0/kernel", (3, 3, 64, 768)),
        ("decoder/Conv_1/kernel", (3, 3, 128, 3)),
        ("decoder/UpsamplingBlock_1/ResnetBlock_0/Conv_2/kernel", (1, 1, 768, 512)),
        ("decoder/UpsamplingBlock_4/ResnetBlock_2/Conv_0/kernel", (3, 3, 128, 128)),
        ("decoder/UpsamplingBlock_3/Upsample_0/Conv_0/bias", (256,)),
    ],
)
def test_lwm_names(name, shape):
    assert shapes(vqgan.LWM)[name] == shape


def test_lwm_names_that_must_not_exist():
    names = shapes(vqgan.LWM)
    # The deepest encoder level and the finest decoder level keep their resolution; equal widths need no shortcut.
    for absent in (
        "encoder/DownsamplingBlock_4/Downsample_0/Conv_0/kernel",
        "decoder/UpsamplingBlock_4/Upsample_0/Conv_0/kernel",
        "encoder/DownsamplingBlock_2/ResnetBlock_0/Conv_2/kernel",
        "encoder/DownsamplingBlock_0/ResnetBlock_2/Conv_0/kernel",
    ):
        assert absent not in names


def test_lwm_encodes_and_decodes_abstractly():
    model = vqgan.VQGAN.abstract(vqgan.LWM)
    pixels = jax.ShapeDtypeStruct((2, 256, 256, 3), jnp.float32)
    codes = nnx.eval_shape(lambda model, pixels: model.encode(pixels), model, pixels)
    assert (codes.shape, codes.dtype) == ((2, 16, 16), jnp.int32)
    assert nnx.eval_shape(lambda model, codes: model.decode(codes), model, codes).shape == (2, 256, 256, 3)


def test_downsample_pads_below_and_right():
    """By the definition: a zero row and column at the end, then 3×3 windows at stride 2."""
    down = vqgan.layers.Downsample(1, nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(1, 4, 4, 1)).astype(np.float32)
    padded = np.pad(x[0, :, :, 0], ((0, 1), (0, 1)))
    kernel = np.asarray(down.conv.kernel[...])[:, :, 0, 0]
    expected = [[(padded[i : i + 3, j : j + 3] * kernel).sum() for j in (0, 2)] for i in (0, 2)]
    np.testing.assert_allclose(down(x)[0, :, :, 0], expected, atol=1e-5)


def test_upsample_repeats_pixels():
    up = vqgan.layers.Upsample(1, nnx.Rngs(0))
    up.conv.kernel[...] = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
    x = np.arange(4, dtype=np.float32).reshape(1, 2, 2, 1)
    np.testing.assert_array_equal(up(x)[0, :, :, 0], np.kron(x[0, :, :, 0], np.ones((2, 2))))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"resolution": 30}, "resolution 30 is not divisible by 8"),
        ({"hidden": 0}, "hidden 0 must be an int from 1"),
        ({"codes": 2.5}, "codes 2.5 must be an int"),
        ({"codes": True}, "codes True must be an int"),
        ({"multipliers": "122"}, "multipliers '122' must be a list"),
        ({"multipliers": [1, -2]}, "multipliers -2 must be an int"),
        ({"norm_groups": 3}, "hidden 8 · multiplier 1 is not divisible by norm_groups 3"),
        ({"codes": 1 << 40}, "must be an int from 1 to 1048576"),
    ],
)
def test_bad_config(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(vqgan.DIGITS, **change)


# --- quantizer ------------------------------------------------------------------------------------------------------


def test_nearest_code_is_the_nearest():
    rng = np.random.default_rng(0)
    latents, codebook = rng.normal(size=(2, 5, 7, 6)), rng.normal(size=(40, 6))
    distances = ((latents[..., None, :] - codebook) ** 2).sum(-1)
    np.testing.assert_array_equal(vqgan.nearest_code(jnp.asarray(latents), jnp.asarray(codebook)), distances.argmin(-1))


def test_gradient_passes_straight_through(tiny):
    latents, entries = jnp.ones((4, 3)), jnp.full((4, 3), 5.0)
    weights = jnp.arange(12.0).reshape(4, 3)
    value, grads = jax.value_and_grad(lambda z, e: jnp.sum(weights * vqgan.straight_through(z, e)), (0, 1))(
        latents, entries
    )
    assert value == jnp.sum(weights * 5)
    np.testing.assert_array_equal(grads[0], weights)
    np.testing.assert_array_equal(grads[1], 0)


def test_losses_train_the_parts_they_should(tiny):
    graph, state = nnx.split(tiny)
    pixels = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 1)), jnp.float32)

    def losses(state):
        out = nnx.merge(graph, state)(pixels)
        return jnp.stack([jnp.mean((out.pixels - pixels) ** 2), out.commitment_loss, out.codebook_loss])

    grads = jax.jit(jax.jacrev(losses))(state)
    moved = lambda part, loss: any(np.any(leaf[loss]) for leaf in jax.tree.leaves(grads[part]))  # noqa: E731
    trained = {part: [moved(part, loss) for loss in range(3)] for part in grads}
    assert trained["decoder"] == trained["post_quant_conv"] == [True, False, False]
    assert trained["encoder"] == trained["quant_conv"] == [True, True, False]
    assert trained["codebook"] == [False, False, True]


def test_codebook_moves_to_the_mean_of_its_latents():
    codebook = jnp.array([[0.0, 0.0], [10.0, 10.0]])
    latents = jnp.array([[1.0, 1.0], [3.0, 1.0], [9.0, 9.0], [9.0, 11.0]])
    averages = vqgan.CodebookAverages.start(codebook)
    update = jax.jit(partial(vqgan.update_codebook, decay=0.8))
    for step in range(60):
        codes = vqgan.nearest_code(latents, codebook)
        averages, codebook = update(averages, latents, codes, jax.random.key(step))
    np.testing.assert_allclose(codebook, [[2, 1], [9, 10]], atol=1e-3)


def test_dead_codes_come_back_to_life():
    latents = jax.random.normal(jax.random.key(0), (64, 2))
    codebook = jnp.concatenate([jnp.zeros((1, 2)), jnp.full((15, 2), 100.0)])  # one code takes everything
    averages = vqgan.CodebookAverages.start(codebook)
    update = jax.jit(partial(vqgan.update_codebook, decay=0.9))
    for step in range(100):
        codes = vqgan.nearest_code(latents, codebook)
        averages, codebook = update(averages, latents, codes, jax.random.key(step))
    assert len(np.unique(vqgan.nearest_code(latents, codebook))) >= 14
    assert np.all(np.isfinite(codebook)) and float(jnp.abs(codebook).max()) < 10


def test_training_with_the_codebook_loss_learns():
    """The gradient variant, without moving averages: the error falls to less than a third."""
    model = vqgan.VQGAN(TINY, nnx.Rngs(0))
    graph, state = nnx.split(model)
    optimizer = optax.adam(1e-2)
    pixels = jnp.repeat(jnp.repeat(jnp.sign(jax.random.normal(jax.random.key(1), (16, 2, 2, 1))), 4, 1), 4, 2)

    def loss_fn(state):
        out = nnx.merge(graph, state)(pixels)
        error = jnp.mean((out.pixels - pixels) ** 2)
        return error + 0.25 * out.commitment_loss + out.codebook_loss, error

    @jax.jit
    def step(state, opt_state):
        grads, error = jax.grad(loss_fn, has_aux=True)(state)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(state, updates), opt_state, error

    opt_state, errors = optimizer.init(state), []
    for _ in range(150):
        state, opt_state, error = step(state, opt_state)
        errors.append(float(error))
    assert errors[-1] < errors[0] / 3


# --- pictures -------------------------------------------------------------------------------------------------------


def test_pixels_and_back():
    pictures = np.random.default_rng(0).integers(0, 256, (3, 28, 28), np.uint8)
    pixels = vqgan.to_pixels(pictures, 32)
    assert pixels.shape == (3, 32, 32, 1) and pixels.dtype == np.float32
    assert (pixels[:, :2] == -1).all() and pixels.max() <= 1
    np.testing.assert_array_equal(vqgan.to_uint8(pixels, 28), pictures)
    colour = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    np.testing.assert_array_equal(vqgan.to_uint8(vqgan.to_pixels(colour, 8)), colour)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_batches_change_nothing(tiny, count):
    pictures = np.random.default_rng(0).integers(0, 256, (count, 8, 8), np.uint8)
    codes = vqgan.encode_pictures(tiny, pictures, batch_size=2)
    assert codes.shape == (count, 4, 4)
    drawn = vqgan.decode_pictures(tiny, codes, batch_size=2)
    assert drawn.shape == (count, 8, 8) and drawn.dtype == np.uint8
    if count:
        np.testing.assert_array_equal(codes, vqgan.encode_pictures(tiny, pictures, batch_size=5))
        np.testing.assert_array_equal(codes[:1], tiny.encode(jnp.asarray(vqgan.to_pixels(pictures[:1], 8))))


def test_bad_pictures_and_codes(tiny):
    with pytest.raises(ValueError, match=r"pictures of 9 × 8 are larger than resolution 8; resize them first"):
        vqgan.encode_pictures(tiny, np.zeros((1, 9, 8), np.uint8))
    with pytest.raises(ValueError, match=r"pictures are float64 of shape \(1, 8, 8\); give uint8"):
        vqgan.encode_pictures(tiny, np.zeros((1, 8, 8)))
    with pytest.raises(ValueError, match=r"pixels of shape \(1, 8, 8, 3\) do not fit this VQGAN"):
        vqgan.encode_pictures(tiny, np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"codes from 0 to 16 are not all in 0 … 15"):
        vqgan.decode_pictures(tiny, np.arange(32).reshape(2, 4, 4) % 17)
    with pytest.raises(ValueError, match=r"codes of shape \(1, 3, 4\), type int32: give integers \[B, 4, 4\]"):
        tiny.decode(jnp.zeros((1, 3, 4), jnp.int32))


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tiny, tmp_path):
    vqgan.save_vqgan(tiny, tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def header(config=TINY):
    return {HEADER_KEY: json.dumps(asdict(config))}


def test_files_keep_everything(tiny, saved):
    loaded = vqgan.load_vqgan(saved)
    assert loaded.config == TINY
    assert vqgan.vqgan_fingerprint(loaded) == vqgan.vqgan_fingerprint(tiny)
    pictures = np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8)
    np.testing.assert_array_equal(vqgan.encode_pictures(loaded, pictures), vqgan.encode_pictures(tiny, pictures))
    assert [file.name for file in saved.parent.iterdir()] == [saved.name]


def test_fingerprint_sees_one_changed_weight(tiny, saved):
    tensors = load_file(saved)
    tensors["decoder/Conv_0/bias"] = tensors["decoder/Conv_0/bias"] + np.float32(1e-6)
    save_file(tensors, saved, metadata=header())
    assert vqgan.vqgan_fingerprint(vqgan.load_vqgan(saved)) != vqgan.vqgan_fingerprint(tiny)


def test_wrong_tensors_are_listed(saved):
    tensors = load_file(saved)
    del tensors["quant_conv/bias"]
    tensors["quant_conv/extra"] = np.zeros(3, np.float32)
    tensors["quantize/embeddings"] = np.zeros((16, 4), np.float32)
    tensors["encoder/Conv_0/bias"] = tensors["encoder/Conv_0/bias"].astype(np.float64)
    save_file(tensors, saved, metadata=header())
    with pytest.raises(ValueError) as error:
        vqgan.load_vqgan(saved)
    message = str(error.value)
    assert "missing quant_conv/bias" in message and "unknown quant_conv/extra" in message
    assert "quantize/embeddings is (16, 4), not (16, 3)" in message
    assert "encoder/Conv_0/bias is F64, not F32, BF16 or F16" in message
    assert "\n" not in message


def test_config_of_another_size_is_refused(tiny, saved):
    save_file(named_tensors(tiny), saved, metadata=header(replace(TINY, multipliers=(1, 2, 2), hidden=8)))
    with pytest.raises(ValueError, match=r"does not fit its config: missing .*; and \d+ more"):
        vqgan.load_vqgan(saved)


@pytest.mark.parametrize("kept", [0, 7, 100, 0.5, -1])
def test_cut_file(saved, kept):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match="tiny.safetensors is not a whole safetensors file") as error:
        vqgan.load_vqgan(saved)
    assert "\n" not in str(error.value)


def test_other_files_are_refused(tiny, tmp_path):
    path = tmp_path / "other"
    with pytest.raises(FileNotFoundError, match="no image tokenizer at .*other"):
        vqgan.load_vqgan(path)
    path.write_bytes(b"\x80\x04not weights at all, but long enough to hold a length")
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        vqgan.load_vqgan(path)
    save_file({"a": np.zeros(2, np.float32)}, path)
    with pytest.raises(ValueError, match="holds no ringjax VQGAN: its header has no"):
        vqgan.load_vqgan(path)


@pytest.mark.parametrize(
    "text, reason",
    [("{", "Expecting"), ("[]", "mapping"), ('{"colour": 3}', "colour"), ('{"hidden": -1}', "hidden -1 must be")],
)
def test_bad_header(tiny, tmp_path, text, reason):
    save_file(named_tensors(tiny), tmp_path / "bad", metadata={HEADER_KEY: text})
    with pytest.raises(ValueError, match=f"the VQGAN config in the header is not usable .*{reason}"):
        vqgan.load_vqgan(tmp_path / "bad")


# --- the shipped tokenizer ------------------------------------------------------------------------------------------


def test_shipped_tokenizer_is_the_recorded_one(shipped):
    assert shipped.config == vqgan.DIGITS
    assert vqgan.vqgan_fingerprint(shipped) == FINGERPRINT
    assert shipped.config.codes_per_picture == 16


def test_shipped_tokenizer_reconstructs_heldout_digits(shipped, heldout_codes):
    real = samples.digits("heldout").images
    drawn = vqgan.decode_pictures(shipped, heldout_codes, size=28)
    error = ((drawn.astype(np.float64) - real) ** 2).mean(axis=(1, 2))
    assert np.mean(10 * np.log10(255**2 / error)) > 21.0  # dB; see the table in samples/README.md
    assert len(np.unique(heldout_codes)) >= 0.9 * shipped.config.codes


def test_reconstructed_digits_are_recognised(shipped, heldout_codes):
    svm = pytest.importorskip("sklearn.svm")
    train, heldout = samples.digits("train"), samples.digits("heldout")
    classifier = svm.SVC(C=10, gamma=0.025).fit(train.images.reshape(-1, 784) / 255, train.labels)
    drawn = vqgan.decode_pictures(shipped, heldout_codes, size=28)
    assert np.mean(classifier.predict(drawn.reshape(-1, 784) / 255) == heldout.labels) >= 0.97


@pytest.mark.slow
def test_training_script_runs_and_repeats_itself(monkeypatch, capsys):
    """Three steps of a smaller network, twice: the same weights to the bit."""
    scripts = Path(__file__).parents[2] / "scripts"
    monkeypatch.syspath_prepend(str(scripts))
    spec = importlib.util.spec_from_file_location("train_digit_tokenizer", scripts / "train_digit_tokenizer.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    config = replace(vqgan.DIGITS, hidden=4, multipliers=(1, 1, 1, 2), norm_groups=2)
    first, second = (script.train(config, steps=3, batch_size=8, learning_rate=1e-3, seed=0) for _ in range(2))
    assert vqgan.vqgan_fingerprint(first) == vqgan.vqgan_fingerprint(second)
    assert vqgan.vqgan_fingerprint(first) != vqgan.vqgan_fingerprint(vqgan.VQGAN(config, nnx.Rngs(0)))
    script.report(first)
    assert "recognised, reconstructed" in capsys.readouterr().out
