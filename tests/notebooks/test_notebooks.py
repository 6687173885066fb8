"""Every notebook runs from top to bottom, and its two files (percent script and .ipynb) say the same.

After a change to the script: `jupytext --sync notebooks/NAME.py`, then run the .ipynb and save its outputs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
SCRIPTS = sorted(FOLDER.glob("*.py"))


def by_name(paths):
    return pytest.mark.parametrize("script", paths, ids=[path.stem for path in paths])


def test_there_is_a_notebook():
    assert FOLDER / "ring_attention.py" in SCRIPTS


@by_name(SCRIPTS)
def test_both_files_hold_the_same_cells(script):
    ours, paired = (jupytext.read(path) for path in (script, script.with_suffix(".ipynb")))
    assert [(cell.cell_type, cell.source) for cell in ours.cells] == [
        (cell.cell_type, cell.source) for cell in paired.cells
    ]


@by_name(SCRIPTS)
def test_saved_outputs_are_small_whole_and_of_no_particular_machine(script):
    path = script.with_suffix(".ipynb")
    assert path.stat().st_size <= 600 * 1024
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 4


@by_name(SCRIPTS)
def test_it_runs_from_top_to_bottom(script, tmp_path):
    environment = {**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": str(FOLDER.parent)}
    ran = subprocess.run(
        [sys.executable, "-W", "error", str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "7 rotations in the program" in ran.stdout or script.stem != "ring_attention"
