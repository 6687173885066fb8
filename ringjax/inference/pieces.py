"""A stream of text and vision ids as the pieces that people want: text, pictures and clips, in order."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int

from ringjax.data.example import Example
from ringjax.inference.grammar import Grammar, last_run, state_after


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """Text ids without `<vision>` and `</vision>`."""

    ids: Int[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True, eq=False)
class Frames:
    """The whole frames of a picture (one) or a clip, without end marks."""

    codes: Int[np.ndarray, "frames codes"]


Piece = Text | Frames


def split_pieces(
    prompt: Example, tokens: Int[np.ndarray, " n"], modality: Bool[np.ndarray, " n"], grammar: Grammar
) -> list[Piece]:
    """What was generated after a prompt.

    A frame that the prompt has begun is given whole. One that `tokens` leave unfinished is left out, and so is a text
    or a clip with nothing in it.
    """
    closing = int(state_after([prompt], grammar).closing[0])
    if prompt.modality[-1] and len(tokens) and modality[0]:
        begun = _begun(last_run(prompt), grammar)
        tokens = np.concatenate([begun, tokens])
        modality = np.concatenate([np.ones(len(begun), bool), modality])
    places = np.flatnonzero(np.diff(modality)) + 1
    found: list[Piece] = []
    for ids, vision in zip(np.split(tokens, places), np.split(modality, places)):
        if len(ids) and vision[0]:
            found.append(Frames(_frames(ids, grammar)))
        else:
            found.append(Text(ids[len(grammar.vision_end) if found else closing :]))
    # Where vision follows, a text ends with what opened it, but for what the prompt had of that already.
    found = [
        Text(_without_start(piece.ids, grammar, opens=number + 1 < len(found))) if isinstance(piece, Text) else piece
        for number, piece in enumerate(found)
    ]
    return [piece for piece in found if (piece.ids.size if isinstance(piece, Text) else piece.codes.size)]


def _begun(run: Int[np.ndarray, " n"], grammar: Grammar) -> Int[np.ndarray, " m"]:
    """The codes after the last end mark."""
    marks = np.flatnonzero(run >= grammar.end_of_frame)
    return run[marks[-1] + 1 :] if len(marks) else run


def _frames(ids: Int[np.ndarray, " n"], grammar: Grammar) -> Int[np.ndarray, "frames codes"]:
    size = grammar.codes_per_frame
    codes = ids[ids < grammar.end_of_frame]
    return codes[: len(codes) // size * size].reshape(-1, size)


def _without_start(ids: Int[np.ndarray, " n"], grammar: Grammar, opens: bool) -> Int[np.ndarray, " m"]:
    start = grammar.vision_start
    if opens or tuple(ids[-len(start) :]) == start:
        return ids[: max(0, len(ids) - len(start))]
    return ids
