"""The fuzzer notices every fault, makes the same inputs again, and finds nothing in some inputs of every target.

The long runs are those of `python scripts/fuzz.py`; their results are in docs/results/fuzzing.md.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import faulty
from tests.fuzz.targets import TARGETS, learn_words
from tests.fuzz.worker import cases_of, input_number, run

ROOT = Path(__file__).parents[2]


def test_every_fault_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setenv("RINGJAX_FUZZ_SECONDS", "1")
    outcome = run("faulty", inputs=len(faulty.FAULTS), findings=tmp_path)
    assert (outcome.inputs, outcome.accepted, outcome.refused) == (len(faulty.FAULTS), 1, 1)
    expected = [(number, start) for number, start in enumerate(faulty.FAULTS.values()) if ":" in start]
    found = sorted((number, name) for name, number in outcome.examples.items())
    assert len(found) == len(expected)
    for (number, name), (wanted, start) in zip(found, expected):
        assert number == wanted and name.startswith(start), (name, start)
        assert (tmp_path / "faulty" / str(number) / "case" / "fault").is_file()


@pytest.mark.parametrize("name", ["jsonl", "config", "pickle", "template"])
def test_an_input_is_known_by_its_seed_and_number(name, tmp_path):
    target = TARGETS[name]
    cases = cases_of(target, tmp_path)
    learn_words(target, cases)
    some = [
        [input_number(target, cases, seed, number) for number in range(len(cases), len(cases) + 30)]
        for seed in (0, 0, 1)
    ]
    assert some[0] == some[1] != some[2]
    assert sum(case not in cases for case in some[0]) > 20


def test_some_inputs_of_every_target(tmp_path):
    command = [sys.executable, "-m", "tests.fuzz.smoke", str(tmp_path), "40", "0.15"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    lines = [line.split("\t") for line in ended.stdout.splitlines() if line.count("\t") == 4]
    assert [line[0] for line in lines] == list(TARGETS), ended.stderr[-3000:]
    assert {line[0]: line[4] for line in lines if line[4] != "{}"} == {}
    for name, inputs, accepted, refused, _ in lines:
        assert int(accepted) + int(refused) == int(inputs) >= 3, name
