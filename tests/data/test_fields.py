"""The example language, token by token."""

import random

import numpy as np
import pytest

from ringjax.data.errors import DataError
from ringjax.data.fields import FieldEncoder, choose, parse
from ringjax.data.tokenizers import ByteTokenizer, load_tokenizer
from tests.inference import published

BOS, EOS = ByteTokenizer.bos_id, ByteTokenizer.eos_id


def text(string: str) -> list[int]:
    return ByteTokenizer().encode(string)


def encoder(**options) -> FieldEncoder:
    return FieldEncoder(ByteTokenizer(), **{"codes_per_frame": 4, "vision_codes": 100, **options})


def loss_of(example) -> list[int]:
    return example.tokens[example.loss].tolist()


def test_a_comma_concatenates_tokens():
    example = encoder().encode({"a": "hi", "b": "you"}, "a,b")
    assert example.tokens.tolist() == [BOS, *text("hi"), *text("you"), EOS]
    assert example.loss.tolist() == [False] + [True] * 6
    assert not example.modality.any()


def test_a_plus_joins_text():
    example = encoder().encode({"a": "hi", "b": "you"}, "a+b")
    assert example.tokens.tolist() == [BOS, *text("hi you"), EOS]
    example = encoder(separator="\n").encode({"a": "hi", "b": "you"}, "a + b")
    assert example.tokens.tolist() == [BOS, *text("hi\nyou"), EOS]


def test_brackets_bear_no_loss():
    example = encoder().encode({"a": "hi", "b": "you"}, "[a],b")
    assert loss_of(example) == [*text("you"), EOS]
    example = encoder().encode({"a": "hi", "b": "you", "c": "!"}, "[a,b],c")
    assert loss_of(example) == [*text("!"), EOS]
    example = encoder().encode({"a": "hi", "b": "you"}, "b,[a]")
    assert loss_of(example) == [*text("you"), EOS], "the end token bears loss whatever is before it"


def test_words_in_quotes_are_text_of_the_spec():
    row = {"a": "a cat", "v": [1, 2, 3, 4]}
    example = encoder().encode(row, '["Draw, [if] you can:"+a+"!\\n"],v')
    assert ByteTokenizer().decode(example.tokens[: example.loss.argmax()].tolist()) == "Draw, [if] you can: a cat !\n"
    assert loss_of(example)[0] == text("<")[0]
    example = encoder().encode(row, '[v],"a \\"+\\" is",a')
    assert ByteTokenizer().decode(loss_of(example)) == 'a "+" isa cat'
    assert [str(field) for field in parse('"x"+a,b')] == ['"x"+a', "b"]


@pytest.mark.parametrize(
    "spec, fault",
    [('"a', "a quote is never closed"), ('a"b"', "neither a name nor words"), ('"a""b"', "neither a name nor words"),
     ('"",a', "no words in the quotes"), ('"\\x"', "neither a name nor words"), ('"a"+<|eos|>', "are tokens")],
)  # fmt: skip
def test_faulty_quotes_are_refused(spec, fault):
    with pytest.raises(ValueError, match=fault):
        parse(spec)


def test_turns_are_enclosed_once():
    bare = encoder(add_bos=False, add_eos=False)
    turns = [bare.encode({"v": [1, 2, 3, 4], "a": a}, "a,v") for a in ("x", "y")]
    example = encoder().enclosed(turns)
    assert example.tokens.tolist() == [BOS, *turns[0].tokens, *turns[1].tokens, EOS]
    assert example.modality.tolist() == [False, *turns[0].modality, *turns[1].modality, False]
    assert example.loss.tolist() == [False] + [True] * (len(example) - 1)


def test_special_tokens_stand_where_the_spec_says():
    row = {"a": "hi", "b": "you"}
    example = encoder().encode(row, "[a],<|eos|>,[<|bos|>],b")
    assert example.tokens.tolist() == [BOS, *text("hi"), EOS, BOS, *text("you"), EOS]
    assert loss_of(example) == [EOS, *text("you"), EOS]


def test_special_tokens_by_their_own_names(tmp_path):
    """A turn of a conversation: its marks are special tokens, the same characters in a text are not."""
    tokenizer = load_tokenizer(str(published.write(tmp_path / "model")))
    encoder = FieldEncoder(tokenizer, add_bos=False, add_eos=False)
    example = encoder.encode({"a": "<|im_end|>"}, '[<|im_start|>,"user\\n"+a],<|im_end|>')
    start, end = (tokenizer.specials[name] for name in ("<|im_start|>", "<|im_end|>"))
    assert example.tokens.tolist() == [start, *tokenizer.encode("user\n <|im_end|>"), end]
    assert example.loss.tolist() == [False] * (len(example) - 1) + [True]
    whole = FieldEncoder(tokenizer).encode({"a": "b"}, "<|endoftext|>,a,<|im_end|>")  # its begin and end: not doubled
    assert whole.tokens.tolist() == [tokenizer.bos_id, *tokenizer.encode("b"), tokenizer.eos_id]
    with pytest.raises(DataError, match=r"line 3: the tokenizer has no special token <\|x\|>; it has <\|endoftext\|>"):
        encoder.encode({"a": "b"}, "a,<|x|>", "line 3")


def test_begin_and_end_are_never_doubled():
    example = encoder().encode({"a": "hi"}, "<|bos|>,a,<|eos|>")
    assert example.tokens.tolist() == [BOS, *text("hi"), EOS]
    bare = encoder(add_bos=False, add_eos=False).encode({"a": "hi"}, "a")
    assert bare.tokens.tolist() == text("hi")


def test_frames_end_with_marks_between_vision_tags():
    codes = [11, 12, 13, 14, 21, 22, 23, 24]
    example = encoder().encode({"vision": codes, "caption": "cat"}, "[vision],caption")
    vision = [11, 12, 13, 14, 100, 21, 22, 23, 24, 101]
    start, end = text("<vision>"), text("</vision>")
    assert example.tokens.tolist() == [BOS, *start, *vision, *end, *text("cat"), EOS]
    assert example.tokens[example.modality].tolist() == vision
    assert loss_of(example) == [*text("cat"), EOS]
    drawn = encoder().encode({"vision": codes, "caption": "cat"}, "[caption],vision")
    assert loss_of(drawn) == [*start, *vision, *end, EOS]


def test_one_frame_ends_the_vision():
    example = encoder().encode({"vision": [1, 2, 3, 4]}, "vision")
    assert example.tokens[example.modality].tolist() == [1, 2, 3, 4, 101]


def test_any_field_of_codes_is_vision_and_text_named_vision_is_text():
    example = encoder().encode({"television": "on", "before": [1, 2, 3, 4]}, "[before],television")
    assert example.tokens[example.modality].tolist() == [1, 2, 3, 4, 101]
    assert loss_of(example) == [*text("on"), EOS]


def test_the_lwm_sizes_are_the_default():
    example = FieldEncoder(ByteTokenizer()).encode({"vision": [7] * 512}, "vision")
    assert np.flatnonzero(example.tokens[example.modality] == 8192).tolist() == [256]
    assert np.flatnonzero(example.tokens[example.modality] == 8193).tolist() == [513]


def test_too_many_frames_are_thinned_evenly():
    codes = np.repeat(np.arange(9), 4).tolist()
    example = encoder(max_frames=3).encode({"vision": codes}, "vision")
    kept = example.tokens[example.modality].reshape(3, 5)
    assert kept[:, 0].tolist() == [0, 4, 8]
    assert kept[:, 4].tolist() == [100, 100, 101]


def test_a_list_is_chosen_from_by_line_number():
    specs = ["a", "b", "c"]
    chosen = [choose(specs, line) for line in range(60)]
    assert chosen == [random.Random(line).choice(specs) for line in range(60)]
    assert set(chosen) == set(specs)


def test_a_lines_own_fields_come_first():
    row = {"fields": ["[a],b"], "a": "hi", "b": "you"}
    assert loss_of(encoder().encode_line(row, "a", 0, "f")) == [*text("you"), EOS]
    assert loss_of(encoder().encode_line({"a": "hi"}, "a", 0, "f")) == [*text("hi"), EOS]


@pytest.mark.parametrize(
    "spec, fault",
    [
        ("", "name is missing"),
        ("a,,b", "name is missing"),
        ("a+", "name is missing"),
        ("[]", "name is missing"),
        ("[a", "never closed"),
        ("a]", "do not pair"),
        ("[[a]]", "do not pair"),
        ("[a,[b],c]", "do not pair"),
        ("[a]b,c", "do not pair"),
        ("a+<|eos|>", "are tokens, not text"),
        ("<|im_start|>+a", "are tokens, not text"),
    ],
)
def test_faulty_specs_are_refused(spec, fault):
    with pytest.raises(ValueError, match=fault):
        parse(spec)
    with pytest.raises(DataError, match=f"^data.jsonl line 3: .*{fault}"):
        encoder().encode({"a": "x", "b": "y", "c": "z"}, spec, "data.jsonl line 3")


@pytest.mark.parametrize(
    "row, fault",
    [
        ({}, "no 'fields' in the line"),
        ({"fields": 3}, "'fields' must be a string or a list of strings, not int 3"),
        ({"fields": []}, "'fields' must be"),
        ({"fields": ["a", 1]}, "'fields' must be"),
        ({"fields": "caption"}, "field 'caption' is missing; the line has fields"),
        ({"fields": "caption", "caption": ""}, "field 'caption' is empty"),
        ({"fields": "caption", "caption": " \n"}, "field 'caption' is empty"),
        ({"fields": "caption", "caption": None}, "field 'caption' must be text or a flat list"),
        ({"fields": "caption", "caption": 3.5}, "must be text or a flat list"),
        ({"fields": "a+b", "a": "x", "b": [1]}, "field 'b' must be text here, not list"),
        ({"fields": "vision", "vision": []}, "0 codes, which is not a whole number of frames of 4"),
        ({"fields": "vision", "vision": [1, 2, 3, 4, 5]}, "5 codes, which is not a whole number"),
        ({"fields": "vision", "vision": [1, 2, 3, 100]}, "code 100 at 3; codes are 0 to 99"),
        ({"fields": "vision", "vision": [-1, 2, 3, 4]}, "code -1 at 0"),
        ({"fields": "vision", "vision": [1, 2, 3, 2**70]}, "beyond any codebook"),
        ({"fields": "vision", "vision": [1, 2, 3, 4.0]}, "flat list of whole numbers"),
        ({"fields": "vision", "vision": [1, 2, 3, True]}, "flat list of whole numbers"),
        ({"fields": "vision", "vision": [[1, 2, 3, 4]]}, "flat list of whole numbers"),
        ({"fields": "[a]", "a": "x"}, None),
        ({"fields": "[a],[<|eos|>]", "a": "x"}, "no token bears loss"),
    ],
)
def test_faults_name_place_and_field(row, fault):
    if fault is None:
        assert loss_of(encoder().encode_line(row, None, 0, "f")) == [EOS]
        return
    with pytest.raises(DataError) as error:
        encoder().encode_line(row, None, 0, "data.jsonl line 3")
    assert str(error.value).startswith("data.jsonl line 3: ") and fault in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "spec, fault",
    [
        ("a\x007\x00b", "holds the character NUL"),
        ('"' + '\\"' * 60_000, "characters, more than 4096"),
        ("a," * 3000, "4096"),
    ],
    ids=["nul", "quotes", "long"],
)
def test_specs_that_no_one_means(spec, fault):
    with pytest.raises(ValueError, match=fault):
        parse(spec)
    with pytest.raises(DataError, match=f"line 1: fields .*{fault}"):
        encoder().encode_line({"a": "x", "fields": spec}, None, 0, "line 1")


def test_half_a_surrogate_pair_in_words_of_a_spec():
    with pytest.raises(DataError, match="line 1: field .* holds half of a surrogate pair"):
        encoder().encode_line({"a": "x", "fields": '"\\ud800"+a'}, None, 0, "line 1")
