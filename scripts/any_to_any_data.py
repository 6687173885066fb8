"""What `scripts/any_to_any.sh` tokenizes: paragraphs of books, and captions with the paths of their pictures.

    python scripts/any_to_any_data.py DATA FOLDER

DATA holds images/captions.jsonl, videos/captions.jsonl and text/*.txt (any of them may be missing). Into FOLDER go

    prose.jsonl, heldout_prose.jsonl     paragraphs of at least so many words; one book is kept aside whole
    books.jsonl                          the other books, whole
    heldout_images.jsonl, heldout_videos.jsonl   captions kept aside (ringjax/data/heldout.py), for `ringjax eval`

Short pieces of prose, because with example weights a piece counts as much as a captioned picture.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

from ringjax.data.heldout import SHARE, heldout

HELD_OUT_BOOK = "northanger_abbey"


def paragraphs(text: str, words: int) -> Iterator[str]:
    """The text in pieces of whole lines, each of at least so many words but for the last."""
    piece = ""
    for line in re.split(r"(?<=\n)(?!\n)", text):
        piece += line
        if len(piece.split()) >= words:
            yield piece.strip()
            piece = ""
    if piece.strip():
        yield piece.strip()


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} lines")


def write_prose(texts: list[Path], folder: Path, words: int) -> None:
    books = {path.stem: path.read_text(encoding="utf-8") for path in texts}
    kept = {HELD_OUT_BOOK: books.pop(HELD_OUT_BOOK)} if HELD_OUT_BOOK in books else {}
    for name, some in (("prose", books), ("heldout_prose", kept)):
        write(
            folder / f"{name}.jsonl", [{"text": piece} for text in some.values() for piece in paragraphs(text, words)]
        )
    write(folder / "books.jsonl", [{"text": text} for text in books.values()])


def write_heldout(captions: Path, target: Path, share: float) -> None:
    rows = [json.loads(line) for line in captions.read_text(encoding="utf-8").splitlines() if line.strip()]
    kept = [row for row in rows if heldout(str(row.get("caption", "")), share)]
    # A caption names nothing outside its folder: a link there leads to the pictures. The target's own name without
    # its ending is that of what is tokenized of it.
    link = target.with_name(f"{target.stem}_files")
    link.unlink(missing_ok=True)
    link.symlink_to(captions.parent.absolute())
    write(target, [{**row, "file": f"{link.name}/{row['file']}"} for row in kept])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--words", type=int, default=80, help="of a piece of prose, at least")
    parser.add_argument("--heldout-share", type=float, default=SHARE, help="of the captions")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if texts := sorted((args.data / "text").glob("*.txt")):
        write_prose(texts, args.folder, args.words)
    for kind in ("images", "videos"):
        captions = args.data / kind / "captions.jsonl"
        if captions.is_file():
            write_heldout(captions, args.folder / f"heldout_{kind}.jsonl", args.heldout_share)


if __name__ == "__main__":
    main()
