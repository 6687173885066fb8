"""The one small file that says what runs where; see example.yaml."""

import re
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

MAX_BYTES = 1 << 16


class LaunchError(ValueError):
    """A file that cannot be used; one line for each thing that is wrong with it."""


def _one_line(text: str) -> str:
    if not text or re.search(r"[\x00-\x1f\x7f]", text):
        raise ValueError("must be one line of printable characters")
    return text


def _word(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]*", text):
        raise ValueError(f"{text!r} must begin with a letter or digit and hold only letters, digits and . _ : / @ + -")
    return text


def _host(text: str) -> str:
    # What begins with a dash would be an option of ssh.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*(@[A-Za-z0-9][A-Za-z0-9._-]*)?", text):
        raise ValueError(f"{text!r} is no host; write name or user@name, of letters, digits and . _ -")
    return text


def _name(text: str) -> str:
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", text):
        raise ValueError(f"{text!r} must be at most 40 of a-z, 0-9 and -, begin with a letter and not end with -")
    return text


def _variable(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text):
        raise ValueError(f"{text!r} is no name of a variable")
    if text in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        raise ValueError(f"{text} differs from host to host: the launcher sets it where JAX does not find it itself")
    return text


def _no_nul(text: str) -> str:
    if "\x00" in text:
        raise ValueError("holds a NUL character, which no command can")
    return text


Line = Annotated[str, AfterValidator(_one_line)]
Word = Annotated[str, AfterValidator(_word)]
Host = Annotated[str, AfterValidator(_host)]
Argument = Annotated[str, AfterValidator(_no_nul)]
Count = Annotated[int, Field(ge=1, le=100_000)]
Port = Annotated[int, Field(ge=1024, le=65535)]


class Part(BaseModel):
    """Unknown keys are refused, and numbers are not read out of words."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Slurm(Part):
    """A GPU of a host a process, as JAX takes them under Slurm."""

    hosts: Count
    gpus_per_host: Count
    partition: Word | None = None
    account: Word | None = None
    time: Annotated[str, Field(pattern=r"^(\d+-)?\d{1,3}(:\d{2}){0,2}$")] | None = None
    options: list[Line] = []
    """More lines of #SBATCH, such as --exclusive."""


class Kubernetes(Part):
    """A JobSet on GKE: TPU slices (topology) or GPUs (hosts)."""

    image: Word
    accelerator: Word
    """cloud.google.com/gke-tpu-accelerator (tpu-v5p-slice) or gke-accelerator (nvidia-h100-80gb)."""
    hosts: Count
    """Of a slice, or in all."""
    devices_per_host: Count
    topology: Annotated[str, Field(pattern=r"^\d+(x\d+){1,2}$")] | None = None
    """Of a TPU slice in chips, such as 4x4x4; none: GPUs."""
    slices: Count = 1
    namespace: Word = "default"
    queue: Word | None = None
    """A Kueue LocalQueue."""
    port: Port = 8476

    @model_validator(mode="after")
    def _gpus_have_no_slices(self):
        if self.topology is None and self.slices != 1:
            raise ValueError(f"slices {self.slices} without a topology: GPUs are counted by hosts; leave slices out")
        return self


class Xpk(Part):
    """A workload of xpk on TPU slices; it makes the JobSet itself."""

    cluster: Word
    tpu_type: Word
    """As xpk names it: v5p-128."""
    image: Word
    slices: Count = 1
    project: Word | None = None
    zone: Word | None = None


class TpuVm(Part):
    """A TPU slice that is there already, by gcloud."""

    name: Word
    zone: Word
    project: Word | None = None


class SkyPilot(Part):
    """A task of SkyPilot, which finds the machines."""

    hosts: Count
    accelerators: Word
    """Of a host: H100:8."""
    infra: Word | None = None
    """Where: aws, gcp/us-central1, k8s; none: the cheapest."""
    cluster: Word
    port: Port = 8476


class Ssh(Part):
    """Hosts that are there already; each has the working directory and the environment at the same place."""

    hosts: Annotated[list[Host], Field(min_length=1)]
    """The first one coordinates."""
    coordinator: Word | None = None
    """How the others reach it, where that is not its name."""
    port: Port = 8476
    options: list[Line] = []
    """Of ssh, such as -p or -i with its value."""


class Launch(Part):
    """What runs, and where it may."""

    name: Annotated[str, AfterValidator(_name)]
    command: Annotated[list[Argument], Field(min_length=1)]
    """Word by word, so that nothing is split or expanded."""
    workdir: Line
    """Where it runs, on every host."""
    setup: Argument | None = None
    """Shell lines before it, on every host: they are put in as they are."""
    env: dict[Annotated[str, AfterValidator(_variable)], Argument] = {}
    slurm: Slurm | None = None
    gke: Kubernetes | None = None
    xpk: Xpk | None = None
    tpu_vm: TpuVm | None = None
    skypilot: SkyPilot | None = None
    ssh: Ssh | None = None


def read(path: str | Path) -> Launch:
    """The launch file at `path`. Raises LaunchError with a line for each problem, OSError where it is not there."""
    path = Path(path)
    if path.stat().st_size > MAX_BYTES:
        raise LaunchError(f"{path} has {path.stat().st_size} bytes; a launch file has at most {MAX_BYTES}")
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise LaunchError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise LaunchError(f"{path} must be a mapping with name, command, workdir and a section such as ssh")
    try:
        return Launch.model_validate(content)
    except ValidationError as error:
        raise LaunchError("\n".join(_problems(path, error))) from None


def _problems(path: Path, error: ValidationError) -> list[str]:
    lines = []
    for found in error.errors():
        where = ".".join(map(str, found["loc"])) or "the file"
        said = found["msg"].removeprefix("Value error, ")
        if found["type"] == "extra_forbidden":
            said = "is unknown; example.yaml has what there is"
        lines.append(f"{path}: {where}: {said}")
    return lines
