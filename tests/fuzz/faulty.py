"""A reader with every fault that the fuzzer must notice: what is in its file says which."""

import os
import time
from pathlib import Path

from tests.fuzz.targets import Target

FAULTS = {
    "accepted": "accepted",
    "refused": "refused",
    "unnamed": "unnamed: ValueError",
    "wrong": "error: KeyError",
    "recursion": "error: RecursionError",
    "loop": "slow: over",
    "wait": "hang: exit 1",
    "memory": "memory: grew by over 1 GiB",
    "abort": "crash: SIGABRT",
    "exit": "crash: exit 7",
    "system": "outside: os.system",
    "write": "outside: open /tmp/ringjax-fuzz-outside",
    "read": "outside: open /etc/hostname",
    "remove": "outside: os.remove",
    "canary": "ran: the canary",
    "long": "message: ValueError",
}
"""By what the file says: how a verdict begins."""


def _read(folder: Path) -> None:
    what = (folder / "fault").read_text()
    match what:
        case "accepted":
            return
        case "refused":
            raise ValueError(f"{folder / 'fault'} is refused")
        case "unnamed":
            raise ValueError("something is wrong")
        case "long":
            raise ValueError(f"{folder} {'x' * 20_000}")
        case "wrong":
            raise KeyError(str(folder))
        case "recursion":
            _deeper(folder)
        case "loop":
            while True:
                pass
        case "wait":
            time.sleep(1000)
        case "memory":
            bytearray(b"x") * (1200 << 20)
        case "abort":
            os.abort()
        case "exit":
            os._exit(7)
        case "system":
            os.system("true")
        case "write":
            open("/tmp/ringjax-fuzz-outside", "w").close()
        case "read":
            open("/etc/hostname").close()
        case "remove":
            os.remove("/tmp/ringjax-fuzz-nothing")
        case "canary":
            (folder / "CANARY").touch()


def _deeper(folder: Path) -> None:
    _deeper(folder)


TARGET = Target("faulty", lambda: [{"fault": what.encode()} for what in FAULTS], _read)
