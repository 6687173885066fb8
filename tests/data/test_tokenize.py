"""`ringjax tokenize`: the same bytes for any number of workers, whole or not there at all."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from ringjax.data.config import DataConfig, SourceConfig
from ringjax.data.errors import DataError
from ringjax.data.loader import make_loader
from ringjax.data.records import META, RecordReader
from ringjax.data.tokenize import run_tokenize
from ringjax.data.tokenize_config import TokenizeConfig
from ringjax.data.tokenizers import ByteTokenizer
from ringjax.models.vqgan import VQGAN, VQGANConfig, encode_pictures, save_vqgan
from tests.data.helpers import captioned, write_jsonl

SMALL = VQGANConfig(
    resolution=16, hidden=8, multipliers=(1, 1, 1), res_blocks=1, z_channels=8, codes=32, code_dim=4, norm_groups=4
)  # fmt: skip


def contents(folder) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(Path(folder).iterdir())}


def tokenize(inputs, output, **options):
    inputs = (inputs,) if isinstance(inputs, str) else tuple(inputs)
    defaults = {"tokenizer": "bytes", "codes_per_frame": 4, "vision_codes": 100, "workers": 0, "progress": False}
    return run_tokenize(TokenizeConfig(inputs, str(output), **{**defaults, **options}))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Eight pictures and two clips with captions, and a small image tokenizer."""
    folder = tmp_path_factory.mktemp("pictures")
    rng, rows = np.random.default_rng(0), []
    for i in range(8):
        name = f"{i}." + ("png", "webp", "jpg")[i % 3]
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / name)
        rows.append({"file": name, "caption": f"noise {i}"})
    for i in range(2):
        frames = [Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(3 + i)]
        frames[0].save(folder / f"c{i}.webp", save_all=True, append_images=frames[1:], lossless=True)
        rows.append({"file": f"c{i}.webp", "caption": f"clip {i}"})
    write_jsonl(folder / "captions.jsonl", rows)
    save_vqgan(VQGAN(SMALL, nnx.Rngs(0)), folder / "vqgan.safetensors")
    return folder


def test_what_training_reads_is_what_the_lines_say(tmp_path):
    lines = write_jsonl(tmp_path / "a.jsonl", captioned(30))
    (tmp_path / "b.txt").write_text("A document.")
    report = tokenize([lines, str(tmp_path / "b.txt")], tmp_path / "set", examples_per_shard=8)
    assert report.examples == 31 and report.skipped == () and "31 examples" in str(report)
    sources = {
        "jsonl": (SourceConfig(lines), SourceConfig(str(tmp_path / "b.txt"))),
        "set": (SourceConfig(str(tmp_path / "set")),),
    }
    found = {}
    for name, chosen in sources.items():
        data = DataConfig(
            sources=chosen, tokenizer="bytes", codes_per_frame=4, vision_codes=100, epochs=1, shuffle=False,
            packing="pad", prefetch=0,
        )  # fmt: skip
        batches = list(make_loader(data, seq_len=128, batch_size=1))
        found[name] = sorted(b"".join(batch[key].tobytes() for key in sorted(batch)) for batch in batches)
    assert found["jsonl"] == found["set"]
    meta = json.loads((tmp_path / "set" / META).read_text())
    assert meta["examples"] == 31 and meta["tokens"] == report.tokens and len(meta["shards"]) == 4
    assert meta["tokenizer_fingerprint"] == "bytes"
    RecordReader(tmp_path / "set").verify()


def test_any_number_of_workers_makes_the_same_bytes(tmp_path, pictures):
    rows = captioned(20, codes_per_frame=16, vision_codes=32)
    rows[7]["caption"] = ""
    lines = write_jsonl(tmp_path / "a.jsonl", rows)
    made = []
    for workers in (0, 3):
        report = tokenize(
            [lines, str(pictures / "captions.jsonl")], tmp_path / f"set{workers}", workers=workers, on_error="skip",
            examples_per_shard=10, fields=("[vision],caption", "[caption],vision"),
            vision_tokenizer=str(pictures / "vqgan.safetensors"), vision_codes=32,
        )  # fmt: skip
        assert report.examples == 29 and len(report.skipped) == 1
        made.append(contents(report.folder))
    assert made[0] == made[1]


def test_pictures_and_clips_become_codes(tmp_path, pictures):
    report = tokenize(
        str(pictures / "captions.jsonl"), tmp_path / "set", fields="[vision],caption", vision_codes=32,
        vision_tokenizer=str(pictures / "vqgan.safetensors"), max_frames=3,
    )  # fmt: skip
    reader, model = RecordReader(report.folder), VQGAN(SMALL, nnx.Rngs(0))
    meta = reader.meta
    assert meta["codes_per_frame"] == 16 and meta["vision_tokenizer_fingerprint"]
    assert report.vision_tokens == (8 + 3 + 3) * 17
    picture = np.asarray(Image.open(pictures / "3.png"))
    example = reader[3]
    assert example.tokens[example.modality].tolist() == [*encode_pictures(model, picture[None]).ravel(), 33]
    assert ByteTokenizer().decode(example.tokens[example.loss]) == "noise 3"
    clip = reader[9].tokens[reader[9].modality].reshape(3, 17)
    assert clip[:, 16].tolist() == [32, 32, 33]


def test_bad_lines_stop_or_are_told(tmp_path, pictures):
    (tmp_path / "cut.png").write_bytes((pictures / "3.png").read_bytes()[:100])
    good = "good.png"
    (tmp_path / good).write_bytes((pictures / "0.png").read_bytes())
    rows = [
        {"file": good, "caption": "fine"},
        {"file": "nowhere.png", "caption": "a"},
        {"file": "cut.png", "caption": "a"},
        {"file": 3, "caption": "a"},
        {"file": good, "vision": [1] * 16, "caption": "a"},
        {"file": good, "caption": " "},
        {"file": good},
    ]
    lines = write_jsonl(tmp_path / "a.jsonl", rows)
    with open(lines, "a") as file:
        file.write('{"file": "a.pn')
    options = {"fields": "[vision],caption", "vision_tokenizer": str(pictures / "vqgan.safetensors")}
    report = tokenize(lines, tmp_path / "set", on_error="skip", **options)
    assert report.examples == 1
    faults = ["does not exist", "cannot be read", "must name a picture, not 3", "both 'file' and 'vision'",
              "field 'caption' is empty", "field 'caption' is missing", "not JSON"]  # fmt: skip
    assert len(report.skipped) == len(faults)
    for line, (fault, told) in enumerate(zip(faults, report.skipped), 2):
        assert f"a.jsonl line {line}: " in told and fault in told
    assert "7 lines skipped (skipped.txt names them), the first: " in str(report)
    assert (tmp_path / "set" / "skipped.txt").read_text().splitlines() == list(report.skipped)
    for workers in (0, 2):
        with pytest.raises(DataError, match="a.jsonl line 2: picture .*nowhere.png does not exist"):
            tokenize(lines, tmp_path / "none", workers=workers, examples_per_shard=2, **options)
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["a.jsonl", "cut.png", "good.png", "set"], "nothing is left behind"


def test_no_usable_line(tmp_path):
    lines = write_jsonl(tmp_path / "a.jsonl", [{"text": ""}])
    with pytest.raises(DataError, match="no line can be used; the first: .*line 1: field 'text' is empty"):
        tokenize(lines, tmp_path / "set", fields="text", on_error="skip")


def test_existing_folders_are_safe(tmp_path):
    lines = write_jsonl(tmp_path / "a.jsonl", captioned(3))
    tokenize(lines, tmp_path / "set")
    before = contents(tmp_path / "set")
    with pytest.raises(FileExistsError, match="set exists; give another output"):
        tokenize(lines, tmp_path / "set")
    bad = write_jsonl(tmp_path / "b.jsonl", [{"text": ""}])
    with pytest.raises(DataError):
        tokenize(bad, tmp_path / "set", overwrite=True, fields="text")
    assert contents(tmp_path / "set") == before
    tokenize(write_jsonl(tmp_path / "c.jsonl", captioned(5)), tmp_path / "set", overwrite=True)
    assert len(RecordReader(tmp_path / "set")) == 5
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="is no data set, so it is not overwritten"):
        tokenize(lines, tmp_path / "mine", overwrite=True)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    "options, error, fault",
    [
        ({"inputs": ()}, ValueError, "inputs is empty"),
        ({"output": ""}, ValueError, "output is empty"),
        ({"fields": "[a"}, ValueError, "never closed"),
        ({"fields": ("a", "[[b]]")}, ValueError, "do not pair"),
        ({"examples_per_shard": 0}, ValueError, "examples_per_shard 0 must be at least 1"),
        ({"workers": -1}, ValueError, "workers -1 must be at least 0"),
        ({"inputs": ("nowhere.jsonl",)}, FileNotFoundError, "nowhere.jsonl does not exist"),
        ({"inputs": ("nowhere.txt",)}, FileNotFoundError, "nowhere.txt does not exist"),
        ({"inputs": (__file__,)}, ValueError, "no known kind; give .jsonl or .txt"),
    ],
)
def test_wrong_use(tmp_path, options, error, fault):
    with pytest.raises(error, match=fault):
        run_tokenize(TokenizeConfig(**{"inputs": ("a",), "output": str(tmp_path / "set"), **options}))


def test_a_codebook_beyond_the_models_is_refused(tmp_path, pictures):
    with pytest.raises(ValueError, match="has 32 codes, more than vision_codes 16"):
        tokenize(
            str(pictures / "captions.jsonl"), tmp_path / "set", vision_codes=16,
            vision_tokenizer=str(pictures / "vqgan.safetensors"),
        )  # fmt: skip


@pytest.mark.parametrize("end", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL])
def test_an_interrupted_run_leaves_no_data_set(tmp_path, end):
    lines = write_jsonl(tmp_path / "a.jsonl", [{"fields": "text", "text": "word " * 20_000}] * 3000)
    program = tmp_path / "run.py"
    program.write_text(
        textwrap.dedent(f"""
        import signal
        from ringjax.data.tokenize import run_tokenize
        from ringjax.data.tokenize_config import TokenizeConfig
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
        if __name__ == "__main__":
            config = TokenizeConfig(({lines!r},), {str(tmp_path / "set")!r}, workers=1, examples_per_shard=10)
            run_tokenize(config)
        """)
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, str(program)], cwd=root, env={**os.environ, "PYTHONPATH": str(root)},
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.time() + 60
        while not list(tmp_path.glob(".set.unfinished-*/*.array_record")) and time.time() < deadline:
            time.sleep(0.05)
        assert process.poll() is None, "interrupted too late"
    finally:
        worker = _children(process.pid)
        if end == signal.SIGINT:
            os.killpg(process.pid, end)  # as a terminal does
        else:
            os.kill(process.pid, end)
        process.wait(timeout=60)
    assert process.returncode != 0 and not (tmp_path / "set").exists()
    if end == signal.SIGINT:
        assert not list(tmp_path.glob(".set*")), "it cleans up after itself"
    deadline = time.time() + 20
    while any(map(_alive, worker)) and time.time() < deadline:
        time.sleep(0.05)
    assert worker and not any(map(_alive, worker)), "workers end with their parent"


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
