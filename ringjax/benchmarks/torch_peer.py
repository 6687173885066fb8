"""PyTorch's context parallelism on the same GPUs, in processes of its own: `torch_script.py`.

It runs before JAX touches a device: JAX takes most of a GPU's memory when it starts.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ringjax.benchmarks import rows
from ringjax.benchmarks.peers import NONSENSE
from ringjax.benchmarks.programs import Way
from ringjax.benchmarks.rows import Row
from ringjax.benchmarks.timing import Times
from ringjax.benchmarks.workload import Workload

SCRIPT = Path(__file__).with_name("torch_script.py")
_SIGNS = {
    "No module named 'torch'": rows.ABSENT, "NotImplementedError": rows.REFUSED, "out of memory": rows.NO_MEMORY,
}  # fmt: skip
# Of all cases together: NCCL that hangs must not hold the command for ever.
TIMEOUT = 1200


def run(
    works: Iterable[Workload], kinds: Iterable[str], *, python: str | None, devices: int | None, repeats: int,
    warmup: int, run_seconds: float, say: Callable[[str], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """One result for each work, pass, rotation and kernel, as `torch_script.py` gives it, or with an `error`.

    `python` is an interpreter that has PyTorch; None: this one.
    """
    cases = [_case(work, kind) for work in works for kind in kinds]
    settings = {"devices": devices, "repeats": repeats, "warmup": warmup, "run_seconds": run_seconds, "cases": cases}
    with tempfile.TemporaryDirectory(prefix="ringjax-bench-") as folder:
        request, answer = Path(folder, "request.json"), Path(folder, "answer.jsonl")
        request.write_text(json.dumps(settings))
        # Not run where it lies: the modules beside it (`profile`) would stand in for Python's own.
        script = shutil.copy(SCRIPT, folder)
        command = [python or sys.executable, str(script), str(request), str(answer)]
        say("PyTorch context_parallel, in processes of its own …")
        failure = ""
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
            if done.returncode:
                failure = _last_line(done.stderr) or f"exit code {done.returncode}"
        except (OSError, subprocess.TimeoutExpired) as error:
            failure = str(error).splitlines()[0]
        lines = answer.read_text().splitlines() if answer.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    answered = {json.dumps(result["case"], sort_keys=True) for result in found}
    missing = [case for case in cases if json.dumps(case, sort_keys=True) not in answered]
    return found + [{"case": case, "error": failure or "no answer"} for case in missing]


def is_of(result: dict[str, Any], work: Workload, kind: str) -> bool:
    """Whether a result is of this work and pass."""
    return result["case"] == _case(work, kind)


def row_of(result: dict[str, Any], work: Workload, baseline: dict[str, Any] | None) -> Row:
    """A result as a line of the table, beside the one-device kernel that JAX was timed on."""
    kind, devices = result["case"]["kind"], result.get("devices", 0)
    setting = ", ".join(result[name] for name in ("kernel", "rotation") if name in result) or "–"
    layout = "zigzag" if work.mask == "causal" else "contiguous"
    row = Row.of(work, Way("torch context_parallel", layout, setting, devices), kind)
    row.peer = True
    if "error" in result:
        row.reason, row.status = result["error"], rows.FAILED
        for sign, status in _SIGNS.items():
            if sign in row.reason:
                row.status = status
        return row
    row.times = Times(tuple(result["seconds"]), result["calls"]).plain()
    row.rate, row.baseline = row.flops / devices / row.times["median"], baseline
    row.choices = (f"torch {result['torch']}", "" if result["grouped"] else "K and V heads repeated")
    if "out_error" in result:
        row.errors = {"out": (result["out_error"], NONSENSE)}
    return row


def _case(work: Workload, kind: str) -> dict[str, Any]:
    return {
        "mask": work.mask, "length": work.length, "heads": work.heads, "kv_heads": work.kv_heads,
        "head_dim": work.head_dim, "batch": work.batch, "dtype": work.dtype, "kind": kind,
    }  # fmt: skip


def _last_line(text: str) -> str:
    """What a traceback says in the end."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or [""])[-1][:300]
