"""What each kind of cluster is given is run here by stand-ins for it: every word arrives as it was written."""

import base64
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.training.runs import CONFIG, curve, finish, free_port, start

FOLDER = Path(__file__).parents[2] / "scripts" / "launch"
WORDS = ["plain", "two words", "", "$(touch broken)", "`touch broken`", "'; touch broken; '", '"', "a\nb", "$HOME",
         "$$", "$(JAX_PROCESS_ID)", "-x", "#", "*", "\\", "ü", "!!"]  # fmt: skip
SECTIONS = {
    "slurm": {"hosts": 2, "gpus_per_host": 4, "partition": "gpu", "time": "1-00:00:00", "options": ["--exclusive"]},
    "gke": {"image": "a/b:1", "accelerator": "nvidia-h100-80gb", "hosts": 2, "devices_per_host": 8, "queue": "q"},
    "xpk": {"cluster": "c", "tpu_type": "v5p-128", "image": "a/b:1"},
    "tpu_vm": {"name": "slice", "zone": "us-east5-a"},
    "skypilot": {"hosts": 3, "accelerators": "H100:8", "infra": "gcp", "cluster": "rings"},
    "ssh": {"hosts": ["me@a", "b"]},
}
TARGETS = sorted(SECTIONS)


@pytest.fixture(scope="module")
def modules():
    """config and targets, as launch.py imports them."""
    names = ("config", "targets", "together")
    sys.path.insert(0, str(FOLDER))
    try:
        import config
        import targets

        yield config, targets
    finally:
        sys.path.remove(str(FOLDER))
        for name in names:
            sys.modules.pop(name, None)


def content(folder: Path, **changes) -> dict:
    folder.mkdir(exist_ok=True)
    show = f"import os, sys; print(repr((sys.argv[1:], os.getcwd(), os.environ['ODD'], {VARIABLES})))"
    return {
        "name": "job", "command": [sys.executable, "-c", show, *WORDS], "workdir": str(folder),
        "setup": "before=1\nexport SEEN=$before", "env": {"ODD": "$(touch broken) 'x'"}, **SECTIONS, **changes,
    }  # fmt: skip


VARIABLES = "[os.environ.get(n) for n in ('SEEN', 'JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')]"


def written(path: Path, content: dict) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def launch(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess:
    environment = os.environ | ({} if path is None else {"PATH": path})
    return subprocess.run(
        [sys.executable, str(FOLDER / "launch.py"), *arguments], capture_output=True, text=True, env=environment
    )


def run(command: list[str], **environment: str) -> str:
    """What it printed, run without any variable of this process but PATH."""
    found = subprocess.run(
        command, capture_output=True, text=True, env={"PATH": os.environ["PATH"], "PYTHONUTF8": "1", **environment}
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def arrived(printed: str, folder: Path, *variables: str | None) -> None:
    assert eval(printed) == (WORDS, str(folder), "$(touch broken) 'x'", ["1", *(variables or (None,) * 3)])
    assert not (folder / "broken").exists()


@pytest.fixture
def odd(tmp_path):
    """A folder whose name a shell would take apart."""
    return tmp_path / "it's $(here) & \"there\""


def test_slurm_starts_a_process_for_each_gpu(modules, odd, tmp_path):
    config, targets = modules
    rendered = targets.render(config.read(written(tmp_path / "f.yaml", content(odd))), "slurm")
    script = rendered.files["job.sbatch"]
    assert rendered.commands == [["sbatch", "job.sbatch"]]
    options = re.findall(r"^#SBATCH (.*)$", script, re.M)
    assert {"--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--partition=gpu", "--exclusive"} <= set(options)
    assert script.startswith("#!/bin/bash\n#SBATCH")  # nothing before the options: sbatch stops reading there
    flags = "--kill-on-bad-exit=0 --wait=0"
    (tmp_path / "srun").write_text(f'#!/bin/bash\n[ "$1 $2" = "{flags}" ] && shift 2 && exec "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    arrived(run(["bash", "-c", script], PATH=f"{tmp_path}:{os.environ['PATH']}"), odd)


def test_a_jobset_of_gpus_says_who_each_pod_is(modules, odd, tmp_path):
    config, targets = modules
    rendered = targets.render(config.read(written(tmp_path / "f.yaml", content(odd))), "gke")
    found = yaml.safe_load(rendered.files["job.yaml"])
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert found["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "q"}
    (job,) = found["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (job["replicas"], spec["parallelism"], spec["completions"], spec["completionMode"]) == (1, 2, 2, "Indexed")
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    env = {entry["name"]: entry for entry in container["env"]}
    assert env["JAX_COORDINATOR_ADDRESS"]["value"] == "job-hosts-0-0.job:8476"
    assert env["JAX_NUM_PROCESSES"]["value"] == "2" and "fieldRef" in env["JAX_PROCESS_ID"]["valueFrom"]
    arrived(run([word.replace("$$", "$") for word in container["command"]]), odd)  # as the kubelet does


def test_a_jobset_of_tpus_names_the_slice_and_leaves_the_rest_to_jax(modules, tmp_path):
    config, targets = modules
    section = {"image": "a", "accelerator": "tpu-v5p-slice", "topology": "4x4x4", "hosts": 16, "devices_per_host": 4}
    changed = content(tmp_path / "w", gke={**section, "slices": 2})
    found = yaml.safe_load(
        targets.render(config.read(written(tmp_path / "f.yaml", changed)), "gke").files["job.yaml"]
    )
    (job,) = found["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    assert job["replicas"] == 2 and pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4x4"
    assert pod["containers"][0]["env"] == [] and pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert "exclusive-topology" in str(found["metadata"]["annotations"])


def test_xpk_and_gcloud_take_the_lines_as_one_word(modules, odd, tmp_path):
    config, targets = modules
    read = config.read(written(tmp_path / "f.yaml", content(odd)))
    (words,) = targets.render(read, "xpk").commands
    assert words[:3] == ["xpk", "workload", "create"] and "--tpu-type=v5p-128" in words
    command = words[-1].removeprefix("--command=")
    assert re.fullmatch(r"echo [A-Za-z0-9+/=]+ \| base64 -d \| bash", command)
    assert base64.b64decode(command.split()[1]).decode() == targets.render(read, "xpk").packed
    arrived(run(["sh", "-c", command]), odd)
    (words,) = targets.render(read, "tpu_vm").commands
    assert words[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "slice"] and "--worker=all" in words
    arrived(run(["sh", "-c", words[-1].removeprefix("--command=")]), odd)


def test_skypilot_turns_its_own_variables_into_those_of_jax(modules, odd, tmp_path):
    config, targets = modules
    rendered = targets.render(config.read(written(tmp_path / "f.yaml", content(odd))), "skypilot")
    task = yaml.safe_load(rendered.files["job.sky.yaml"])
    assert task["num_nodes"] == 3 and task["resources"] == {"accelerators": "H100:8", "infra": "gcp"}
    assert rendered.commands == [["sky", "launch", "-c", "rings", "job.sky.yaml"]]
    node = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "3", "SKYPILOT_NODE_RANK": "1"}
    arrived(run(["bash", "-c", task["run"]], **node), odd, "10.0.0.1:8476", "3", "1")


def test_ssh_tells_each_host_who_it_is(modules, odd, tmp_path):
    config, targets = modules
    rendered = targets.render(config.read(written(tmp_path / "f.yaml", content(odd))), "ssh")
    assert rendered.together
    for index, (words, host) in enumerate(zip(rendered.commands, ["me@a", "b"], strict=True)):
        assert words[:-1] == ["ssh", "-tt", "--", host]
        arrived(run(["sh", "-c", words[-1]]), odd, "a:8476", "2", str(index))


@pytest.mark.parametrize("target", TARGETS)
def test_a_dry_run_runs_nothing(target, tmp_path):
    path = written(tmp_path / "f.yaml", content(tmp_path / "w"))
    done = launch(target, str(path), "--dry-run", "--folder", str(tmp_path / "out"), path="/nowhere")
    assert done.returncode == 0 and "# ---- runs" in done.stdout and not (tmp_path / "out").exists()
    assert "touch broken" in done.stdout  # all that would run is shown


def test_the_example_is_read_for_every_target(modules):
    config, targets = modules
    found = config.read(FOLDER / "example.yaml")
    for target in TARGETS:
        assert targets.render(found, target).commands


@pytest.mark.parametrize(
    "change, said",
    [
        ({"comand": ["x"]}, "comand: is unknown"),
        ({"slurm": {"hosts": 2, "gpus_per_host": 4, "nodes": 2}}, "slurm.nodes: is unknown"),
        ({"slurm": {"hosts": 2, "gpus_per_host": 4, "options": ["--x\n#SBATCH --y"]}}, "one line"),
        ({"slurm": {"hosts": "2", "gpus_per_host": 4}}, "slurm.hosts: Input should be a valid integer"),
        ({"slurm": {"hosts": 0, "gpus_per_host": 4}}, "greater than or equal to 1"),
        ({"ssh": {"hosts": ["-oProxyCommand=touch broken"]}}, "is no host"),
        ({"ssh": {"hosts": ["a;b"]}}, "is no host"),
        ({"tpu_vm": {"name": "--quiet", "zone": "z"}}, "must begin with a letter or digit"),
        ({"name": "Job_1"}, "a-z, 0-9 and -"),
        ({"name": "a\n#SBATCH --x"}, "a-z, 0-9 and -"),
        ({"env": {"A B": "x"}}, "is no name of a variable"),
        ({"env": {"JAX_PROCESS_ID": "0"}}, "differs from host to host"),
        ({"command": []}, "at least 1 item"),
        ({"command": "ringjax train"}, "should be a valid list"),
        ({"gke": {**SECTIONS["gke"], "slices": 2}}, "without a topology"),
    ],
)
def test_what_is_wrong_is_named(modules, tmp_path, change, said):
    config, _ = modules
    with pytest.raises(config.LaunchError, match=re.escape(said)):
        config.read(written(tmp_path / "f.yaml", content(tmp_path / "w", **change)))


def test_errors_of_the_command_are_lines(tmp_path):
    path = written(tmp_path / "f.yaml", {**content(tmp_path / "w"), "ssh": None})
    done = launch("ssh", str(path))
    assert done.returncode == 2 and "has no section 'ssh'; it has slurm, gke" in done.stderr
    path.write_text("a: [")
    assert launch("ssh", str(path)).stderr.startswith(f"launch: error: {path} is no YAML")
    done = launch("slurm", str(written(path, content(tmp_path / "w"))), "--folder", str(tmp_path), path="/nowhere")
    assert done.returncode == 1 and "sbatch is not installed here" in done.stderr


def fake_ssh(folder: Path) -> str:
    """A PATH with an `ssh` that runs what it is given here."""
    folder.mkdir()
    (folder / "ssh").write_text('#!/bin/sh\nfor last; do :; done\nexec sh -c "exec $last"\n')
    (folder / "ssh").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_a_host_that_fails_ends_the_others(tmp_path):
    words = ["sh", "-c", 'echo "I am $JAX_PROCESS_ID"; [ "$JAX_PROCESS_ID" = 1 ] && exit 7; exec sleep 60']
    path = written(tmp_path / "f.yaml", content(tmp_path / "w", command=words))
    start = time.monotonic()
    done = launch("ssh", str(path), path=fake_ssh(tmp_path / "bin"))
    assert done.returncode == 7 and time.monotonic() - start < 40
    assert "[me@a] I am 0" in done.stdout and "[b] I am 1" in done.stdout


@pytest.mark.slow
def test_two_hosts_by_ssh_train_like_one(tmp_path):
    """The whole way: launch.py, (a stand-in for) ssh, two processes that find each other, the losses of one."""
    finish(start(tmp_path / "one", cache=tmp_path / "cache"))
    run_yaml = tmp_path / "run.yaml"
    run_yaml.write_text(CONFIG)
    command = [sys.executable, "-m", "ringjax.cli", "train", str(run_yaml), "--run_dir", str(tmp_path / "run"),
               "--mesh.simulated_devices", "4"]  # fmt: skip
    section = {"hosts": ["one", "two"], "coordinator": "127.0.0.1", "port": free_port()}
    env = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd(), "XLA_FLAGS": ""}
    changed = content(tmp_path / "w", command=command, env=env, setup=None, ssh=section)
    done = launch("ssh", str(written(tmp_path / "f.yaml", changed)), path=fake_ssh(tmp_path / "bin"))
    assert done.returncode == 0, done.stdout
    assert "[one]" in done.stdout and "2 process(es)" in done.stdout
    assert not re.search(r"^\[two\] .*loss", done.stdout, re.M)
    found, expected = np.array(curve(tmp_path / "run")), np.array(curve(tmp_path / "one"))
    np.testing.assert_allclose(found[:, 1], expected[:, 1], rtol=1e-5)


def test_the_words_of_a_dry_run_can_be_pasted(modules, odd, tmp_path):
    config, targets = modules
    read = config.read(written(tmp_path / "f.yaml", content(odd)))
    for words in targets.render(read, "ssh").commands:
        assert shlex.split(shlex.join(words)) == words
