"""The model opens and ends vision itself; the same as recomputing the whole stream at every step by the same rules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringjax.data.example import Example
from ringjax.inference import Sampling, text_prompt
from ringjax.inference.grammar import Grammar, State, advance, state_after
from ringjax.inference.interleaved import generate_interleaved
from ringjax.inference.pieces import Frames, Text, split_pieces
from ringjax.inference.sampling import sample
from tests.inference.small import LONGEST, logits_at, parallel, small_model

CODES, NEW = 3, 40
START, END = (2, 3), (4, 2, 1)
EOF, EOV = 20, 21
GRAMMAR = Grammar(START, END, CODES, EOF, EOV)
OPTIONS = dict(codes_per_frame=CODES, vision_start=START, vision_end=END)
DRAWN = Sampling(temperature=1.0, top_k=12, seed=3)


def model():
    return small_model(vocab_size=6)


def stream(*parts) -> Example:
    """Lists are text, tuples are vision."""
    tokens = np.concatenate([np.array(part, np.int32) for part in parts])
    modality = np.concatenate([np.full(len(part), isinstance(part, tuple)) for part in parts])
    return Example(tokens, modality, np.zeros(len(tokens), bool))


def prompts() -> list[Example]:
    """In text, at an opening that is half there, at a whole one, within a frame, at a mark, and within the end."""
    return [
        text_prompt([1, 5, 0]),
        text_prompt([1, 2]),
        stream([1, 5, 2, 3]),
        stream([1, 2, 3], (7, 8, 9, EOF, 4)),
        stream([1, 5, 2, 3], (7, 8, 9)),
        stream([1, 2, 3], (7, 8, 9, EOF, 1, 2, 3, EOV), [4]),
    ]


def what_is_next(tokens: list[int], modality: list[bool], max_frames: int | None):
    """`text`, the vision ids to choose from, or an id of `</vision>` that has to come, from the stream alone."""
    texts = 0
    while texts < len(tokens) and not modality[-1 - texts]:
        texts += 1
    if texts:
        text = tuple(tokens[len(tokens) - texts :])
        if texts < len(tokens) and texts < len(END) and text == END[:texts]:
            return END[texts]
        return list(range(EOF)) if text[-len(START) :] == START else "text"
    if tokens[-1] == EOV:
        return END[0]
    run = []
    while len(run) < len(tokens) and modality[-1 - len(run)]:
        run.insert(0, tokens[-1 - len(run)])
    frame, frames = run, 0
    while EOF in frame:
        frame, frames = frame[frame.index(EOF) + 1 :], frames + 1
    if len(frame) < CODES:
        return list(range(EOF))
    return [EOV] if frames + 1 == max_frames else [EOF, EOV]


def recomputed(rows, new, text, vision=None, stop_ids=(), max_frames=None):
    """The same in plain Python: every token from a forward pass over all before it."""
    results, vision = [], vision or text
    for number, row in enumerate(rows):
        tokens, modality = row.tokens.tolist(), row.modality.tolist()
        for step in range(new):
            wanted = what_is_next(tokens, modality, max_frames)
            if isinstance(wanted, int):
                tokens.append(wanted)
                modality.append(False)
                continue
            sees, how = wanted != "text", text if wanted == "text" else vision
            padded = np.zeros((2, 1, LONGEST), np.int32)
            padded[:, 0, : len(tokens)] = tokens, modality
            logits = logits_at(model(), sees, marks=True)(padded[0], padded[1] > 0, len(tokens) - 1)
            seen = np.zeros(logits.shape, bool)
            seen[0, [t for t, m in zip(tokens, modality) if m == sees and not (m and t >= EOF)]] = True
            if sees:
                logits = jnp.full_like(logits, -jnp.inf).at[:, np.array(wanted)].set(logits[:, np.array(wanted)])
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(how.seed), number), step)
            tokens.append(int(sample(logits, key[None], how, seen)[0]))
            modality.append(sees)
            if not sees and tokens[-1] in stop_ids:
                break
        results.append((tokens[len(row) :], modality[len(row) :]))
    return results


@functools.cache
def generated(sampling: Sampling, mesh=None, layout="striped", **more):
    options = {} if mesh is None else dict(parallel=parallel(mesh, layout))
    found = generate_interleaved(
        model(), prompts(), max_new_tokens=NEW, sampling=sampling, **OPTIONS, **options, **more
    )
    return found, [(row.tokens.tolist(), row.modality.tolist()) for row in found]


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), DRAWN], ids=["greedy", "sampled"])
def test_the_same_as_recomputing(sampling):
    _, ids = generated(sampling)
    assert ids == recomputed(prompts(), NEW, sampling)
    everything = [token for row in ids for token in row[0]]
    assert {EOF, EOV} <= set(everything)  # clips of several frames, and their ends: all the model's choice
    assert sum(self_opened(*row) for row in ids) > 2


def self_opened(tokens, modality) -> bool:
    """Whether vision begins after text that the model wrote."""
    starts = np.flatnonzero(np.diff(np.array(modality, int)) == 1)
    return any(tuple(tokens[max(0, i + 1 - len(START)) : i + 1]) == START for i in starts)


def test_the_same_with_a_limit_stops_and_penalties():
    """Text and vision drawn differently, both with a penalty."""
    text = Sampling(temperature=0.8, repetition_penalty=1.3, seed=1)
    vision = Sampling(temperature=1.5, top_p=0.9, repetition_penalty=2.0, seed=2)
    found, ids = generated(text, vision_sampling=vision, stop_ids=(0,), max_frames=2)
    assert ids == recomputed(prompts(), NEW, text, vision, (0,), 2)
    clips = [piece.codes for row in found for piece in row.pieces if isinstance(piece, Frames)]
    assert max(map(len, clips)) == 2
    stopped = [tokens for tokens, modality in ids if tokens[-1] == 0 and not modality[-1]]
    assert stopped and any(len(tokens) < NEW for tokens in stopped)
    assert any(0 in np.array(tokens)[np.array(modality)] for tokens, modality in ids)  # code 0 stops nothing


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((1, 1, 1, 8), "striped"),
        ((2, 1, 2, 2), "striped"),
        ((1, 1, 1, 2), "zigzag"),
        ((1, 4, 1, 1), "striped"),
        *(
            pytest.param(shape, layout, marks=SLOW)
            for shape in ((1, 1, 1, 2), (1, 2, 1, 2), (2, 1, 1, 4))
            for layout in ("striped", "zigzag", "contiguous")
        ),
    ],
)
def test_tokens_do_not_depend_on_the_mesh(shape, layout):
    assert generated(DRAWN, shape, layout)[1] == generated(DRAWN)[1]


def test_a_state_is_read_off_the_stream_alone():
    """The prompts, and all that came after them: reading a stream whole is the same as reading it token by token."""
    _, ids = generated(DRAWN)
    for prompt, (tokens, modality) in zip(prompts(), ids):
        state = state_after([prompt], GRAMMAR)
        parts = [prompt.tokens.tolist(), prompt.modality.tolist()]
        for token, vision in zip(tokens, modality):
            assert bool(state.in_vision[0]) == vision
            state = advance(state, jnp.array([token]), GRAMMAR)
            parts = [parts[0] + [token], parts[1] + [vision]]
            whole = state_after([Example(np.array(parts[0]), np.array(parts[1]), np.zeros(len(parts[0])))], GRAMMAR)
            for name in State._fields:
                assert np.array_equal(getattr(state, name), getattr(whole, name)), (name, parts)


def pieces(prompt: Example, *parts):
    new = stream(*parts)
    return [
        tuple(piece.ids.tolist()) if isinstance(piece, Text) else piece.codes.tolist()
        for piece in split_pieces(prompt, new.tokens, new.modality, GRAMMAR)
    ]


def test_pieces_are_without_marks():
    frame, other = (7, 8, 9), (1, 2, 3)
    clip = (*frame, EOF, *other, EOV)
    assert pieces(text_prompt([1]), [5, 5, *START], clip, [*END, 0]) == [(5, 5), [[7, 8, 9], [1, 2, 3]], (0,)]
    assert pieces(text_prompt([1]), [*START], clip, [*END, *START], clip) == [[[7, 8, 9], [1, 2, 3]]] * 2
    assert pieces(text_prompt([1, 2]), [3], clip, [*END[:2]]) == [[[7, 8, 9], [1, 2, 3]]]  # half of <vision> was there
    assert pieces(stream([2, 3], frame[:1]), frame[1:], (EOV,), [*END]) == [[[7, 8, 9]]]  # a frame was begun
    assert pieces(stream([2, 3], (*frame, EOF)), (*other, EOV), [*END, 5]) == [[[1, 2, 3]], (5,)]
    assert pieces(stream([2, 3], (*frame, EOV), [4]), [2, 1, 5]) == [(5,)]  # and here its end
    assert pieces(stream([2, 3], (*frame, EOV)), [*END, 5]) == [(5,)]
    assert pieces(text_prompt([1]), [5, *START], frame[:2]) == [(5,)]  # not whole
    assert pieces(text_prompt([1]), [5, *START]) == [(5,)]
    assert pieces(text_prompt([1]), [5, 3]) == [(5, 3)]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(max_new_tokens=0), ValueError, "max_new_tokens 0 must be"),
        (dict(codes_per_frame=0), ValueError, "codes_per_frame 0 must be"),
        (dict(max_frames=0), ValueError, "max_frames 0 must be at least 1"),
        (dict(vision_start=()), ValueError, "vision_start is empty; give the text ids"),
        (dict(vision_end=(1, 2, 3)), ValueError, "holds vision_start .*: vision would open again"),
        (dict(prompts=[stream([2, 3], (7,) * 4)]), ValueError, "prompt 0 ends with 4 codes and no end mark"),
        (dict(prompts=[text_prompt([])]), ValueError, "prompt 0 is empty"),
        (dict(prompts=[]), ValueError, "there is no prompt"),
        (dict(sampling=Sampling(guidance=2.0)), NotImplementedError, "guidance 2.0 has no meaning"),
        (dict(model=small_model(vision_vocab_size=0)), ValueError, "draws no pictures"),
    ],
)
def test_wrong_calls_say_so(changes, error, message):
    arguments = dict(model=model(), prompts=[text_prompt([1])], max_new_tokens=2, **OPTIONS)
    with pytest.raises(error, match=message):
        generate_interleaved(**{**arguments, **changes})
