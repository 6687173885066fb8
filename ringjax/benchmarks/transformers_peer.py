"""Hugging Face transformers on the same GPU, in a process of its own: `transformers_script.py`.

It runs before JAX touches a device: JAX takes most of a GPU's memory when it starts.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ringjax.benchmarks.config import GenerateBench
from ringjax.interop.hf_config import write_hf_config
from ringjax.models.config import ModelConfig

SCRIPT = Path(__file__).with_name("transformers_script.py")
TIMEOUT = 1200


def run(config: GenerateBench, models: dict[str, ModelConfig], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """One result for each size and context, as `transformers_script.py` gives it; a failure is one with an `error`."""
    contexts = sorted({*config.prefill, *config.contexts})
    cases = [
        {
            "size": size, "contexts": contexts, "new_tokens": config.new_tokens, "dtype": config.dtype,
            "config": _hf_fields(model, max(contexts) + config.new_tokens, config.dtype),
        }
        for size, model in models.items()
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="ringjax-bench-") as folder:
        request, answer = Path(folder, "request.json"), Path(folder, "answer.jsonl")
        request.write_text(json.dumps({"cases": cases}))
        script = shutil.copy(SCRIPT, folder)  # the modules beside it must not stand in for Python's own
        say("Hugging Face transformers, in a process of its own …")
        failure = "no answer"
        try:
            command = [config.peer_python or sys.executable, str(script), str(request), str(answer)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
            if done.returncode:
                failure = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]
        except (OSError, subprocess.TimeoutExpired) as error:
            failure = str(error).splitlines()[0]
        lines = answer.read_text().splitlines() if answer.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    answered = {(result["size"], result["context"]) for result in found}
    return found + [
        {"size": size, "context": context, "error": failure}
        for size in models for context in contexts if (size, context) not in answered
    ]  # fmt: skip


def _hf_fields(model: ModelConfig, context: int, dtype: str) -> dict[str, Any]:
    fields = write_hf_config(model, context, dtype)
    return {name: value for name, value in fields.items() if name not in ("architectures", "torch_dtype", "use_cache")}
