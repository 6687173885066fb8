"""Learn a byte-level BPE tokenizer from captions (seconds).

    python scripts/train_caption_tokenizer.py DATA tokenizer.json [--vocab-size 2048]

DATA holds images/captions.jsonl and videos/captions.jsonl. Captions that are kept aside (ringjax/data/heldout.py) are
not looked at. `<vision>` and `</vision>` are one id each; the 256 bytes are in, so nothing is unknown.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from train_prose_tokenizer import learn

from ringjax.data.heldout import SHARE, heldout

# What scripts/any_to_any.sh asks with.
WORDINGS = (
    "What is this?", "Look:", "Draw", "A picture of", "A clip of", "This is", "What kind of thing is this?",
    "You are a helpful assistant. USER: What is this?\n ASSISTANT:",
    "You are a helpful assistant. USER: Generate an image of a ASSISTANT:",
    "You are a helpful assistant. USER: Generate a video of a ASSISTANT:",
)  # fmt: skip


def corpus(data: Path) -> Iterator[str]:
    for path in sorted(data.glob("*/captions.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if not heldout(row["caption"], SHARE):
                # As the first word and within a text, for a space belongs to the word behind it.
                yield from (row["caption"], f" {row['caption']}", row.get("category", ""))
    for _ in range(200):
        yield from WORDINGS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--vocab-size", type=int, default=2048)
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = learn(corpus(args.data), args.vocab_size)
    tokenizer.save(str(args.output))
    for text in ("a red fox", "airplane taking off"):
        print(text, tokenizer.encode(text).tokens)


if __name__ == "__main__":
    main()
