"""What each kind of cluster is given: files, and the command that hands them over. None is a scheduler of our own.

| | who starts the processes | how they find each other |
| --- | --- | --- |
| slurm | srun, one process a GPU | JAX reads SLURM_* |
| gke, TPU | JobSet, one pod a host | JAX reads TPU_WORKER_HOSTNAMES, MEGASCALE_* |
| gke, GPU | JobSet, one pod a host | JAX_*, from the pod's index |
| xpk | the JobSet that xpk makes | as on gke |
| tpu_vm | gcloud, on every worker | JAX asks the metadata server |
| skypilot | sky, once a node | JAX_*, from SKYPILOT_* |
| ssh | ssh.py, one process a host | JAX_* |
"""

import base64
import dataclasses
import shlex
from collections.abc import Callable

import yaml
from config import Launch, LaunchError


@dataclasses.dataclass(frozen=True)
class Rendered:
    """Files by name, and what is run where they lie: one command after the other, or all at once."""

    files: dict[str, str]
    commands: list[list[str]]
    together: bool = False
    packed: str | None = None
    """The lines that a command holds in a form that nobody can read."""


def shell(launch: Launch, before: str = "", run: str = "") -> str:
    """What one host's shell does; `before` sets variables, `run` comes before the command (srun)."""
    lines = ["set -eu", f"cd {shlex.quote(launch.workdir)}"]
    lines += [] if launch.setup is None else [launch.setup.rstrip("\n")]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in launch.env.items()]
    lines += [before] if before else []
    return "\n".join([*lines, f"{run or 'exec'} {shlex.join(launch.command)}"]) + "\n"


def slurm(launch: Launch) -> Rendered:
    """A batch script. JAX gives each process under Slurm one GPU, so there are as many processes as GPUs."""
    found = launch.slurm
    options = {
        "job-name": launch.name, "nodes": found.hosts, "ntasks-per-node": found.gpus_per_host,
        "gpus-per-node": found.gpus_per_host, "partition": found.partition, "account": found.account,
        "time": found.time, "output": f"{launch.name}-%j.out",
    }  # fmt: skip
    head = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    # The whole job is told of its end 300 s before: training saves and can go on.
    head += ["#SBATCH --signal=TERM@300", *(f"#SBATCH {line}" for line in found.options)]
    # The processes say themselves who is lost, and end: srun would end them before that, with another exit code.
    script = "\n".join(["#!/bin/bash", *head, shell(launch, run="exec srun --kill-on-bad-exit=0 --wait=0")])
    return Rendered({f"{launch.name}.sbatch": script}, [["sbatch", f"{launch.name}.sbatch"]])


def gke(launch: Launch) -> Rendered:
    """A JobSet: one Job a slice (or one of GPUs), one pod a host, all restarted together."""
    found, tpu = launch.gke, launch.gke.topology is not None
    resource = "google.com/tpu" if tpu else "nvidia.com/gpu"
    accelerator = "cloud.google.com/gke-tpu-accelerator" if tpu else "cloud.google.com/gke-accelerator"
    selector = {accelerator: found.accelerator} | ({"cloud.google.com/gke-tpu-topology": found.topology} if tpu else {})
    env = [] if tpu else _from_the_pod(launch)
    container = {
        "name": "ringjax",
        "image": found.image,
        # Kubernetes expands $(NAME) in it, and takes $$ for a dollar.
        "command": ["bash", "-c", shell(launch).replace("$", "$$")],
        "env": env,
        "ports": [{"containerPort": found.port}],
        "resources": {"limits": {resource: found.devices_per_host}},
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 300,
        "nodeSelector": selector,
        "containers": [container],
    }
    job = {"parallelism": found.hosts, "completions": found.hosts, "completionMode": "Indexed", "backoffLimit": 0,
           "template": {"spec": pod}}  # fmt: skip
    metadata = {"name": launch.name, "namespace": found.namespace}
    if tpu:
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    if found.queue is not None:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": found.queue}
    content = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {"maxRestarts": 4},
            "replicatedJobs": [{"name": "hosts", "replicas": found.slices, "template": {"spec": job}}],
        },
    }
    text = yaml.safe_dump(content, sort_keys=False)
    return Rendered({f"{launch.name}.yaml": text}, [["kubectl", "apply", "-f", f"{launch.name}.yaml"]])


def _from_the_pod(launch: Launch) -> list[dict]:
    """JobSet's headless service has the name of the JobSet, and its pods names of their own in it."""
    found = launch.gke
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    return [
        {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{launch.name}-hosts-0-0.{launch.name}:{found.port}"},
        {"name": "JAX_NUM_PROCESSES", "value": str(found.hosts)},
        {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}},
    ]


def xpk(launch: Launch) -> Rendered:
    """One command. xpk puts the lines into a template of its own, so they go through it as letters and digits."""
    found, lines = launch.xpk, shell(launch)
    options = {
        "--cluster": found.cluster, "--workload": launch.name, "--tpu-type": found.tpu_type,
        "--num-slices": found.slices, "--docker-image": found.image, "--project": found.project, "--zone": found.zone,
        "--command": f"echo {base64.b64encode(lines.encode()).decode()} | base64 -d | bash",
    }  # fmt: skip
    words = [f"{name}={value}" for name, value in options.items() if value is not None]
    return Rendered({}, [["xpk", "workload", "create", *words]], packed=lines)


def tpu_vm(launch: Launch) -> Rendered:
    """The same lines on every worker of the slice."""
    found = launch.tpu_vm
    words = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", found.name, f"--zone={found.zone}"]
    words += [] if found.project is None else [f"--project={found.project}"]
    return Rendered({}, [[*words, "--worker=all", f"--command=bash -c {shlex.quote(shell(launch))}"]])


def skypilot(launch: Launch) -> Rendered:
    """A task: `run` is run once a node, with the addresses of all of them."""
    found = launch.skypilot
    first = f'"$(echo "$SKYPILOT_NODE_IPS" | head -n1):{found.port}"'
    before = (
        f"export JAX_COORDINATOR_ADDRESS={first}\n"
        'export JAX_NUM_PROCESSES="$SKYPILOT_NUM_NODES" JAX_PROCESS_ID="$SKYPILOT_NODE_RANK"'
    )
    resources = {"accelerators": found.accelerators} | ({} if found.infra is None else {"infra": found.infra})
    task = {"name": launch.name, "num_nodes": found.hosts, "resources": resources, "run": shell(launch, before)}
    name = f"{launch.name}.sky.yaml"
    return Rendered({name: yaml.safe_dump(task, sort_keys=False)}, [["sky", "launch", "-c", found.cluster, name]])


def ssh(launch: Launch) -> Rendered:
    """One ssh a host, all at once (ssh.py)."""
    found = launch.ssh
    address = found.coordinator or found.hosts[0].rpartition("@")[2]
    commands = []
    for index, host in enumerate(found.hosts):
        before = (
            f"export JAX_COORDINATOR_ADDRESS={shlex.quote(f'{address}:{found.port}')}"
            f" JAX_NUM_PROCESSES={len(found.hosts)} JAX_PROCESS_ID={index}"
        )
        # -tt: when ssh ends, for whatever reason, what it started over there is hung up.
        lines = shlex.quote(shell(launch, before))
        commands.append(["ssh", "-tt", *found.options, "--", host, f"bash -c {lines}"])
    return Rendered({}, commands, together=True)


TARGETS: dict[str, Callable[[Launch], Rendered]] = {
    render.__name__: render for render in (slurm, gke, xpk, tpu_vm, skypilot, ssh)
}


def render(launch: Launch, target: str) -> Rendered:
    """What `target` is given. Raises LaunchError where the file has no section of that name."""
    if getattr(launch, target) is None:
        there = [name for name in TARGETS if getattr(launch, name) is not None]
        raise LaunchError(f"the file has no section {target!r}; it has {', '.join(there) or 'none of them'}")
    return TARGETS[target](launch)
