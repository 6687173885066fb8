"""The scripts of context extension: documents that ask for facts, and the table of what was measured."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

from ringjax.data.config import DataConfig, SourceConfig
from ringjax.data.fields import FieldEncoder
from ringjax.data.loader import make_loader
from ringjax.data.tokenizers import load_tokenizer
from ringjax.inference.chat_template import ChatTemplate
from tests.inference import published

SCRIPTS = Path(__file__).parents[2] / "scripts"


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Documents for rows of 4,096 tokens, from a book of 300 short paragraphs."""
    folder = tmp_path_factory.mktemp("recall")
    text = "\n\n".join(f"Paragraph {i} says that nothing happened on that day, nor on the next." for i in range(300))
    (folder / "book.txt").write_text(text)
    (folder / "apart.txt").write_text("kept apart\n\n" * 50)
    target = folder / "recall.jsonl"
    count = script("recall_documents").write(folder, target, 4096, 20_000, "sample", ["apart"], seed=1)
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert len(lines) == count >= 5
    return target, lines


def test_every_answer_is_in_its_document(made):
    _, lines = made
    tokenizer = load_tokenizer("sample")
    for line in lines:
        names = line["fields"].split(",")
        asked = names[1::2]
        assert 2 <= len(asked) <= 24 and "kept apart" not in line["context"]
        for question, answer in zip(asked, names[2::2], strict=True):
            thing, value = line[question.strip("[]")], line[answer].strip()
            assert value in line["context"] and value not in thing
        text = "".join(line[name] for name in line if name != "fields")
        assert len(tokenizer.encode(text)) < 4096
        assert "magic" not in text  # not the needle's words


@pytest.fixture(scope="module")
def chats(made, tmp_path_factory):
    """Conversations in the form of a model's template, for rows of 6,000 tokens."""
    folder = published.write(tmp_path_factory.mktemp("chats") / "model")
    target = folder.parent / "recall.jsonl"
    count = script("recall_documents").write(made[0].parent, target, 6000, 60_000, str(folder), ["apart"], 2, chat=0.7)
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    talks = [line for line in lines if "<|im_start|>" in line["fields"]]
    assert 5 <= len(talks) < len(lines) == count
    return load_tokenizer(str(folder)), lines, talks


def test_conversations_are_what_the_template_makes(chats):
    tokenizer, lines, talks = chats
    encoder = FieldEncoder(tokenizer, add_bos=False)
    assert all(len(encoder.encode_line(line, None, 0, "line")) <= 6000 for line in lines)
    ends = tokenizer.specials["<|im_end|>"]
    for line in talks:
        example = encoder.encode_line(line, None, 0, "line")
        turns = np.split(example.tokens, np.flatnonzero(example.tokens == tokenizer.specials["<|im_start|>"]))[1:]
        said = [tokenizer.decode(turn.tolist()).strip() for turn in turns]
        messages = [dict(zip(("role", "content"), text.split("\n", 1))) for text in said]
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        # What bears loss: the answers, each with the token that ends it.
        learned = tokenizer.decode(example.tokens[example.loss].tolist())
        assert learned == "".join(message["content"] for message in messages[1::2])
        assert (example.tokens[example.loss] == ends).sum() + (tokenizer.eos_id != ends) == len(messages) // 2
        context = messages[0]["content"]
        assert all(value in context for message in messages[1::2] for value in re.findall(r"\d+", message["content"]))


def test_several_facts_are_asked_in_one_message(chats):
    _, _, talks = chats
    together = 0
    for line in talks:
        names = [name.strip("[]") for name in line["fields"].split(",")]
        fields = [(name[0], line[name]) for name in names if name in line and line[name] != "assistant\n"]
        for (_, asked), (kind, answered) in zip(fields, fields[1:]):
            question = asked.rpartition("\n")[2]
            people = re.search(r"(?:the|Which) ([a-z' ]+)s (?:of|do) ([A-Z].+? and [A-Z][a-z]+ [A-Z][a-z]+)", question)
            if kind == "a" and people:
                named = re.split(", | and ", people[2])
                assert re.findall(f"The {people[1]} of (.+?) is ", answered) == named
                together += 1
    assert together > len(talks)


def test_conversations_need_a_template(made, tmp_path):
    folder = published.write(tmp_path / "model", template=None)
    with pytest.raises(SystemExit, match="has no chat template"):
        script("recall_documents").write(made[0].parent, tmp_path / "x", 2048, 1, str(folder), [], 2, chat=0.5)


def test_other_templates(made, tmp_path):
    """LLaMA 2's: a space before the token that ends an answer; a special token that `fields` have no name for."""
    llama = "{% for m in messages %}{% if m['role'] == 'user' %}" + "{{ '<|endoftext|>Q ' + m['content'] + ' A ' }}"
    llama += "{% else %}{{ m['content'] + ' <|im_end|>' }}{% endif %}{% endfor %}"
    recall, rng = script("recall_documents"), np.random.default_rng(3)
    tokenizer = load_tokenizer(str(published.write(tmp_path / "model")))
    facts = recall.facts(9, rng)
    parts = recall.conversation(facts, ChatTemplate(llama), tokenizer, rng)
    assert parts[0] == recall.Part("<|bos|>", special=True) and parts[-1] == recall.Part("<|eos|>", True, True)
    assert [part.text for part in parts if part.loss][1::3] == [" "] * sum(part.text == "<|eos|>" for part in parts)
    tokenizer.specials = {**tokenizer.specials, "[INST]": 77}
    with pytest.raises(SystemExit, match=r"uses \[INST\], and only"):
        recall.conversation(facts, ChatTemplate(llama.replace("Q ", "[INST] ")), tokenizer, rng)


def test_only_answers_bear_loss_and_nothing_is_cut(made):
    path, lines = made
    data = DataConfig(sources=(SourceConfig(str(path)),), long_examples="refuse", shuffle=False, prefetch=0)
    batch = next(make_loader(data, seq_len=4096, batch_size=1))
    tokenizer = load_tokenizer("sample")
    runs = np.split(batch["targets"][0], np.flatnonzero(np.diff(batch["loss_weights"][0] > 0)) + 1)
    marks = np.split(batch["loss_weights"][0] > 0, np.flatnonzero(np.diff(batch["loss_weights"][0] > 0)) + 1)
    learned = [tokenizer.decode(ids.tolist()) for ids, mark in zip(runs, marks) if mark[0]]
    answers = {text for line in lines for name, text in line.items() if re.fullmatch(r"a\d+", name)}
    assert len(learned) >= 2 and set(learned) <= answers


def test_documents_are_the_same_every_time(made, tmp_path):
    target, _ = made
    script("recall_documents").write(target.parent, tmp_path / "again.jsonl", 4096, 20_000, "sample", ["apart"], seed=1)
    assert (tmp_path / "again.jsonl").read_bytes() == target.read_bytes()
    with pytest.raises(SystemExit, match="holds no .txt files but book, apart"):
        script("recall_documents").write(target.parent, tmp_path / "x", 4096, 1, "sample", ["book", "apart"], seed=1)


def test_the_table(tmp_path):
    def evaluation(name, **summary):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))

    line = lambda method, length, score: {"method": method, "length": length, "score": score}  # noqa: E731
    evaluation("full/128k_digits", table=[line("exact", 8000, 1.0), line("exact", 32000, 0.85)])
    evaluation("full/32k_digits", table=[line("exact", 32000, 0.95)])
    evaluation("before/digits", table=[line("ntk", 8000, 0.7), line("yarn", 8000, 0.6)])
    evaluation("full/32k_perplexity", loss_by_position=[
        {"method": "exact", "length": 32, "losses": [4.0, 2.0] * 8}])  # fmt: skip
    steps = [{"step": i, "stage_step": i, "stage": "32k", "loss": 3.0 - i, **({} if i == 1 else
             {"seconds": 2.0, "tokens_per_second": 100.0, "mfu": 0.25})} for i in (1, 2, 3)]  # fmt: skip
    (tmp_path / "full" / "run").mkdir()
    (tmp_path / "full" / "run" / "metrics.jsonl").write_text("\n".join(json.dumps(step) for step in steps))
    summary = script("extend_summary")
    assert summary.rows(tmp_path, "digits") == [
        ("untrained, ntk", {8000: 0.7}), ("untrained, yarn", {8000: 0.6}),
        ("full, after 32k", {32000: 0.95}), ("full, after 128k", {8000: 1.0, 32000: 0.85}),
    ]  # fmt: skip
    assert "| full, after 32k | – | 95% |" in summary.needles(tmp_path, "digits")
    assert "| full, after 32k | " + " | ".join(["3.000"] * 8) in summary.perplexity(tmp_path)
    assert "| full, 32k | 3 | 4 | 100 | 25.0 % | 1.000 → 1.000 |" in summary.trained(tmp_path)
    assert summary.needles(tmp_path, "multi") == ""


def test_pictures_of_all_models_beside_each_other(tmp_path, monkeypatch):
    records = [{"method": "ntk", "length": length, "depth": depth, "part": "needle", "score": 1.0} for length in (8, 32)
               for depth in (0.0, 50.0)]  # fmt: skip
    for name in ("before/digits", "full/128k_digits"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "summary.json").write_text("{}")
        lines = [{"format": 1}, *({**record, "text": "a\u2028b"} for record in records)]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (tmp_path / name / "results.jsonl").write_text(text + '{"method": "n', "utf-8")  # and one is being written
    (tmp_path / "full" / "32k_digits").mkdir()  # not begun
    (tmp_path / "full" / "32k_digits" / "summary.json").write_text("{}")
    summary, drawn = script("extend_summary"), []
    draw = summary.draw_heat_map
    monkeypatch.setattr(summary, "draw_heat_map", lambda *given: drawn.append(given[1]) or draw(*given))
    assert summary.pictures(tmp_path) == [tmp_path / "digits.png"]
    assert (tmp_path / "digits.png").stat().st_size > 10_000
    (found,) = drawn
    assert [record["method"] for record in found] == ["untrained, ntk"] * 4 + ["full, after 128k"] * 4
