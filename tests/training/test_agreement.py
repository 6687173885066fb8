"""What must be the same on all processes is compared before the first step, and who differs is named."""

import dataclasses
import os

import pytest

from ringjax.training import agreement
from ringjax.training.load import parse_config
from tests.training.runs import CONFIG, cluster, finish, start


def statements(*facts):
    return [{"host": f"host{i}", "facts": found} for i, found in enumerate(facts)]


def test_those_that_agree_go_on():
    assert agreement.verdict("data", statements({"a": "1"}, {"a": "1"})) == []


def test_the_one_that_differs_from_most_is_named():
    first, line = agreement.verdict("versions", statements(*[{"jax": v, "x": "1"} for v in ("2", "1", "1", "1")]))
    assert first == "the 4 processes cannot begin together (versions): no step was made"
    assert line == "process 0 on host0: jax is 2, and 1 on 3 others"


def test_of_two_the_second_is_named_with_what_it_lacks():
    _, line = agreement.verdict("versions", statements({"jax": "1", "libtpu": "3"}, {"jax": "1"}))
    assert line == "process 1 on host1: libtpu is not there, and 3 in process 0 on host0"


def test_a_problem_of_one_process_comes_before_what_differs():
    found = [{"host": "a", "facts": {"x": "1"}}, {"host": "b", "problem": "data file x does not exist"}]
    assert agreement.verdict("data", found)[1:] == ["process 1 on b: data file x does not exist"]


def test_many_lines_are_cut():
    lines = agreement.verdict("data", statements(*[{f"{i}": str(i * p) for i in range(1, 40)} for p in (1, 2)]))
    assert len(lines) == 14 and lines[-1] == "and 27 more lines like these"


def test_a_process_alone_only_sees_its_own_errors():
    def broken():
        raise FileNotFoundError("no data")

    with pytest.raises(FileNotFoundError, match="no data"):
        agreement.require_same("data", broken)


def test_settings_are_named_as_in_the_config_and_leave_out_what_is_each_process_own():
    config = parse_config(CONFIG)
    found = agreement.settings(config)
    assert found["config training.seq_len"] == "32" and found["config data.sources.0.path"] == "sample:prose"
    assert not any("distributed" in name for name in found)
    longer = dataclasses.replace(config, training=dataclasses.replace(config.training, seq_len=64))
    assert {n for n, v in agreement.settings(longer).items() if found[n] != v} == {"config training.seq_len"}


def test_flags_that_name_files_of_a_host_may_differ(monkeypatch):
    monkeypatch.setitem(os.environ, "XLA_FLAGS", "--xla_b=2 --xla_dump_to=/tmp/x --xla_a=1")
    assert agreement.software()["XLA_FLAGS"] == "--xla_a=1 --xla_b=2"


def test_every_kind_of_task_names_its_data(tmp_path):
    from ringjax.training.tasks import make_tasks

    (task,) = make_tasks(parse_config(CONFIG))
    found = task.data_facts()
    assert {name.split(" (")[0] for name in found} == {"tokenizer sample", "train data 0", "heldout data 0"}
    assert all(len(value) >= 8 for value in found.values())


@pytest.mark.slow
def test_a_host_with_other_data_stops_all_and_is_named(tmp_path):
    """Two of three processes (their own folders stand for hosts) read the same lines, one reads others."""
    config = CONFIG.replace("sample:prose", "data.jsonl").replace("eval_every: 8", "eval_every: 0")
    processes = []
    for i, variables in enumerate(cluster(3)):
        folder = tmp_path / f"host{i}"
        folder.mkdir()
        last = "changed" if i == 2 else "same"
        (folder / "data.jsonl").write_text("".join(f'{{"fields": "text", "text": "{w}"}}\n' for w in ("one", last)))
        options = ("--mesh.simulated_devices", "1", "--mesh.shape", "1,1,1,3", "--training.seq_len", "48")
        cache, run = tmp_path / f"cache{i}", tmp_path / "run"
        processes.append(
            start(run, *options, cache=cache, config=config, cwd=folder, PYTHONPATH=os.getcwd(), **variables)
        )
    for process in processes:
        printed = finish(process, code=2)
        assert "the 3 processes cannot begin together (data): no step was made" in printed
        assert "process 2 on" in printed and "train data 0 (data.jsonl) is" in printed
        assert "process 0 on" not in printed and "process 1 on" not in printed
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_host_that_lacks_devices_is_named(tmp_path):
    """Not hung: what differs is in no config, and the devices' own exchange does not mind."""
    processes = [
        start(tmp_path / "run", "--mesh.simulated_devices", "0", "--mesh.shape", "1,1,1,-1", cache=tmp_path,
              JAX_NUM_CPU_DEVICES=str(2 - i), **variables)
        for i, variables in enumerate(cluster(2))
    ]  # fmt: skip
    for process in processes:
        printed = finish(process, code=2)
        assert "cannot begin together (devices)" in printed
        assert "devices is 1 × cpu, and 2 × cpu in process 0" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    "option, said",
    [
        (("--optimizer.learning_rate", "0.5"), "process 1 on {}: config optimizer.learning_rate is 0.5, and 0.01 in"),
        (("--mesh.simulated_devices", "2"), "config mesh.simulated_devices is 2, and 1 in process 0"),
    ],
    ids=["config", "devices"],
)
def test_another_config_is_named_before_the_devices_start(tmp_path, option, said):
    import socket

    processes = [
        start(tmp_path / "run", "--mesh.simulated_devices", "1", *(option if i else ()), cache=tmp_path, **variables)
        for i, variables in enumerate(cluster(2))
    ]
    for process in processes:
        assert said.format(socket.gethostname()) in finish(process, code=2)
