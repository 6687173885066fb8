"""Tokens do not depend on the mesh, and equal those of recomputing the whole sequence at every step."""

import jax
import numpy as np
import pytest

from ringjax.data.example import Example
from ringjax.inference import Sampling, append_text, generate_frames, generate_text, text_prompt
from ringjax.inference.generate import Plan, _generate
from ringjax.inference.prompts import _joined
from ringjax.inference.sampling import guide, sample
from ringjax.models import Parallel
from tests.inference.small import LONGEST, logits_at, parallel, small_model

CODES, NEW = 4, 7


def prompts() -> list[Example]:
    """Different lengths, and one that holds a picture."""
    picture = np.array([3, 17, 5, 9, 21], np.int32)
    seen = Example(picture, np.ones(5, bool), np.zeros(5, bool))
    mixed = Example(
        *(np.concatenate([getattr(a, f) for a in (text_prompt([1, 3]), seen)]) for f in ("tokens", "modality", "loss"))
    )
    return [text_prompt([1, 7, 9]), append_text(mixed, [4]), text_prompt(list(range(1, 20))), text_prompt([1])]


def recomputed(model, rows, new, sampling, *, partners=None, codes=0):
    """The same without cache, batch, padding or loop: every token from a forward pass over all before it."""
    config, results = model.config, []

    def look(row, tail):
        tokens, modality = np.zeros((1, LONGEST), np.int32), np.zeros((1, LONGEST), bool)
        end = len(row) + len(tail)
        tokens[0, :end] = [*row.tokens, *tail]
        modality[0, :end] = [*row.modality, *[codes > 0] * len(tail)]
        return logits_at(model, codes > 0)(tokens, modality, end - 1)

    for number, row in enumerate(rows):
        key, tail = jax.random.fold_in(jax.random.key(sampling.seed), number), []
        for step in range(new):
            logits = look(row, tail)
            if partners is not None:
                logits = guide(logits, look(partners[number], tail), sampling.guidance)
            seen = np.zeros(logits.shape, bool)
            held = [t for t, vision in zip(row.tokens, row.modality) if vision == (codes > 0)] + tail
            seen[0, [t for t in held if t < seen.shape[1]]] = True
            token = int(sample(logits, jax.random.fold_in(key, step)[None], sampling, seen)[0])
            if codes and step % (codes + 1) == codes:
                token = config.end_of_vision if step == new - 1 else config.end_of_frame
            tail.append(token)
        results.append(tail)
    return results


DRAWN = Sampling(temperature=1.0, top_k=12, top_p=0.95, seed=3)


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), DRAWN], ids=["greedy", "sampled"])
def test_text_equals_recomputing(sampling):
    model = small_model()
    found = generate_text(model, prompts(), max_new_tokens=NEW, sampling=sampling)
    assert [row.tolist() for row in found] == recomputed(model, prompts(), NEW, sampling)


def test_frames_equal_recomputing_with_guidance():
    model, sampling = small_model(), Sampling(guidance=2.5, seed=1, repetition_penalty=1.3)
    rows, partners = prompts()[:2], [text_prompt([1]), text_prompt([1, 3])]
    found = generate_frames(
        model, rows, codes_per_frame=CODES, frames=2, sampling=sampling, unconditional=partners
    )  # fmt: skip
    want = np.array(recomputed(model, rows, 2 * (CODES + 1), sampling, partners=partners, codes=CODES))
    assert want[:, CODES].tolist() == [20, 20] and want[:, -1].tolist() == [21, 21]
    assert found.shape == (2, 2, CODES)
    np.testing.assert_array_equal(found, want.reshape(2, 2, CODES + 1)[..., :-1])


def test_repetition_makes_a_difference():
    """Greedy words repeat; with a penalty on several devices there are more of them."""
    held = Sampling(temperature=0, repetition_penalty=4.0)
    free = generate_text(small_model(), prompts(), max_new_tokens=NEW, sampling=Sampling(temperature=0))
    many = generate_text(small_model(), prompts(), max_new_tokens=NEW, sampling=held, parallel=parallel((2, 1, 2, 2)))
    assert [row.tolist() for row in many] == recomputed(small_model(), prompts(), NEW, held)
    assert sum(len(set(row.tolist())) for row in many) > sum(len(set(row.tolist())) for row in free)


def test_a_sliding_window_is_kept():
    model = small_model(window=4)
    found = generate_text(model, prompts(), max_new_tokens=NEW, sampling=DRAWN)
    assert [row.tolist() for row in found] == recomputed(model, prompts(), NEW, DRAWN)
    assert [row.tolist() for row in found] != recomputed(small_model(), prompts(), NEW, DRAWN)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((1, 1, 1, 8), "striped"), ((2, 1, 2, 2), "striped"), ((1, 1, 1, 4), "zigzag"), ((1, 3, 1, 2), "contiguous")],
)
def test_tokens_do_not_depend_on_the_mesh(shape, layout):
    model = small_model()
    one = generate_text(model, prompts(), max_new_tokens=NEW, sampling=DRAWN)
    many = generate_text(model, prompts(), max_new_tokens=NEW, sampling=DRAWN, parallel=parallel(shape, layout))
    assert [row.tolist() for row in many] == [row.tolist() for row in one]


def test_guided_frames_do_not_depend_on_the_mesh():
    options = dict(codes_per_frame=CODES, sampling=Sampling(guidance=3.0, seed=5), unconditional=[text_prompt([1])] * 3)
    one = generate_frames(small_model(), prompts()[:3], **options)
    many = generate_frames(small_model(), prompts()[:3], **options, parallel=parallel((2, 1, 1, 4)))
    np.testing.assert_array_equal(one, many)


def test_guidance_of_one_is_no_guidance():
    plain = generate_frames(small_model(), prompts()[:2], codes_per_frame=CODES)
    beside = generate_frames(small_model(), prompts()[:2], codes_per_frame=CODES, unconditional=[text_prompt([1])] * 2)
    np.testing.assert_array_equal(plain, beside)


def test_a_row_ends_at_its_own_stop_token():
    model = small_model()
    free = generate_text(model, prompts(), max_new_tokens=12, sampling=DRAWN)
    stop = int(free[0][4])
    held = generate_text(model, prompts(), max_new_tokens=12, sampling=DRAWN, stop_ids=[stop])
    for row, whole in zip(held, free):
        places = np.flatnonzero(whole == stop)
        assert row.tolist() == whole[: places[0] + 1 if len(places) else None].tolist()
    assert len(held[0]) <= 5


def test_nothing_is_sampled_after_the_stop():
    stops = tuple(range(1, 40, 2))  # not 0, which is what follows
    tokens = _generate(small_model(), prompts(), Plan(12, stops), DRAWN, None, Parallel())
    for row in tokens:
        places = np.flatnonzero(np.isin(row, stops))
        assert len(places) and not row[places[0] + 1 :].any()


def test_rows_do_not_see_each_other():
    alone = generate_text(small_model(), prompts()[:1], max_new_tokens=NEW, sampling=DRAWN)
    together = generate_text(small_model(), prompts(), max_new_tokens=NEW, sampling=DRAWN)
    assert alone[0].tolist() == together[0].tolist()


def test_wrong_calls_say_so():
    model, text_only = small_model(), small_model(vision_vocab_size=0)
    with pytest.raises(ValueError, match="max_new_tokens 0 must be"):
        generate_text(model, prompts(), max_new_tokens=0)
    with pytest.raises(ValueError, match="there is no prompt"):
        generate_text(model, [], max_new_tokens=1)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate_text(model, [text_prompt([1]), text_prompt([])], max_new_tokens=1)
    with pytest.raises(ValueError, match="draws no pictures"):
        generate_frames(text_only, prompts()[:1], codes_per_frame=CODES)
    with pytest.raises(ValueError, match="guidance 2.0 needs as many unconditional prompts as prompts"):
        generate_frames(model, prompts()[:2], codes_per_frame=CODES, sampling=Sampling(guidance=2.0))


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(temperature=0, repetition_penalty=1.5)])
@pytest.mark.parametrize("axes, layout", [(None, "striped"), ((2, 1, 2, 2), "zigzag")])
def test_a_shared_prefix_is_as_if_each_had_it(axes, layout, sampling):
    """With a picture in it."""
    model, rows = small_model(), prompts()
    prefix = rows[1]
    whole = [_joined(prefix, row) for row in rows]
    expected = generate_text(model, whole, max_new_tokens=NEW, sampling=sampling)
    options = {} if axes is None else dict(parallel=parallel(axes, layout))
    found = generate_text(model, rows, prefix=prefix, max_new_tokens=NEW, sampling=sampling, **options)
    assert [x.tolist() for x in found] == [x.tolist() for x in expected]
    without = generate_text(model, rows, max_new_tokens=NEW, sampling=sampling)
    assert [x.tolist() for x in without] != [x.tolist() for x in expected]


def test_a_shared_prefix_refuses_guidance():
    with pytest.raises(NotImplementedError, match="a shared prefix and guidance 2"):
        generate_text(small_model(), prompts(), prefix=prompts()[0], max_new_tokens=1, sampling=Sampling(guidance=2.0))
