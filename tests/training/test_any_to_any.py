"""The scripts and configs of the any-to-any models: what is tokenized is what is trained on."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ringjax.data.fields import parse
from ringjax.training.load import load_config

ROOT = Path(__file__).parents[2]
SCRIPT = (ROOT / "scripts" / "any_to_any.sh").read_text()


@pytest.mark.parametrize("name", ["any_to_any", "small_any_to_any"])
def test_the_config_reads_what_the_script_writes(name):
    made = set(re.findall(r"^ *tokenize (\w+) ", SCRIPT, re.MULTILINE))
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    for stage in config.stage_list:
        for source in (*stage.data.sources, *stage.data.heldout):
            folder = Path(source.path)
            assert folder.parent == Path("data") / name and folder.name in made
        assert stage.data.codes_per_frame == 64 and stage.data.vision_codes == stage.model.vision_codes == 1024
        assert stage.data.vision_tokenizer == f"data/{name}/vqgan.safetensors"
        assert stage.data.drop_captions == 0.1 and stage.data.bidirectional_frames


def test_every_spec_of_the_script_is_one():
    specs = re.findall(r"'([^']*\b(?:vision|caption)\b[^']*)'", re.sub(r"^ *#.*$", "", SCRIPT, flags=re.MULTILINE))
    specs = [spec for spec in specs if not spec.startswith("2,")]
    assert len(specs) > 15
    for spec in specs:
        named = {name for field in parse(spec) for name in field.names if not name.startswith('"')}
        assert named <= {"vision", "caption", "category"} and named


def test_the_small_models_config_fits_the_package():
    config = load_config(ROOT / "configs" / "small_any_to_any.yaml").model
    image_tokenizer = 3.8e6  # parameters of configs/vqgan_small.yaml, at most
    assert 2 * (config.parameter_count() + image_tokenizer) < 19.5e6, "bytes in bfloat16"


def test_books_become_pieces_and_captions_are_kept_aside(tmp_path):
    data = tmp_path / "data"
    for kind in ("images", "videos", "text"):
        (data / kind).mkdir(parents=True)
    lines = [f"Line {i} has quite a few words in it." for i in range(40)]
    for book in ("emma", "northanger_abbey"):
        (data / "text" / f"{book}.txt").write_text("\n".join(lines) + "\n\n\nThe end.\n")
    for kind in ("images", "videos"):
        rows = [{"file": f"{i}.webp", "caption": f"{kind} {i}"} for i in range(50)]
        (data / kind / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, str(ROOT / "scripts" / "any_to_any_data.py"), str(data), str(tmp_path / "out")]
    subprocess.run([*command, "--words", "30"], check=True, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin"})
    read = lambda name: [json.loads(line) for line in (tmp_path / "out" / name).read_text().splitlines()]  # noqa: E731
    pieces = [row["text"] for row in read("prose.jsonl")]
    assert " ".join(" ".join(pieces).split()) == " ".join([*lines, "The end."])
    assert all(30 <= len(piece.split()) <= 40 for piece in pieces[:-1])
    assert read("heldout_prose.jsonl") == read("prose.jsonl") and len(read("books.jsonl")) == 1
    taken = set(re.findall(r"^ *tokenize (\w+) ", SCRIPT, re.MULTILINE))
    assert not taken & {path.name for path in (tmp_path / "out").iterdir()}, "names of what is tokenized next"
    kept = read("heldout_images.jsonl")
    assert 0 < len(kept) < 20 and all((tmp_path / "out" / row["file"]).parent.samefile(data / "images") for row in kept)
