"""LWM's weights from its own stream, asked in its own words on the command line."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from ringjax import cli
from ringjax.inference.lwm_stream import load_stream
from ringjax.inference.sampling import Sampling
from ringjax.interop.lwm import save_lwm
from ringjax.models import Transformer
from ringjax.models.sizes import get_size


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    config = dataclasses.replace(get_size("debug"), vocab_size=259, vision_vocab_size=8194, dtype="float32")
    model = Transformer(config, nnx.Rngs(0))
    path = tmp_path_factory.mktemp("lwm") / "lwm.msgpack"
    params = nnx.to_flat_state(nnx.state(model))
    arrays = ((place, lambda leaf=leaf: np.asarray(leaf.get_value())) for place, leaf in params)
    save_lwm(arrays, path, scanned=True, layers=config.layers)
    return path


def test_it_answers_as_lwm_is_asked(stream, capsys):
    asked = ["--prompt", "Why?", "--prompt_form", "lwm", "--tokenizer", "bytes", "--rope_theta", "5e7"]
    assert cli.main(["generate", str(stream), *asked, "--max_new_tokens", "4", "--temperature", "0"]) == 0
    said = capsys.readouterr().out
    run = load_stream(stream, tokenizer="bytes", rope_theta=5e7)
    assert run.model.config.rope_theta == 5e7 and run.data.codes_per_frame == 256
    (written,) = run.continue_text(["Why?"], max_new_tokens=4, sampling=Sampling(temperature=0))
    assert said == written.strip() + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rope_theta", "5e7"], "holds no tokenizer; name LWM's: --tokenizer tokenizer.model"),
        (["--tokenizer", "bytes"], "does not say RoPE's base; give it: --rope_theta 5e7"),
        (["--tokenizer", "bytes", "--rope_theta", "5e7", "--image", "a.png"], "name it: --image_tokenizer"),
    ],
)
def test_what_a_stream_does_not_say(stream, arguments, message, capsys):
    assert cli.main(["generate", str(stream), "--prompt", "a", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_options_of_streams_are_for_streams(capsys):
    assert cli.main(["generate", "/no/run", "--prompt", "a", "--rope_theta", "5e7"]) == 2
    assert "--rope_theta: /no/run is no LWM stream and has its own; leave it out" in capsys.readouterr().err
    assert cli.main(["generate", "/no/run.msgpack", "--prompt", "a", "--rope_theta", "5e7"]) == 1
    assert "no LWM stream at /no/run.msgpack" in capsys.readouterr().err
