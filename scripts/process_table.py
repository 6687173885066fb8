"""Trains, goes on, evaluates and writes with several processes on this machine, beside one, and prints the tables of
docs/results/several_processes.md. CPU devices and Gloo; about ten minutes on two cores that have nothing else to do.

    python scripts/process_table.py                       # into runs/processes
    python scripts/process_table.py --folder /tmp/x --steps 24
"""

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from ringjax.training.metrics import read_metrics

DEVICES = 8
CONFIG = """
model: {width: 32, ffn_width: 64, layers: 1, heads: 8, kv_heads: 4, vocab_size: 512, vision_vocab_size: 0,
        dtype: float32, loss_chunk: 64}
data: {sources: [{path: "sample:prose"}]}
training: {seq_len: 64, batch_size: 8}
optimizer: {learning_rate: 3.0e-3, warmup_steps: 2, schedule: constant}
checkpoint: {every: 4}
logging: {progress: plain, every: 1, plot: false}
"""
# Processes, mesh dp,fsdp,tp,sp, strategy, and what lies on different processes.
TRAINED = (
    (2, "2,1,1,4", "ring", "rows"),
    (2, "1,1,1,8", "two_level", "halves of the ring"),
    (2, "1,1,1,8", "hybrid", "halves of the ring"),
    (4, "2,1,1,4", "ring", "rows, and halves of each ring"),
    (4, "1,1,1,8", "two_level", "quarters of the ring"),
    (4, "1,2,2,2", "ring", "rows, heads and parameters"),
)
GOES_ON = ((4, "2,1,1,4"), (2, "1,2,2,2"), (1, "1,1,1,8"))
ASKED = ((1, None), (2, "1,1,1,8"), (4, "1,1,2,4"))
WORDS = ("--prompt", "It was", "--max_new_tokens", "24", "--temperature", "0.7", "--seed", "1")


def main() -> None:
    """Run everything and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/processes"))
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    folder: Path = options.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(CONFIG)
    train_table(folder, options.steps)
    restore_table(folder, options.steps)
    inference_table(folder)


def train_table(folder: Path, steps: int) -> None:
    """Losses and gradient norms of `steps` steps beside those of one process."""
    train(folder, "one", 1, "2,1,1,4", "ring", steps)
    expected = curve(folder / "one")
    print("| processes | dp,fsdp,tp,sp | strategy | on different processes | largest difference of a loss | of a"
          " gradient's norm |\n| --- | --- | --- | --- | --- | --- |")  # fmt: skip
    for count, mesh, strategy, what in TRAINED:
        name = f"{count}_{mesh.replace(',', '')}_{strategy}"
        train(folder, name, count, mesh, strategy, steps)
        loss, norm = differences(curve(folder / name), expected)
        print(f"| {count} | {mesh} | {strategy} | {what} | {loss:.1e} | {norm:.1e} |", flush=True)


def restore_table(folder: Path, steps: int) -> None:
    """The same run by four processes, then two, then one, each on another mesh."""
    print("\n| steps | processes | dp,fsdp,tp,sp | restored from | largest difference of a loss |"
          "\n| --- | --- | --- | --- | --- |")  # fmt: skip
    expected, before, done = curve(folder / "one"), "–", 0
    for part, (count, mesh) in enumerate(GOES_ON, 1):
        last = steps * part // len(GOES_ON)
        said = train(folder, "goes_on", count, mesh, "ring", last)
        if done and f"going on after step {done}" not in said:
            sys.exit(f"did not go on after step {done}:\n{said}")
        rows = [row for row in curve(folder / "goes_on") if row[0] > done]
        loss, _ = differences(rows, expected[done:last])
        print(f"| {done + 1} – {last} | {count} | {mesh} | {before} | {loss:.1e} |", flush=True)
        before, done = f"{count} processes, {mesh}", last


def inference_table(folder: Path) -> None:
    """The run of one process evaluated, and made to write."""
    print("\n| processes | dp,fsdp,tp,sp | largest difference of a row's loss | 24 sampled tokens |"
          "\n| --- | --- | --- | --- |")  # fmt: skip
    expected = None
    for number, (count, mesh) in enumerate(ASKED):
        where = () if mesh is None else ("--mesh", mesh)
        output = folder / f"perplexity_{number}"
        asked = ("--lengths", "64", "--rows", "8", "--dtype", "float32", "--progress", "none", "--output", str(output))
        together("eval", "perplexity", str(folder / "one"), *asked, *where, count=count, simulate="--simulated_devices")
        lines = (output / "results.jsonl").read_text().splitlines()[1:]
        found = [json.loads(line)["loss"] for line in lines]
        said = together("generate", str(folder / "one"), *WORDS, *where, count=count, simulate="--simulated_devices")
        words = re.sub(r"\[Gloo\].*?\n", "", said).partition("It was")[2].strip()
        if expected is None:
            expected = found, words
        loss = max(abs(a - b) / b for a, b in zip(found, expected[0], strict=True))
        same = "the reference" if number == 0 else "the same" if words == expected[1] else f"others: {words!r}"
        print(f"| {count} | {mesh or 'one device'} | {loss:.1e} | {same} |", flush=True)
    print(f"\nwritten: {expected[1]!r}")


def train(folder: Path, name: str, count: int, mesh: str, strategy: str, steps: int) -> str:
    """What process 0 said."""
    options = ("--mesh.shape", mesh, "--mesh.strategy", strategy, "--training.steps", str(steps))
    run = ("--run_dir", str(folder / name))
    return together("train", str(folder / "run.yaml"), *run, *options, count=count, simulate="--mesh.simulated_devices")


def together(*arguments: str, count: int, simulate: str) -> str:
    """`ringjax` in `count` processes that share the devices; what process 0 printed."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "ringjax.cli", *arguments, simulate, str(DEVICES // count)]
    cluster = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count)}
    processes = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu", **(cluster if count > 1 else {}), "JAX_PROCESS_ID": str(i)}
            if count > 1 else {**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        for i in range(count)
    ]  # fmt: skip
    said = [process.communicate()[0] for process in processes]
    for process, text in zip(processes, said):
        if process.returncode:
            sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{text}")
    return said[0]


def curve(run: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm."""
    return [(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(run / "metrics.jsonl") if "loss" in r]


def differences(found: list, expected: list) -> tuple[float, float]:
    """The largest relative ones, of the losses and of the norms."""
    pairs = list(zip(found, expected, strict=True))
    return tuple(max(abs(a[i] - b[i]) / b[i] for a, b in pairs) for i in (1, 2))


if __name__ == "__main__":
    main()
