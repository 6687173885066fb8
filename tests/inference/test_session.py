"""A conversation's cache: the same tokens however they came into it, on any mesh; and text that streams."""

import itertools

import numpy as np
import pytest

from ringjax.attention.quantised import dequantise
from ringjax.inference import generate_text, text_prompt
from ringjax.inference import room as rooms
from ringjax.inference import session as session_module
from ringjax.inference.sampling import Sampling
from ringjax.inference.session import Session
from ringjax.inference.streaming import stream_text
from ringjax.models import ModelConfig, Parallel, Transformer
from tests.models import cases

GREEDY = Sampling(temperature=0)
PROMPT = np.random.default_rng(0).integers(0, 61, 37).tolist()


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        width=32, ffn_width=48, layers=2, heads=4, kv_heads=2, vocab_size=62, vision_vocab_size=0, dtype="float32",
        init_std=0.3, window=None,
    )  # fmt: skip
    return Transformer.create(config, 3)


@pytest.fixture(scope="module")
def expected(model):
    return generate_text(model, [text_prompt(PROMPT)], max_new_tokens=12, sampling=GREEDY)[0].tolist()


def tokens(session, ids=PROMPT, count=12, sampling=GREEDY, **options):
    return list(session.generate(ids, max_new_tokens=count, sampling=sampling, **options))


@pytest.mark.parametrize("chunk", [4, 16, 64])
def test_chunks_make_no_difference(model, expected, chunk):
    assert tokens(Session(model, 64, chunk=chunk)) == expected


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "axes, layout",
    [
        ((1, 1, 1, 8), "striped"),
        ((1, 1, 1, 8), "zigzag"),
        ((1, 1, 1, 2), "contiguous"),
        ((1, 2, 2, 2), "striped"),
        *(
            pytest.param(axes, layout, marks=SLOW)
            for axes in ((1, 1, 1, 2), (1, 1, 1, 4), (1, 2, 2, 2), (2, 1, 2, 2))
            for layout in ("striped", "zigzag", "contiguous")
        ),
    ],
)
def test_any_mesh_and_layout(model, expected, axes, layout):
    assert tokens(Session(model, 64, Parallel(cases.mesh(*axes), layout), chunk=16)) == expected


def test_the_cache_is_cut_over_the_ring_and_stays_there(model):
    session = Session(model, 64, Parallel(cases.mesh(1, 1, 2, 4)))
    for _ in range(2):
        assert session._cache.k.addressable_shards[0].data.shape == (2, 1, 16, 1, 8)
        tokens(session)
        session.rewind(3)


@pytest.mark.parametrize("axes, layout", [(None, "striped"), ((1, 1, 1, 4), "striped"), ((1, 1, 1, 4), "zigzag")])
def test_a_cache_grows_as_it_fills(model, expected, monkeypatch, axes, layout):
    monkeypatch.setattr("ringjax.inference.session.FIRST_ROOM", 8)
    session = Session(model, 56, Parallel(None if axes is None else cases.mesh(*axes), layout), chunk=8)
    rooms = [session._cache.capacity]
    assert tokens(session) == expected
    rooms.append(session._cache.capacity)
    assert rooms == {"zigzag": [56, 56], "striped": [8 if axes is None else 32, 56 if axes is None else 64]}[layout]


def test_a_ring_of_three_has_whole_shares(model, expected):
    session = Session(model, 3000, Parallel(cases.mesh(1, 1, 1, 3)), chunk=64)
    assert session._cache.capacity == 1032 and tokens(session) == expected


def test_a_window_sees_no_further(model):
    from ringjax.models.transformer import with_config

    narrow = with_config(model, window=5)
    expected = generate_text(narrow, [text_prompt(PROMPT)], max_new_tokens=12, sampling=GREEDY)[0].tolist()
    assert tokens(Session(narrow, 64, chunk=8)) == expected != tokens(Session(model, 64))


@pytest.mark.parametrize("axes", [None, (1, 1, 1, 4)])
@pytest.mark.parametrize("sinks", [0, 3])
def test_a_windows_cache_is_bounded(model, axes, sinks):
    """What has left the window goes, the sinks stay, and the tokens are those of an unbounded cache."""
    from ringjax.models.transformer import with_config

    narrow = with_config(model, window=5, sinks=sinks)
    expected = generate_text(narrow, [text_prompt(PROMPT)], max_new_tokens=60, sampling=GREEDY)[0].tolist()
    session = Session(narrow, 400, Parallel(None if axes is None else cases.mesh(*axes)), chunk=8)
    assert tokens(session, count=60) == expected
    assert session._cache.capacity <= 32 and session._dropped > 60 and len(session.ids) == len(PROMPT) + 59
    assert session.rewind(len(session.ids) - 1) > 0  # the window before it is there still
    assert tokens(session, expected[58:59], 1) == expected[59:]
    assert session.rewind(40) == 0 and session.ids == []
    assert tokens(session, count=3) == expected[:3]


@pytest.mark.parametrize("axes, layout", [(None, "striped"), ((1, 1, 2, 4), "striped"), ((1, 1, 1, 2), "zigzag")])
def test_an_int8_cache(model, monkeypatch, axes, layout):
    """A quarter of float32's memory; the same however it was filled, and near the exact one."""
    monkeypatch.setattr("ringjax.inference.session.RING_FROM", 10)
    parallel = Parallel(None if axes is None else cases.mesh(*axes), layout)
    session = Session(model, 64, parallel, chunk=16, cache_type="int8")
    found = tokens(session, count=8)
    assert found == tokens(Session(model, 64, chunk=64, cache_type="int8"), count=8)
    whole = Session(model, 64, chunk=64)
    whole.feed(PROMPT)
    session.rewind(len(PROMPT))
    assert session._cache.k.dtype == np.int8 and session._cache.k_scale.shape == session._cache.k.shape[:-1]
    if axes is None:
        kept = dequantise(session._cache.k, session._cache.k_scale, np.float32)[:, :, : len(PROMPT)]
        error = np.abs(kept - whole._cache.k[:, :, : len(PROMPT)])
        assert 0 < error.max() < 0.2 and error.mean() < 0.02


@pytest.mark.parametrize("lead", [0, 1])
@pytest.mark.parametrize("burst", [1, 3])
def test_steps_ahead_and_several_at_once_change_nothing(model, expected, lead, burst):
    """Where it stops, where the cache ends, and where somebody stops listening in the middle."""
    session = Session(model, 40)
    session._lead, session._burst = lead, burst
    assert tokens(session, stop_ids=[expected[2]]) == expected[: expected.index(expected[2]) + 1]
    session.rewind(0)
    assert tokens(session) == expected[:4] and len(session.ids) == 40
    long = Session(model, 64)
    long._lead, long._burst = lead, burst
    drawn = Sampling(temperature=4.0, seed=5)
    for count in (1, 2, 4, 5, 12):
        assert tokens(long, count=count) == expected[:count] and long.ids == PROMPT + expected[: count - 1]
        long.rewind(0)
    whole = tokens(Session(model, 64), sampling=drawn)
    listening = long.generate(PROMPT, max_new_tokens=12, sampling=drawn)
    heard = [next(listening) for _ in range(5)]
    listening.close()
    assert heard == whole[:5] and long.ids == PROMPT + heard[:4]
    assert tokens(long, heard[4:], 7, sampling=drawn) == whole[5:]
    for count in (1, 2, 3, 7):  # a token that follows a prompt is drawn as one that was written after others
        long.rewind(0)
        assert tokens(long, PROMPT + whole[:count], 1, sampling=drawn) == whole[count : count + 1]


@pytest.mark.parametrize("axes", [None, (1, 1, 2, 4)])
def test_a_first_chunk_goes_through_the_ring(model, monkeypatch, axes):
    parallel = Parallel(None if axes is None else cases.mesh(*axes))
    expected = tokens(Session(model, 64, parallel, chunk=8))
    monkeypatch.setattr("ringjax.inference.session.RING_FROM", 10)
    for chunk in (16, 64):
        assert tokens(Session(model, 64, parallel, chunk=chunk)) == expected


def test_going_on_and_going_back(model, expected):
    """What is rewound leaves nothing behind; drawn tokens depend on their place only."""
    session = Session(model, 64)
    drawn = Sampling(temperature=1.0, seed=5)
    first = tokens(session, sampling=drawn)
    assert session.ids == PROMPT + first[:-1]
    session.rewind(20)
    tokens(session, [1, 2, 3], 4)
    session.rewind(20)
    assert tokens(session, PROMPT[20:]) == expected
    session.rewind(36)
    assert tokens(session, PROMPT[36:], sampling=drawn) == first
    assert tokens(Session(model, 64), sampling=Sampling(temperature=1.0, seed=6)) != first


@pytest.mark.parametrize("axes, burst", [(None, 5), ((1, 1, 1, 4), 6)])
def test_one_program_for_all_bursts(model, axes, burst):
    """After the prompt and after another burst: each program takes seconds to compile."""
    session = Session(model, 64, Parallel(None if axes is None else cases.mesh(*axes)))
    session._lead, session._burst = 1, burst
    before = session_module._burst._cache_size()
    assert len(tokens(session, count=1 + 3 * burst)) == 1 + 3 * burst
    assert session_module._burst._cache_size() == before + 1


@pytest.mark.parametrize("room, whole", [("plenty", True), ("for the cache alone", False), (None, False)])
def test_weights_do_not_cross_the_ring_where_they_fit(model, expected, monkeypatch, room, whole):
    """Cut over the ring, all of them are gathered for every token."""
    parallel = Parallel(cases.mesh(1, 1, 1, 4))
    free = {"plenty": 2**30, "for the cache alone": 1.2 * rooms.cache_bytes(model.config, 1, 64, parallel), None: 0}
    memory = None if room is None else rooms.Memory(int(free[room]), 0)
    monkeypatch.setattr(rooms, "memory_now", lambda parallel: memory)
    session = Session(model, 64, parallel)
    one, numbers = np.zeros((1, 1), np.int32), np.zeros(2, np.int32)
    burst = session_module._burst.lower(session._shape, GREEDY, 1, session._params, session._cache, one, numbers, None)
    assert ("all-gather" in burst.compile().as_text()) != whole
    assert tokens(session) == expected


@pytest.mark.parametrize("axes, ahead", [(None, 0), (None, 1), ((1, 1, 1, 4), 0)])
def test_repetition_costs_as_in_one_go(model, expected, monkeypatch, axes, ahead):
    """Of the whole conversation: what was in the cache before this turn counts too, and so do steps sent ahead."""
    monkeypatch.setattr("ringjax.inference.session.RING_FROM", 16)
    penalty = Sampling(temperature=0, repetition_penalty=1.4)
    want = generate_text(model, [text_prompt(PROMPT)], max_new_tokens=12, sampling=penalty)[0].tolist()
    for kept in (20, 0) if axes is None and ahead else (20,):
        session = Session(model, 64, Parallel(None if axes is None else cases.mesh(*axes)))
        session._lead = ahead
        session.feed(PROMPT[:kept])
        assert tokens(session, PROMPT[kept:], sampling=penalty) == want != expected


def test_a_chunk_of_nothing(model):
    with pytest.raises(ValueError, match="chunk 0 must be at least 1 token"):
        Session(model, 64, chunk=0)


def test_it_stops(model, expected):
    session = Session(model, 64)
    assert tokens(session, stop_ids=[expected[3]]) == expected[: expected.index(expected[3]) + 1]


def test_a_full_cache_ends_the_answer_and_says_so_before(model, expected):
    session = Session(model, 40)
    assert tokens(session) == expected[:4] and len(session.ids) == 40
    with pytest.raises(ValueError, match="1 tokens after the 40 in the cache do not fit its 40; ask for more with"):
        session.feed([1])
    with pytest.raises(ValueError, match="41 tokens after the 0"):
        tokens(Session(model, 40), [1] * 41)
    with pytest.raises(ValueError, match="nothing to go on from"):
        tokens(session, [])


def bytes_so_far(ids):
    return bytes(ids).decode("utf-8", errors="replace").rstrip("\N{REPLACEMENT CHARACTER}")


TEXT = "naïve 日本語 \N{GRINNING FACE} and plain text, " * 4


def test_text_comes_in_whole_characters():
    pieces = list(stream_text(TEXT.encode(), bytes_so_far))
    assert "".join(pieces) == TEXT and "日" in pieces and all("\N{REPLACEMENT CHARACTER}" not in p for p in pieces)
    assert list(stream_text([], bytes_so_far)) == []


@pytest.mark.parametrize("stops", [("plain",), ("an", "plain"), ("text, na",), ("never", "語 "), ("zzz",)])
def test_stop_strings_are_never_shown(stops):
    ends = [place for place in (TEXT.find(stop) for stop in stops) if place >= 0]
    expected = TEXT[: min(ends, default=len(TEXT))]
    ids = iter(TEXT.encode())
    shown = ""
    for piece in stream_text(ids, bytes_so_far, stops):
        shown += piece
        assert expected.startswith(shown)
    assert shown == expected
    assert (next(ids, None) is None) == (not ends)  # nothing more is asked of the model


def test_an_unfinished_stop_string_is_shown_in_the_end():
    assert "".join(stream_text(b"so it beg", bytes_so_far, ["begins"])) == "so it beg"


def test_a_long_text_is_decoded_in_parts():
    lengths = []

    def whole_text(ids):
        lengths.append(len(ids))
        return bytes_so_far(ids)

    long = list(itertools.chain.from_iterable(TEXT.encode() for _ in range(20)))
    assert "".join(stream_text(long, whole_text)) == TEXT * 20 and max(lengths) <= 32
