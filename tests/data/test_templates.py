"""Chat templates: the text that transformers gives, and limits for templates that loop, multiply or crash."""

import sys
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from frankenmoe.data import templates
from frankenmoe.data.templates import OverLimitError, render, rendered
from frankenmoe.errors import SourceError

TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "Be <b>brief</b>."},
    {"role": "user", "content": "Grüße 👩\u200d👧\n\ttab"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1.5}}}]},
    {"role": "tool", "content": [{"type": "text", "text": "two"}], "name": None},
    {"role": "assistant", "content": "Two.", "reasoning_content": "hm"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
# what templates of the hub use
TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content']|string + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "tools": "{{ bos_token }}{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{% for m in messages %}"
    "{% if m.tool_calls is defined and m.tool_calls %}{{ m.tool_calls | tojson }}{% else %}{{ m }}{% endif %}"
    "{% endfor %}",
    "marked": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "namespace": "{%- set ns = namespace(n=0) -%}\n  {%- for m in messages if m.role == 'user' -%}\n"
    "    {% set ns.n = ns.n + 1 %}{{ ns.n }}{{ strftime_now('%Y') }}\n"
    "  {%- endfor -%}{{ messages[1].name is defined }}",
}


def make(template: Any) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize("tools", [[], TOOLS], ids=["", "tools"])
@pytest.mark.parametrize("prompt", [False, True])
def test_the_text_is_that_of_transformers(name: str, tools: list[Any], prompt: bool) -> None:
    tokenizer = make(TEMPLATES[name])
    own = rendered(TURNS, tokenizer, tools=tools, add_generation_prompt=prompt)
    given = {"add_generation_prompt": prompt, "tokenize": False}
    assert own == tokenizer.apply_chat_template([dict(turn) for turn in TURNS], tools=tools or None, **given)


def test_the_template_for_tools_is_taken_if_there_are_tools() -> None:
    tokenizer = make({"default": "plain", "tool_use": "with tools"})
    assert rendered(TURNS, tokenizer) == "plain"
    assert rendered(TURNS, tokenizer, tools=TOOLS) == "with tools"
    with pytest.raises(SourceError, match="no default"):
        rendered(TURNS, make({"rag": "x"}))


ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% set ns = namespace(s='aa') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = ns.l + ns.l %}{% endfor %}",
    "{{ 'a' * 10**11 }}",
    "{{ 'a' * 10**7 }}",
    "{{ ('x' * 10**6) | replace('x', 'x' * 10**6) }}",
    "{{ '%99999999999d' % 1 }}",
    "{{ 10 ** (10 ** 10) }}",
    "{{ messages | tojson(indent=10**10) }}",
    "{% for i in range(10**9) %}{% endfor %}",
]


@pytest.mark.parametrize("template", ENDLESS)
def test_templates_without_end_are_stopped(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 2)
    with pytest.raises(OverLimitError, match=r"takes more than|writes 10,000,000|Range too big") as caught:
        render(template, TURNS)
    assert "chat_template.jinja" in str(caught.value)
    assert render("{{ messages[0].role }}", TURNS) == "system"  # the next one works


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no ' * 10**5) }}", "no no no"),
        ("{% for", "unexpected"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ messages.pop() }}", "unsafe"),
    ],
)
def test_templates_that_fail_are_one_short_sentence(template: str, words: str) -> None:
    with pytest.raises(SourceError, match=words) as caught:
        render(template, TURNS)
    assert len(caught.value.message) < 500
    assert "\n" not in caught.value.message


def test_a_child_that_died_is_replaced() -> None:
    assert render("a", TURNS) == "a"
    process = templates._WORKER._process
    assert process is not None
    process.kill()
    process.wait()
    assert render("b", TURNS) == "b"


def test_a_long_conversation_is_no_multiplication() -> None:
    text = "word " * 10**6
    assert render("{{ messages[0].content }}", [{"role": "user", "content": text}]) == text


def test_a_renderer_that_cannot_start_is_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    templates._WORKER.end()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(SourceError, match="takes more than"):
        render("a", TURNS)
