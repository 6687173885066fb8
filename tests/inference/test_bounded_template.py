"""Templates that are not trusted: what they may do, what they may not, and that neither takes long."""

import time

import jinja2
import pytest

from ringjax.inference import bounded_template
from ringjax.inference.chat_template import ChatTemplate

MESSAGES = [{"role": "system", "content": " be brief "}, {"role": "user", "content": "a\nb<c>"}]


def written(template: str) -> str:
    return ChatTemplate(template, {"bos_token": "<s>"}).render(MESSAGES)


@pytest.mark.parametrize(
    "template, text",
    [
        ("{% set ns = namespace(i=0) %}{% for m in messages %}{% set ns.i = ns.i + 1 %}{% endfor %}{{ ns.i }}", "2"),
        (
            "{% for m in messages if m.role == 'user' %}{{ loop.index0 }}{{ loop.last }}{{ loop.length }}{% endfor %}",
            "0True1",
        ),
        (
            "{% macro t(m) %}[{{ m.role|upper }}]{% endmacro %}{% for m in messages %}{{ t(m) }}{% endfor %}",
            "[SYSTEM][USER]",
        ),
        ("{{ messages[1:]|tojson }}", '[{"content": "a\\nb\\u003cc\\u003e", "role": "user"}]'),
        ("{{ messages[0]['content'].strip() ~ '|' ~ 1 ~ none }}", "be brief|1None"),
        ("{{ messages[::-1][0].content.split('b')[-1].lstrip('<') }}", "c>"),
        (
            "{{ messages|map(attribute='role')|join(', ') }}"
            "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}",
            "system, user1",
        ),
        ("{% for k, v in messages[0].items() %}{{ k }}={{ v|trim }};{% endfor %}", "role=system;content=be brief;"),
        (
            "{{ 7 % 2 }}{{ '%s-%05.1f' % ('a', 2) }}{{ 'ab' * 2 }}{{ [1] + [2] }}{{ (1, 2) }}{{ {'a': 1} }}",
            "1a-002.0abab[1, 2](1, 2){'a': 1}",
        ),
        (
            "{{ messages[0].tool_calls is defined }}{{ messages[0].x.y }}{{ 'a' in ['a'] }}{{ messages is iterable }}",
            "FalseTrueTrue",
        ),
        (
            "{{ bos_token + messages[1].content|replace('\n', ' ') }}{{ 'x'|default('y') }}{{ q|default('y') }}",
            "<s>a b<c>xy",
        ),
        (
            "{% set text %}{{ messages[1].role }}!{% endset %}{{ text|capitalize }}{% filter upper %}a{% endfilter %}",
            "User!A",
        ),
        ("{{ messages[1].content|indent(2) }}{{ messages|tojson(indent=1)|length }}", "a\n  b<c>113"),
        (
            "{% for m in messages recursive %}"
            "{{ m.role if m is mapping else m }}{{ loop([1]) if m is mapping }}{% endfor %}",
            "system1user1",
        ),
        (
            "{{ 'a' if 1 < 2 <= 2 else 'b' }}"
            "{{ ['b', 'a']|sort|first }}{{ [3, 1]|max }}{{ 'abc'[1:] }}{{ range(3)|list }}",
            "aa3bc[0, 1, 2]",
        ),
    ],
)
def test_what_templates_are_made_of(template, text):
    assert written(template) == text


_TWICE = "{{% set n = namespace(x={start}) %}}{{% for i in range(60) %}}{{% set n.x = {step} %}}{{% endfor %}}{end}"
GROWING = {
    "strings": _TWICE.format(start="'aaaa'", step="n.x + n.x", end=""),
    "tilde": _TWICE.format(start="'aaaa'", step="n.x ~ n.x", end=""),
    "lists": _TWICE.format(start="[1]", step="n.x + n.x", end=""),
    "numbers": _TWICE.format(start="9", step="n.x * n.x", end=""),
    "shared": _TWICE.format(start="[1]", step="[n.x, n.x]", end="{{ n.x }}"),
    "dicts": _TWICE.format(start="1", step="{1: n.x, 2: n.x}", end="{{ n.x }}"),
    "joined": _TWICE.format(start="'aaaa'", step="[n.x, n.x]|join", end=""),
    "method": _TWICE.format(start="'ab'", step="n.x.join([n.x, n.x])", end=""),
    "replaced": _TWICE.format(start="'ab'", step="n.x.replace('a', 'ab' ~ n.x)", end=""),
    "filter": _TWICE.format(start="'ab'", step="n.x|replace('a', n.x)", end=""),
    "json": _TWICE.format(start="'\"'", step="n.x|tojson", end=""),
    "captured": "{% set n = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}",
    "compared": "{% set a = namespace(x=[1], y=[1]) %}{% for i in range(60) %}"
    "{% set a.x = [a.x, a.x] %}{% set a.y = [a.y, a.y] %}{{ a.x == a.y }}{% endfor %}",
    "times": "{{ 'x' * 10 ** 9 }}",
    "many": "{{ 'x' * 1000000000 }}",
    "list": "{{ [1] * 1000000000 }}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "width": "{{ '%1000000000d' % 1 }}",
    "star": "{{ '%*d' % (1000000000, 1) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "zfill": "{{ 'a'.zfill(1000000000) }}",
    "center": "{{ 'a'|center(1000000000) }}",
    "indent": "{{ 'a\nb'|indent(1000000000) }}",
    "json indent": "{{ [1]|tojson(indent=1000000000) }}",
    "bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "expandtabs": "{{ '\t'.expandtabs(1000000000) }}",
    "batch": "{{ [1]|batch(1000000000, 1)|list }}",
    "lipsum": "{{ lipsum(n=1000000) }}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "calls": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(40) }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "loop": "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
}


@pytest.mark.parametrize("name", GROWING)
def test_templates_that_grow_or_loop_are_stopped(name, monkeypatch):
    monkeypatch.setattr(bounded_template, "WORK", 1 << 22)
    start = time.process_time()
    with pytest.raises(ValueError, match="the chat template (refuses this conversation|is not one)"):
        written(GROWING[name])
    assert time.process_time() - start < 5  # without bounds: minutes, or all memory


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__ }}",
        "{{ self.__init__ }}",
        "{{ ''.__class__ }}",
        "{{ ''|attr('__class__') }}",
        "{% include '/etc/passwd' %}",
        "{% import '/etc/passwd' as x %}",
        "{% from '/etc/passwd' import x %}",
        "{% extends 'x' %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ messages[0].clear() }}",
        "{{ namespace }}",
        "{{ 'x'.encode() }}",
        "{{ messages|groupby('role') }}",
        "{{ 'x'|urlize }}",
        "{{ messages|pprint }}",
        "{{ [1]|random }}",
        "{{ 1 // 0 }}",
        "{{ none + 1 }}",
    ],
)
def test_templates_that_look_elsewhere(template):
    try:
        assert "<" not in written(template) and "root" not in written(template)
    except ValueError as error:
        assert str(error).startswith("the chat template")


@pytest.mark.parametrize(
    "template",
    [
        "{{ " + "(" * 500,
        "{{ " + "not " * 5000 + "1 }}",
        "{{ 1" + "+1" * 5000 + " }}",
        "x" * (1 << 18),
        "{% if 1 %}" * 300 + "{% endif %}" * 300,
        "{{ [" + "[" * 3000,
    ],
)
def test_text_that_is_nested_or_long_beyond_all_need(template):
    with pytest.raises(ValueError, match="the chat template (is not one|refuses)"):
        written(template)


def test_an_account_is_of_one_rendering():
    template = ChatTemplate("{% for i in range(1000) %}{{ i }}{% endfor %}")
    assert len({template.render(MESSAGES) for _ in range(50)}) == 1
    with pytest.raises(LookupError):
        bounded_template.BoundedEnvironment().from_string("{{ 1 }}").render()
    assert isinstance(bounded_template.render(bounded_template.BoundedEnvironment().from_string("a{{ 1 }}")), str)
    with pytest.raises(jinja2.TemplateError):
        bounded_template.BoundedEnvironment().from_string("{{ 1|nothing }}")


def test_a_long_conversation_is_no_loop():
    """2,000 turns of 1,000 characters; every turn asks how many there are, and looks at their roles."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": "word " * 200} for i in range(2000)]
    template = (
        "{% macro turn(m) %}{{ m.role ~ ': ' ~ m.content|trim }}{% endmacro %}{% for m in messages[::-1] %}"
        "{% if m.content is string and m.role in ('user', 'assistant') and messages|length > loop.index0 %}"
        "{{ turn(m) }}{{ '\n' if not loop.last }}{% endif %}{% endfor %}"
    )
    assert ChatTemplate(template).render(turns).count("\n") == 1999
