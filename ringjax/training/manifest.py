"""ringjax.json: what a checkpoint holds, and a checksum of every file, written last.

A checkpoint is whole when this file is there, agrees with its own checksum, and every file it lists has the size and
the SHA-256 written down. A kill before the last rename leaves no manifest; a cut or flipped file no longer matches it.
Before the rename everything is on the disk (fsync): a power cut leaves no manifest of files that only memory held, so
that an older checkpoint may be removed.
"""

import contextlib
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ringjax.inside import inside
from ringjax.json_text import brief, parse_json

NAME = "ringjax.json"
FORMAT = 1


class DamagedCheckpoint(ValueError):
    """A checkpoint that is not whole; the message says why."""


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME)


def write_manifest(folder: Path, info: dict[str, Any]) -> None:
    """Write the manifest of a finished checkpoint: `info` and the checksums of all its files."""
    paths = _files(folder)
    with ThreadPoolExecutor(4) as pool:
        digests = list(pool.map(_digest, paths))
        list(pool.map(_put_on_disk, [*paths, *{path.parent for path in paths}, folder.parent]))
    files = {p.relative_to(folder).as_posix(): [p.stat().st_size, d] for p, d in zip(paths, digests)}
    body = json.dumps({"format": FORMAT, **info, "files": files}, indent=1)
    text = json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest()}) + "\n" + body
    temporary = folder / (NAME + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / NAME)
    _put_on_disk(folder)


def _put_on_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Some file systems (object stores, some of FUSE) know no fsync of folders.
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(folder: Path, verify: bool = True) -> dict[str, Any]:
    """The manifest of a whole checkpoint; raises DamagedCheckpoint with the reason for any other.

    `verify=False` leaves out the checksums of the files, not that of the manifest itself.
    """
    path = folder / NAME
    try:
        first, _, body = path.read_text(encoding="utf-8").partition("\n")
        expected = parse_json(first)["sha256"]
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{folder.name} was not finished ({NAME} is missing)") from None
    except (ValueError, KeyError, TypeError):
        raise DamagedCheckpoint(f"{folder.name} is damaged: {NAME} cannot be read") from None
    if hashlib.sha256(body.encode()).hexdigest() != expected:
        raise DamagedCheckpoint(f"{folder.name} is damaged: {NAME} does not match its checksum")
    try:
        info = parse_json(body)
    except ValueError as error:
        raise DamagedCheckpoint(f"{folder.name} is damaged: {NAME} cannot be read ({error})") from None
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        found = brief(info.get("format") if isinstance(info, dict) else info)
        raise DamagedCheckpoint(f"{folder.name} has format {found}; this version reads {FORMAT}")
    if fault := _fault(info):
        raise DamagedCheckpoint(f"{folder.name} is damaged: {NAME} has no usable {fault}")
    _check_files(folder, info["files"], verify)
    return info


def _fault(info: dict[str, Any]) -> str | None:
    """What of a manifest is not as `write_manifest` writes it: readers take the rest for granted. None: nothing."""
    files, arrays = info.get("files"), info.get("parameters", {})
    if not isinstance(files, dict) or not all(_is_entry(entry) for entry in files.values()):
        return "files"
    if not isinstance(arrays, dict) or not all(isinstance(shape, str) for shape in arrays.values()):
        return "parameters"
    base = info.get("base", {"path": "", "fingerprint": ""})
    if not isinstance(base, dict) or not all(isinstance(base.get(name), str) for name in ("path", "fingerprint")):
        return "base"
    kinds = {"step": int, "stage": int, "config": dict, "notes": dict}
    return next((name for name, kind in kinds.items() if name in info and type(info[name]) is not kind), None)


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and type(entry[0]) is int and isinstance(entry[1], str)


def digest_of(folder: Path) -> str:
    """A name of what a whole checkpoint holds: other numbers, another name."""
    return parse_json((folder / NAME).read_text(encoding="utf-8").partition("\n")[0])["sha256"]


def _check_files(folder: Path, files: dict[str, list], verify: bool) -> None:
    for name, (size, _) in files.items():
        try:
            path = inside(folder, name)
        except ValueError as error:
            raise DamagedCheckpoint(f"{folder.name} is damaged: {NAME} lists {error}") from None
        if not path.is_file():
            raise DamagedCheckpoint(f"{folder.name} is damaged: {name} is missing")
        if path.stat().st_size != size:
            raise DamagedCheckpoint(f"{folder.name} is damaged: {name} has {path.stat().st_size} of {size} bytes")
    if not verify:
        return
    with ThreadPoolExecutor(4) as pool:
        digests = pool.map(lambda name: _digest(folder / name), files)
        for (name, (_, expected)), digest in zip(files.items(), digests):
            if digest != expected:
                raise DamagedCheckpoint(f"{folder.name} is damaged: {name} does not match its checksum")
