"""Names of files that another file gives: they lead nowhere but into its folder."""

from pathlib import Path, PurePosixPath

_LONGEST, _LONGEST_PART = 1024, 255  # bytes; what file systems take


def inside(folder: str | Path, name: str, *, levels: bool = True) -> Path:
    """The path of the file `name` of a folder; `levels`: it may lie in a folder there.

    Links are followed: whoever makes the folder may put them into it. Raises ValueError, which says what is wrong and
    not in which file, for a name that is absolute, leads up (`..`), is empty or too long, or that no file can have.
    """
    try:
        encoded = name.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{name[:80]!r} is no name of a file: it holds half of a surrogate pair") from None
    parts = PurePosixPath(name).parts
    if not parts or "\0" in name:
        raise ValueError(f"{name[:80]!r} is no name of a file")
    if len(encoded) > _LONGEST or any(len(part.encode()) > _LONGEST_PART for part in parts):
        raise ValueError(f"{name[:80]!r}… is longer than a file's name can be, {_LONGEST_PART} bytes")
    if not levels and (len(parts) > 1 or parts[0] != name or name == ".."):
        raise ValueError(f"{name[:80]!r} is not a file of the folder {folder}")
    # A backslash separates on Windows.
    if PurePosixPath(name).is_absolute() or ".." in name.replace("\\", "/").split("/") or Path(name).is_absolute():
        raise ValueError(
            f"{name[:80]!r} leads out of the folder {folder}; put the file, or a link to it, into the folder"
        )
    return Path(folder) / name
