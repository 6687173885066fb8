"""Running `ringjax train` in other processes, for tests of kills and of several processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from ringjax.training.metrics import read_metrics

CONFIG = """
model:
  {width: 16, ffn_width: 32, layers: 1, heads: 2, vocab_size: 512, vision_vocab_size: 0, dtype: float32, loss_chunk: 64}
data: {sources: [{path: "sample:prose"}]}
training: {steps: 24, seq_len: 32, batch_size: 8, eval_every: 8, eval_batches: 1}
optimizer: {learning_rate: 1.0e-2, warmup_steps: 2}
mesh: {shape: "2,1,1,4", simulated_devices: 8}
checkpoint: {every: 3}
logging: {progress: plain, every: 1, plot: false}
"""


def start(
    folder: Path, *overrides: str, cache: Path, config: str = CONFIG, cwd: Path | None = None, **environment: str
) -> subprocess.Popen:
    """`ringjax train` on a tiny config in its own process; `cache` keeps compiled programs between processes."""
    path = folder.with_suffix(".yaml")
    path.write_text(config)
    return command("train", str(path), "--run_dir", str(folder), *overrides, cache=cache, cwd=cwd, **environment)


def command(*arguments: str, cache: Path, cwd: Path | None = None, **environment: str) -> subprocess.Popen:
    """`ringjax` with these arguments on CPU devices, in its own process."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **environment,
    }
    started = [sys.executable, "-m", "ringjax.cli", *arguments]
    return subprocess.Popen(
        started, env=environment, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def cluster(count: int) -> list[dict[str, str]]:
    """The variables of each of `count` processes that find each other on this machine."""
    address = f"127.0.0.1:{free_port()}"
    shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    return [{**shared, "JAX_PROCESS_ID": str(i)} for i in range(count)]


def start_all(
    count: int, folder: Path, *overrides: str, cache: Path, devices: int = 8, config: str = CONFIG
) -> list[subprocess.Popen]:
    """`start` in `count` processes that share `devices` evenly."""
    options = ("--mesh.simulated_devices", str(devices // count), *overrides)
    return [
        start(folder, *options, cache=cache / f"{i} of {count}", config=config, **variables)
        for i, variables in enumerate(cluster(count))
    ]


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """What a process printed, after it ended with `code`."""
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == code, printed
    return printed


def curve(folder: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of each step."""
    return [(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
