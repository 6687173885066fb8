"""Chat templates: the Jinja text by which a model learned turns, run in bounds since it comes with the weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from ringjax.inference.bounded_template import BoundedEnvironment, render

Message = Mapping[str, str]
# What Jinja raises, what its compiler does with text that is nested too deeply, and Python for a template's mistakes.
_FAULTS = (
    jinja2.TemplateError,
    SyntaxError,
    RecursionError,
    MemoryError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    AssertionError,
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LWM = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}{{ 'You are a helpful assistant.' }}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}{{ ' USER: ' + m['content'] }}"
    "{% else %}{{ ' ASSISTANT: ' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
BUILT_IN = {"chatml": CHATML, "lwm": LWM}


class ChatTemplate:
    """A template with the special tokens that it may name (`bos_token`, `eos_token`).

    Raises ValueError for text that is no template.
    """

    def __init__(self, text: str, tokens: Mapping[str, str] | None = None):
        self._tokens = dict(tokens or {})
        environment = BoundedEnvironment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.ChainableUndefined)
        environment.globals["raise_exception"] = _raise
        try:
            self._template = environment.from_string(text)
        except _FAULTS as error:
            raise ValueError(f"the chat template is not one: {_said(error)}") from None

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "ChatTemplate | None":
        """The template that tokenizer_config.json holds; of several, the one called `default`. None: it has none."""
        text = settings.get("chat_template")
        if isinstance(text, list):
            named = {entry.get("name"): entry.get("template") for entry in text if isinstance(entry, dict)}
            text = named.get("default")
        if not isinstance(text, str):
            return None
        return cls(text, special_tokens(settings))

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as text, up to where the assistant's answer begins.

        Raises ValueError where the template refuses it (a role it doesn't know, an order it doesn't take), or does
        what a template must not.
        """
        try:
            return render(self._template, messages=list(messages), add_generation_prompt=True, **self._tokens)
        except _FAULTS as error:
            raise ValueError(f"the chat template refuses this conversation: {_said(error)}") from None


def special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and the like as text; tokenizer_config.json has them as text or as an object."""
    found = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        found[name] = token if isinstance(token, str) else ""
    return found


def _said(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, (RecursionError, MemoryError)) else str(error)[:500]


def _raise(message: str):
    raise jinja2.TemplateError(message)
