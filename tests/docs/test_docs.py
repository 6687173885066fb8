"""The guides are true: their Python blocks run, their links lead somewhere, their numbers are those of the tests.

A block that starts with ```python is run, top to bottom, all blocks of a file in one namespace and in an empty
folder. Where that makes no sense (a fragment, or minutes of work) a block says ```python notest.
"""

import re
from pathlib import Path

import pytest

from tests.attention import oracle

ROOT = Path(__file__).parents[2]
FILES = [path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if path.exists()]
BLOCK = re.compile(r"^```python[ \t]*\n(.*?)^```", re.M | re.S)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)#\s]+)[^)]*\)|<(?:img|source)[^>]*src(?:set)?=\"([^\"]+)\"")

by_name = pytest.mark.parametrize("path", FILES, ids=[path.name for path in FILES])


def blocks(text: str) -> list[tuple[int, str]]:
    """The line before each Python block to run, and its code."""
    return [(text[: found.start()].count("\n") + 1, found[1]) for found in BLOCK.finditer(text)]


def links(text: str) -> list[str]:
    """The files that Markdown or HTML links lead to; addresses of the web are left out."""
    prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.M | re.S)
    found = (first or second for first, second in LINK.findall(prose))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


@by_name
def test_python_blocks_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    namespace = {"__name__": "__main__"}
    for line, code in blocks(path.read_text()):
        exec(compile("\n" * line + code, str(path), "exec"), namespace)  # a traceback names the line of the guide


@by_name
def test_links_lead_to_files(path):
    missing = [target for target in links(path.read_text()) if not (path.parent / target).exists()]
    assert not missing


def test_guide_to_attention_states_the_tolerances_of_the_tests():
    text = (ROOT / "docs" / "attention.md").read_text()
    assert f"≤ {oracle.FLOAT32:.0e}".replace("e-0", "e-") in text
    assert f"≤ {oracle.BFLOAT16_OUT:.0f} ×" in text and f"≤ {oracle.BFLOAT16_GRAD:.0f} ×" in text


def test_what_counts_as_a_block_and_a_link():
    code = "a\n```python\nx = 1\n```\n```python notest\ny\n```\n```bash\nls [m](n)\n```\n"
    assert blocks(code) == [(2, "x = 1\n")]
    text = '[b](c.md#d) ![e](f.png) `[g](h)` <img src="i.png"> [web](https://example.org) [here](#top)'
    assert links(code + text) == ["c.md", "f.png", "i.png"]
