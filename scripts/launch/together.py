"""Commands that run at once, such as one ssh a host: their lines with the host before each, and all end with the first
that fails."""

import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

GRACE = 8.0


def run_together(names: Sequence[str], commands: Sequence[Sequence[str]]) -> int:
    """The exit code of the first command that failed, 0 where none did. SIGTERM and SIGINT end all of them."""
    processes = [
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace",
        )
        for command in commands
    ]  # fmt: skip
    failed: list[int] = []
    stopped = threading.Event()

    def follow(name: str, process: subprocess.Popen) -> None:
        for line in process.stdout:
            print(f"[{name}] {line.rstrip()}", flush=True)
        if process.wait() and not stopped.is_set():
            failed.append(process.returncode)
            stopped.set()

    def stop(number: int, _frame) -> None:
        failed.append(128 + number)
        stopped.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    followers = [threading.Thread(target=follow, args=pair, daemon=True) for pair in zip(names, processes)]
    try:
        for follower in followers:
            follower.start()
        while any(process.poll() is None for process in processes) and not stopped.wait(0.2):
            pass
    finally:
        if stopped.is_set():
            _end(processes)
        for number, handler in before.items():
            signal.signal(number, handler)
    for follower in followers:
        follower.join(GRACE)
    if failed:
        print(f"launch: a host ended with code {failed[0]}; the others were ended too", file=sys.stderr)
    return failed[0] if failed else 0


def _end(processes: Sequence[subprocess.Popen]) -> None:
    """The others have a moment to end by themselves: JAX tells them when one of them is gone."""
    for process in processes:
        try:
            process.wait(GRACE / len(processes))
        except subprocess.TimeoutExpired:
            process.terminate()
    for process in processes:
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
