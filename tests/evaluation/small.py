"""A tiny published model that reads bytes, and a haystack of sentences, for the evaluations."""

from pathlib import Path

from ringjax.evaluation.haystack import Haystack
from ringjax.evaluation.question import Form
from ringjax.inference.text_model import TextModel
from tests.inference import published

CONTEXT = 4096
SENTENCES = [f"Sentence number {i} is about {word}." for i, word in enumerate(["rain", "tea", "sheep", "a walk"] * 100)]
PARAGRAPHS = [" ".join(SENTENCES[i : i + 4]) for i in range(0, len(SENTENCES), 4)]
TEXT = "\n\n".join(PARAGRAPHS)


def folder(path: Path) -> Path:
    """The model's folder."""
    return published.write(path / "model", max_position_embeddings=CONTEXT)


def form(path: Path, template: str = "lwm") -> Form:
    """The model, asked in this form."""
    return Form(TextModel.load(folder(path), dtype="float32"), template)


def haystack(form: Form, repeat: bool = False) -> Haystack:
    """Two documents of sentences."""
    half = len(TEXT) // 2
    return Haystack.of([TEXT[:half], TEXT[half:]], form.vocabulary, repeat)
