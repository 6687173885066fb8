"""Sizes and checksums put right after a change, so that it is not they that refuse it."""

import hashlib
import json
import random
import struct
import zlib
from collections.abc import Callable

from tests.fuzz import formats
from tests.fuzz.seeds import Case


def finish_record(rng: random.Random, case: Case) -> Case:
    content = case.get("a.record", b"")
    if rng.random() < 0.5 and len(content) >= 16:
        (n,) = struct.unpack_from("<I", content, 8)
        wanted = 12 + 4 * n + 2 * ((n + 7) // 8)
        body = content[:wanted] if n < 10_000 and rng.random() < 0.8 else content[:-4]
        body = body.ljust(wanted, b"\xff") if n < 10_000 else body
        return {"a.record": body + struct.pack("<I", zlib.crc32(body))}
    return case


def finish_records(rng: random.Random, case: Case) -> Case:
    """Sizes and checksums in meta.json that fit the shards, most of the time."""
    if rng.random() < 0.15:
        return case
    try:
        meta = json.loads(case["meta.json"])
        for shard in meta["shards"]:
            content = case[shard["file"]]
            shard["bytes"], shard["sha256"] = len(content), hashlib.sha256(content).hexdigest()
        return {**case, "meta.json": json.dumps(meta).encode()}
    except (ValueError, KeyError, TypeError, RecursionError):
        return case


def sealed(case: Case, start: str, listed: bool = False) -> Case:
    """The case with a manifest whose checksums fit; `listed`: every file is in it, and no other."""
    name = f"{start}ringjax.json"
    _, _, body = case[name].partition(b"\n")
    try:
        info = json.loads(body)
        files = {
            path.removeprefix(start): content
            for path, content in case.items()
            if path.startswith(start) and path != name
        }
        if listed:
            info["files"] = {}
        for path, content in files.items():
            if listed or path in info["files"]:
                info["files"][path] = [len(content), hashlib.sha256(content).hexdigest()]
        body = json.dumps(info).encode()
    except (ValueError, RecursionError, TypeError, AttributeError, KeyError):
        pass
    return {**case, name: json.dumps({"sha256": hashlib.sha256(body).hexdigest()}).encode() + b"\n" + body}


def finish_manifest(start: str) -> Callable[[random.Random, Case], Case]:
    def finish(rng: random.Random, case: Case) -> Case:
        name = f"{start}ringjax.json"
        if rng.random() < 0.1 or name not in case:
            return case
        case = sealed(case, start)
        if rng.random() < 0.5:  # what the manifest says is another thing, under a checksum that fits
            first, _, body = case[name].partition(b"\n")
            body = formats.changed(rng, "ringjax.json", body, [body])
            case[name] = json.dumps({"sha256": hashlib.sha256(body).hexdigest()}).encode() + b"\n" + body
        return case

    return finish
