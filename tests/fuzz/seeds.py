"""Small valid files of every kind that is read here, as folders in memory: what the fuzzer changes.

A case is the files of a folder by name; `first` names those that matter least last.
"""

import dataclasses
import io
import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

Case = dict[str, bytes]


def files_of(folder: Path) -> Case:
    """Every file below a folder by its path there."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def written(write: Callable[[Path], object]) -> Case:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return files_of(Path(folder))


def lines_of(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


# --- data -----------------------------------------------------------------------------------------------------------


def jsonl() -> list[Case]:
    codes = list(range(8))
    return [
        {
            "lines.jsonl": lines_of(
                {"text": "hello world", "fields": "text"}, {"fields": "[a],b+a", "a": "x", "b": "y z"}
            )
        },
        {
            "lines.jsonl": lines_of(
                {
                    "fields": ["[instruction],vision", "[vision],caption"],
                    "vision": codes,
                    "instruction": "Draw",
                    "caption": "a",
                },
                {"fields": '"Draw \\"it\\""+a,<|eos|>', "a": "a cat é 漢"},
                {"vision": codes, "caption": "b", "fields": "vision"},
            )
        },
        {"lines.jsonl": lines_of({"fields": "a,[b,c],d", **{name: name * 9 for name in "abcd"}}) + b"\n\n{}\n"},
        {
            "lines.jsonl": b'{"fields": "a\\u00007\\u0000b", "a": "x"}\n{"fields": "a", "a": "\\ud800"}\n'
            + b'{"a": "'
            + b"x" * 5000
            + b'"}'
        },
        {
            "lines.jsonl": lines_of(
                {"fields": '"' + '\\"' * 60_000, "a": "x"}, {"fields": "vision", "vision": "@"}
            ).replace(b'"@"', b"[" * 60 + b"1" + b"]" * 60)
        },
    ]


def _example(length: int):
    from ringjax.data.example import Example

    rng = np.random.default_rng(length)
    return Example(rng.integers(0, 250, length, np.int32), rng.random(length) < 0.2, rng.random(length) < 0.7)


def record() -> list[Case]:
    from ringjax.data.records import encode_record

    return [{"a.record": encode_record(_example(length))} for length in (1, 7, 300)]


def records() -> list[Case]:
    import random

    from ringjax.data.records import FORMAT, META, encode_record, write_shard
    from tests.fuzz.seals import finish_records

    def write(folder: Path, shards: tuple[tuple[int, ...], ...]) -> None:
        written = [
            write_shard(folder / f"{n:05d}.array_record", [encode_record(_example(size)) for size in sizes])
            for n, sizes in enumerate(shards)
        ]
        meta = {
            "format": FORMAT,
            "tokenizer": "bytes",
            "tokenizer_fingerprint": "bytes",
            "has_vision": True,
            "codes_per_frame": 256,
            "vision_codes": 8192,
            "shards": [dataclasses.asdict(shard) for shard in written],
        }
        (folder / META).write_text(json.dumps(meta))

    def bomb(folder: Path) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        write(folder, ((5, 9, 40),))
        writer = ArrayRecordWriter(str(folder / "00000.array_record"), "group_size:1")
        for size in (1 << 29, 3, 3):
            writer.write(b"\0" * size)
        writer.close()

    kinds = (((5, 9, 40),), ((3, 300), (4000,)))
    return [written(lambda folder, shards=shards: write(folder, shards)) for shards in kinds] + [
        finish_records(random.Random(1), written(bomb))
    ]


def _drawn(mode: str, size: tuple[int, int], seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), np.uint8)
    return (
        Image.fromarray(noise, "RGBA").convert(mode)
        if mode != "I;16"
        else Image.fromarray(noise[..., 0].astype(np.uint16) * 200)
    )


def _encoded(mode: str, kind: str, frames: int = 1, **options) -> bytes:
    file = io.BytesIO()
    pictures = [_drawn(mode, (13, 11), i) for i in range(frames)]
    more = {"save_all": True, "append_images": pictures[1:], "duration": 40} if frames > 1 else {}
    pictures[0].save(file, kind, **more, **options)
    return file.getvalue()


def _exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x8769] = 6, "a camera", {0x9003: "2001:01:01 00:00:00"}
    return exif.tobytes()


def pictures() -> list[Case]:
    found = {
        "png": [_encoded(mode, "PNG") for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")]
        + [_encoded("RGB", "PNG", frames=3), _encoded("RGB", "PNG", exif=_exif())],
        "jpg": [_encoded(mode, "JPEG") for mode in ("RGB", "L", "CMYK")]
        + [_encoded("RGB", "JPEG", exif=_exif(), progressive=True)],
        "gif": [_encoded("P", "GIF"), _encoded("RGB", "GIF", frames=4), _encoded("P", "GIF", transparency=3)],
        "webp": [
            _encoded("RGB", "WEBP"),
            _encoded("RGBA", "WEBP", lossless=True),
            _encoded("RGB", "WEBP", frames=3),
            _encoded("RGB", "WEBP", exif=_exif()),
        ],
    }
    return [{f"picture.{kind}": content} for kind, contents in found.items() for content in contents] + [
        {"picture.png": many_frames_png(2**31 - 1)},
        {"picture.gif": many_frames_gif(3000)},
        {"picture.png": blank_png(20_000, 20_000)},
        {"picture.png": blank_png(4000, 4000)},
        {"picture.gif": many_frames_gif(200, 8000)},
    ]


def blank_png(width: int, height: int) -> bytes:
    """A picture that is small in the file and large in memory."""
    import zlib

    from tests.fuzz.formats import png

    packer = zlib.compressobj(9)
    row = b"\0" * (1 + width // 8)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    return png([(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)), (b"IDAT", data), (b"IEND", b"")])


def many_frames_png(claimed: int) -> bytes:
    """An animated PNG that claims so many frames and has one."""
    from tests.fuzz.formats import png, png_chunks

    chunks = png_chunks(_encoded("RGB", "PNG", frames=2))
    return png([(kind, struct.pack(">II", claimed, 0) if kind == b"acTL" else data) for kind, data in chunks])


def many_frames_gif(frames: int, size: int = 16) -> bytes:
    """A GIF whose frames are one pixel each, on a canvas of `size` × `size`."""
    head = b"GIF89a" + struct.pack("<HH", size, size) + b"\x80\0\0" + b"\0\0\0\xff\xff\xff"
    frame = b"\x2c" + struct.pack("<HHHH", 0, 0, 1, 1) + b"\0\x02\x02D\x01\0"
    return head + frame * frames + b";"


def picture_set() -> list[Case]:
    rows = [{"file": "a.png", "caption": "a"}, {"file": "b.gif", "caption": "b"}, {"file": "sub/c.webp", "caption": ""}]
    files = {
        "a.png": _encoded("RGB", "PNG"),
        "b.gif": _encoded("RGB", "GIF", frames=3),
        "sub/c.webp": _encoded("RGB", "WEBP"),
    }
    return [{"captions.jsonl": lines_of(*rows), **files}]


CONFIG = """\
model:
  width: 16
  ffn_width: 16
  layers: 1
  heads: 2
  vocab_size: 512
  vision_codes: 64
  vision_vocab_size: 66
  rope_scaling: {kind: linear, factor: 2.0}
  dtype: float32
data:
  sources:
    - {path: "sample:digits", weight: 1}
    - path: sample:prose
      weight: 1.5
      fields: "[a],b"
  codes_per_frame: 16
  vision_codes: 64
  prefetch: 0
training: {steps: 2, seq_len: 64, batch_size: 2}
optimizer: {learning_rate: 1e-3, schedule: cosine}
mesh: {shape: "1,1,1,8", layout: striped}
logging: {progress: none}
"""
STAGES = """\
model: {size: 7b, rope_theta: 1.0e6}
training: {seq_len: 32768, steps: 1200, batch_size: 128}
mesh: {shape: "1,-1,1,4"}
stages:
  - {name: 32k}
  - name: 128k
    model: {rope_theta: 1.0e7}
    training: {seq_len: 131072, steps: 3000, batch_size: 32}
"""


def config() -> list[Case]:
    root = Path(__file__).parents[2] / "configs"
    own = [{"config.yaml": path.read_bytes()} for path in sorted(root.glob("*.yaml"))]
    return [{"config.yaml": CONFIG.encode()}, {"config.yaml": STAGES.encode()}, *own]
