"""Starts one command on many hosts, by what the cluster has for it:

    python scripts/launch/launch.py slurm FILE.yaml --dry-run      what would be written and run
    python scripts/launch/launch.py slurm FILE.yaml                writes it and runs it
    python scripts/launch/launch.py gke | xpk | tpu_vm | skypilot | ssh FILE.yaml

example.yaml shows the file. The processes find each other (`ringjax.training.distributed`), and before the first step
they compare versions, config and data.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from config import LaunchError, read
from targets import TARGETS, Rendered, render
from together import run_together


def main(argv: list[str] | None = None) -> int:
    """The exit code of what was run; 2 for a file that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("file", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="print what would be written and run, and do neither")
    parser.add_argument("--folder", type=Path, default=Path("launched"), help="where files are written (launched)")
    options = parser.parse_args(argv)
    try:
        launch = read(options.file)
        rendered = render(launch, options.target)
    except (LaunchError, OSError) as error:
        for line in str(error).splitlines():
            print(f"launch: error: {line}", file=sys.stderr)
        return 2
    if options.dry_run:
        print(shown(rendered), end="")
        return 0
    names = launch.ssh.hosts if rendered.together else []
    try:
        return run(rendered, options.folder, names)
    except FileNotFoundError as error:
        print(f"launch: error: {error.filename} is not installed here", file=sys.stderr)
        return 1


def shown(rendered: Rendered) -> str:
    """Files and commands, to be read."""
    parts = [f"# ---- file {name}\n{text.rstrip()}\n\n" for name, text in rendered.files.items()]
    if rendered.packed is not None:
        parts.append(f"# ---- the command holds, in base64\n{rendered.packed.rstrip()}\n\n")
    head = "# ---- runs, all at once\n" if rendered.together else "# ---- runs\n"
    return "".join([*parts, head, *(f"{shlex.join(command)}\n" for command in rendered.commands)])


def run(rendered: Rendered, folder: Path, names: list[str]) -> int:
    """Write the files into `folder` and run the commands there; the code of the first that fails."""
    if rendered.together:
        return run_together(names, rendered.commands)
    if rendered.files:
        folder.mkdir(parents=True, exist_ok=True)
    for name, text in rendered.files.items():
        (folder / name).write_text(text, encoding="utf-8")
    for command in rendered.commands:
        print(f"launch: {shlex.join(command)}", flush=True)
        code = subprocess.run(command, cwd=folder if rendered.files else None).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
