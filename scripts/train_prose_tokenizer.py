"""Learn the byte-level BPE tokenizer of the sample data (about 3 s).

    python scripts/train_prose_tokenizer.py

It learns from the training novels and the captions of `ringjax.data.samples`, so it can be run from an installed
package, and writes ringjax/data/samples/prose_tokenizer.json and the manifest. 512 ids: five special tokens, the 256
bytes (so nothing is unknown), 251 merges.
"""

import argparse
from collections.abc import Iterator

from make_samples import write_manifest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ringjax.data.samples import DIGIT_WORDS, FOLDER, prose

# <pad> is 0 because padded slots of a batch hold token 0. The vision marks are text to the model, one id each here.
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<vision>", "</vision>")
# Enough for each number word to become one token, with and without a space before it.
CAPTION_REPEATS = 5000


def corpus() -> Iterator[str]:
    for novel in prose("train"):
        yield from novel.splitlines(keepends=True)
    for word in DIGIT_WORDS:
        yield from (f"{word}\n {word}\n",) * CAPTION_REPEATS


def learn(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-size", type=int, default=512)
    args = parser.parse_args()
    tokenizer = learn(corpus(), args.vocab_size)
    tokenizer.save(str(FOLDER / "prose_tokenizer.json"))
    held_out = prose("heldout")[0]
    print(f"{len(held_out.encode()) / len(tokenizer.encode(held_out).ids):.3f} bytes a token on the held-out novel")
    for word in DIGIT_WORDS:
        print(word, tokenizer.encode(word).tokens, tokenizer.encode(f" {word}").tokens)
    write_manifest()


if __name__ == "__main__":
    main()
