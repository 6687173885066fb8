"""Chat templates, tokenizers of published models, and `ringjax chat` in the terminal."""

import io
import json
import re

import pytest

from ringjax import cli
from ringjax.inference.chat_command import ChatConfig, run_chat
from ringjax.inference.chat_template import LWM, ChatTemplate
from ringjax.inference.command import run_generate
from ringjax.inference.generate_config import GenerateConfig
from ringjax.inference.room import Memory
from ringjax.inference.sampling import Sampling
from ringjax.inference.text_model import TextModel
from ringjax.inference.vocabulary import Vocabulary
from ringjax.interop.published import open_published
from tests.inference import published
from tests.interop.tokenizers_small import TEMPLATE

QUESTION = [{"role": "user", "content": "Why?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return published.write(tmp_path_factory.mktemp("chat") / "model")


def talk(folder, *lines, **options) -> str:
    shown = []
    run_chat(ChatConfig(str(folder), dtype="float32", max_new_tokens=6, **options), lines, shown.append)
    return re.sub(r"[\d.]+ tokens/s", "… tokens/s", "".join(shown))


def test_templates_write_turns():
    turns = [{"role": "system", "content": "Be brief."}, *QUESTION]
    assert ChatTemplate(TEMPLATE).render(turns) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    lwm = ChatTemplate(LWM, {"bos_token": "<s>"})
    assert lwm.render(QUESTION) == "<s>You are a helpful assistant. USER: Why? ASSISTANT:"
    more = [*QUESTION, {"role": "assistant", "content": "So."}, *QUESTION]
    assert lwm.render(more) == "<s>You are a helpful assistant. USER: Why? ASSISTANT: So. USER: Why? ASSISTANT:"


def test_the_default_of_several_templates():
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "{{ messages[0].content }}"}]
    assert ChatTemplate.of({"chat_template": several}).render(QUESTION) == "Why?"
    assert ChatTemplate.of({}) is None and ChatTemplate.of({"chat_template": [{"name": "tool_use"}]}) is None


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[-1].__subclasses__() }}",
        "{{ ''.__class__.__base__.__subclasses__()[0] }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ range(10**9) | list }}",
    ],
)
def test_a_template_can_do_nothing_but_text(template):
    with pytest.raises(ValueError, match="the chat template refuses this conversation"):
        ChatTemplate(template).render(QUESTION)


def test_text_that_is_no_template():
    with pytest.raises(ValueError, match="the chat template is not one"):
        ChatTemplate("{% for m in messages %}")


def test_what_people_type_is_no_special_token(folder):
    vocabulary = Vocabulary.of(open_published(folder))
    assert vocabulary.encode_template("<|im_start|>a", ["a"])[0] == 1 and len(vocabulary.encode("<|im_end|>")) == 10
    assert vocabulary.decode(vocabulary.encode("<|im_end|> é")) == "<|im_end|> é"
    with pytest.raises(ValueError, match=r"the message holds '<\|im_end\|>', which would end or begin a turn"):
        vocabulary.encode_template("x", ["now <|im_end|>"])
    assert vocabulary.decode([1, *vocabulary.encode("hi"), 2]) == "hi"


def test_a_conversation_keeps_its_cache(folder, monkeypatch):
    fed = []
    advance = "ringjax.inference.session.Session._advance"
    from ringjax.inference.session import Session

    real = Session._advance
    monkeypatch.setattr(advance, lambda self, ids, *rest: fed.append(len(ids)) or real(self, ids, *rest))
    shown = talk(folder, "Hello there", "And now?")
    model = TextModel.load(folder, dtype="float32")
    first = model.chat_ids([{"role": "user", "content": "Hello there"}])
    second = model.chat_ids([{"role": "user", "content": "And now?"}])
    assert fed[0] == len(first) and len(fed) == 2
    assert fed[1] < len(second) + 20  # not the first turn again
    assert shown.count("tokens/s, context") == 2 and f"of {model.context}]" in shown


def test_commands_and_what_cannot_be_answered(folder):
    shown = talk(folder, "", "one", "a <|im_end|> b", "/reset", "x" * 200, "two", "/exit", "three", context=90)
    assert "which would end or begin a turn" in shown and "do not fit its 90; ask for more with --context" in shown
    assert shown.count("[") == 2 and "context of 90 tokens" in shown


def test_the_system_message_and_other_templates(folder, tmp_path):
    base = talk(folder, "hi", temperature=0.0)
    assert talk(folder, "hi", temperature=0.0, template="chatml") == base
    assert talk(folder, "hi", temperature=0.0, system="Answer in verse.") != base
    own = tmp_path / "own.jinja"
    own.write_text("{{ messages[-1]['content'] }}!")
    assert "[" in talk(folder, "hi", template=str(own))
    with pytest.raises(FileNotFoundError, match="template 'none.jinja' is neither chatml nor lwm nor a file"):
        talk(folder, "hi", template="none.jinja")


def test_a_model_without_a_template_says_how(tmp_path):
    folder = published.write(tmp_path / "model", template=None)
    with pytest.raises(ValueError, match="no chat template; name one: --template chatml | lwm"):
        talk(folder, "hi")


def test_a_tokenizer_that_does_not_fit(tmp_path):
    folder = published.write(tmp_path / "model", vocab_size=2)
    with pytest.raises(ValueError, match=r"tokens <\|im_end\|> are beyond the model's vocabulary of 2"):
        TextModel.load(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json is not a whole tokenizer.json"):
        TextModel.load(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="has neither tokenizer.json nor tokenizer.model"):
        TextModel.load(folder)


def test_the_command_line_chats(folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n\n/exit\n"))
    assert cli.main(["chat", str(folder), "--dtype", "float32", "--max_new_tokens", "4"]) == 0
    assert "tokens/s, context" in capsys.readouterr().out
    for arguments, message in (
        (["chat", "nowhere"], "no model at nowhere; give a Hugging Face folder or a .gguf file"),
        (["chat", str(folder), "more"], "ringjax chat takes one MODEL"),
        (["chat", str(folder), "--temperature", "-1"], "temperature -1.0 must be 0 or more"),
        (["chat", str(folder), "--stop", ""], "stop '' would end every answer"),
    ):
        assert cli.main(arguments) != 0
        assert message in capsys.readouterr().err


def test_generate_takes_published_models(folder, tmp_path, capsys):
    file = tmp_path / "prompt.txt"
    file.write_text("Once upon a time")
    options = ["--max_new_tokens", "5", "--temperature", "0"]
    assert cli.main(["generate", str(folder), "--prompt_file", str(file), *options]) == 0
    from_file = capsys.readouterr().out
    assert from_file.startswith("Once upon a time")
    assert cli.main(["generate", str(folder), "--prompt", "Once upon a time", *options]) == 0
    assert capsys.readouterr().out == from_file
    file.write_text(" \n")
    for more, message in (
        (["--prompt_file", str(file)], "is empty; there is nothing to begin with"),
        (["--prompt", "a", "--draw", "a.png"], "is a model of text"),
        (["--prompt", "a", "--prompt_file", "b"], "give one of them"),
        (["--prompt_file", str(tmp_path / "absent")], "absent"),
    ):
        assert cli.main(["generate", str(folder), *more]) != 0
        assert message in capsys.readouterr().err


def test_stop_tokens_of_generation_config_count(folder, tmp_path):
    other = published.write(tmp_path / "model")
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 17]}))
    assert TextModel.load(other).stop_ids == (2, 17) and TextModel.load(folder).stop_ids == (2,)


def test_stop_tokens_by_name(folder, capsys):
    """An answer ends at a special token that was named; the model's own end counts as well."""
    model = TextModel.load(folder, dtype="float32")
    ids = model.chat_ids(QUESTION)
    free = model.session(128)
    list(model.write(free, ids, max_new_tokens=20, sampling=Sampling(temperature=0)))
    token = free.ids[len(ids) + 1]
    model.vocabulary.specials["<|made_up|>"] = token
    held = model.session(128)
    options = dict(max_new_tokens=20, sampling=Sampling(temperature=0), stop_tokens=["<|made_up|>"])
    list(model.write(held, ids, **options))
    assert held.ids == free.ids[: free.ids.index(token, len(ids))] and len(held.ids) < len(free.ids)
    for command in (["chat", str(folder)], ["generate", str(folder), "--prompt", "a"]):
        assert cli.main([*command, "--stop_tokens", "<|im_end|>", "--stop_tokens", "<|imend|>"]) == 1
        said = capsys.readouterr().err
        assert "stop token '<|imend|>' is no special token of this tokenizer; it has <|im_end|>, " in said


def test_repetition_can_be_penalised(folder, capsys):
    options = ["--prompt", "aaaa", "--max_new_tokens", "12", "--temperature", "0"]
    assert cli.main(["generate", str(folder), *options]) == 0
    free = capsys.readouterr().out
    assert cli.main(["generate", str(folder), *options, "--repetition_penalty", "5"]) == 0
    assert capsys.readouterr().out != free


def test_a_context_beyond_training_is_said(folder):
    trained_for = TextModel.load(folder, dtype="float32").context
    note = f"the model was trained for {trained_for} tokens"
    assert note in talk(folder, context=trained_for + 2) and note not in talk(folder, context=trained_for)


def test_a_context_that_does_not_fit(folder, monkeypatch):
    """One that is asked for is refused with what would fit; the model's own is cut to what does, and that is said."""
    monkeypatch.setattr("ringjax.inference.room.memory_now", lambda parallel: Memory(2**20, 2**20 - 2**14))
    with pytest.raises(
        ValueError, match=r"a cache of 128 tokens takes .*; (\d+) tokens would fit: ask for .*--context"
    ):
        talk(folder, context=128)
    fits = re.search(r"a context of (\d+) tokens", talk(folder)).group(1)
    assert "the cache of these fits into memory" in talk(folder)
    assert f"a context of {fits} tokens" in talk(folder, context=int(fits))


def test_lwm_asks_a_text_model(folder, capsys):
    arguments = ["generate", str(folder), "--prompt", "Why?", "--prompt_form", "lwm", "--max_new_tokens", "5"]
    assert cli.main([*arguments, "--temperature", "0"]) == 0
    model = TextModel.load(folder, dtype="float32", template="lwm")
    pieces = model.write(
        model.session(128), model.chat_ids(QUESTION), max_new_tokens=5, sampling=Sampling(temperature=0)
    )
    assert capsys.readouterr().out == "".join(pieces) + "\n"


@pytest.mark.parametrize("more", [["--image", "a.png"], ["--draw", "a.png"], ["--interleaved"]])
def test_a_model_of_text_takes_no_pictures(folder, more, capsys):
    assert cli.main(["generate", str(folder), "--prompt", "a", *more]) == 2
    said = capsys.readouterr().err
    assert more[0] in said and "is a model of text; pictures need a LLaVA, or a run" in said


def test_generate_streams(folder):
    shown = []
    run_generate(GenerateConfig(str(folder), "Once", max_new_tokens=8, temperature=1.0), shown.append)
    assert shown[0] == "Once" and len(shown) > 3 and shown[-1] == "\n"


@pytest.mark.parametrize("mesh, layout", [("1,1,1,8", "striped"), ("1,1,2,4", "zigzag")])
def test_a_mesh_changes_no_answer(folder, mesh, layout):
    """The commands' own option: weights and cache cut over devices."""
    lines, options = ("hello there", "and again"), dict(temperature=0.0, context=128)
    assert talk(folder, *lines, mesh=mesh, layout=layout, **options) == talk(folder, *lines, **options)
    shown = [[], []]
    for said, where in zip(shown, ({}, {"mesh": mesh, "layout": layout})):
        run_generate(GenerateConfig(str(folder), "Once", max_new_tokens=8, temperature=0.0, **where), said.append)
    assert "".join(shown[0]) == "".join(shown[1])


def test_a_mesh_that_is_none():
    with pytest.raises(ValueError, match="mesh shape '1,8' must be four numbers"):
        ChatConfig("model", mesh="1,8")
    with pytest.raises(ValueError, match="simulated_devices -1 must be 0 or more"):
        GenerateConfig("model", "words", simulated_devices=-1)
