"""The generated text: the same for everyone, right in itself, and different where it must be."""

import ast
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frankenmoe.demo.text import (
    _RHYMES,
    DOMAINS,
    HELD_OUT_CHARACTERS,
    PROMPT_CHARACTERS,
    generate,
    held_out,
    prompts,
)

TRAINING_CHARACTERS = 300_000
LONG_LINE = 60

seeds = st.integers(0, 2**32)
domains = st.sampled_from(DOMAINS)


@settings(max_examples=30, deadline=None)
@given(domain=domains, seed=seeds, characters=st.integers(1, 4_000), more=st.integers(0, 4_000))
def test_same_seed_same_text_and_longer_texts_begin_alike(domain: str, seed: int, characters: int, more: int) -> None:
    text = generate(domain, seed=seed, characters=characters)
    assert text == generate(domain, seed=seed, characters=characters)
    assert generate(domain, seed=seed, characters=characters + more).startswith(text.removesuffix("\n"))
    assert characters <= len(text) < characters + 1_000


@settings(max_examples=10, deadline=None)
@given(domain=domains, seed=seeds)
def test_another_seed_gives_another_text(domain: str, seed: int) -> None:
    one, other = (generate(domain, seed=seed + step, characters=2_000) for step in (0, 1))
    assert set(one.split("\n\n")).isdisjoint(other.split("\n\n"))


def test_text_is_pinned_across_machines() -> None:
    """Literal openings: a change of Python's `random`, or of a template, shows here first."""
    openings = {domain: generate(domain, seed=0, characters=1)[:40] for domain in DOMAINS}
    assert openings == {
        "maths": "Question: A rider leaves on Sunday and g",
        "python": 'def list_large_angles(tickets):\n    """L',
        "recipes": "Quick bake of potatoes and chickpeas for",
        "verse": "Where once a shepherd wanders beside the",
    }


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_every_sum_in_maths_is_right(seed: int) -> None:
    text = generate("maths", seed=seed, characters=3_000)
    sums = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", text)
    assert len(sums) == text.count("=") > 0
    for left, sign, right, result in sums:
        a, b, c = int(left), int(right), int(result)
        assert {"+": a + b == c, "-": a - b == c, "*": a * b == c, "/": a == b * c}[sign], (left, sign, right, result)


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_every_python_document_is_one_documented_definition(seed: int) -> None:
    for document in generate("python", seed=seed, characters=3_000).split("\n\n"):
        (definition,) = ast.parse(document).body
        assert isinstance(definition, ast.FunctionDef | ast.ClassDef)
        assert ast.get_docstring(definition)


def test_python_functions_do_what_their_docstring_says() -> None:
    scope: dict[str, object] = {}
    checked = 0
    for document in generate("python", seed=0, characters=20_000).split("\n\n"):
        if found := re.search(r"Return (\d+) times the sum of the \w+s that are above (\d+)", document):
            factor, low = map(int, found.groups())
            exec(document, scope)
            function = scope[re.search(r"def (\w+)", document)[1]]
            assert function([low, low + 1, low + 5]) == factor * (2 * low + 6)
            checked += 1
    assert checked


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_recipes_use_what_they_list(seed: int) -> None:
    for document in generate("recipes", seed=seed, characters=3_000).split("\n\n"):
        _, needs, method = document.strip().split("\n")
        listed = re.findall(r"[a-z]+", needs.removeprefix("You need"))
        ingredients = set(listed) - {"grams", "of", "and", "juice"}
        assert len(ingredients) >= 4
        assert all(ingredient in method.lower() for ingredient in ingredients), document


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_couplets_end_on_two_words_that_rhyme(seed: int) -> None:
    for poem in generate("verse", seed=seed, characters=3_000).split("\n\n"):
        words = re.findall(r"(\w+)[,.]$", poem, re.MULTILINE)
        for first, second in zip(words[::2], words[1::2], strict=True):
            assert first != second
            assert any({first, second} <= set(family.split()) for family in _RHYMES.values()), (first, second)


def test_domains_use_words_of_their_own() -> None:
    words = {
        domain: set(re.findall(r"[a-z]+", generate(domain, seed=0, characters=20_000).lower())) for domain in DOMAINS
    }
    for domain in DOMAINS:
        shared = words[domain].intersection(*(words[other] for other in DOMAINS if other != domain))
        others = set().union(*(words[other] for other in DOMAINS if other != domain))
        assert len(shared) < 20
        assert len(words[domain] - others) > len(words[domain]) / 2


@pytest.mark.parametrize("domain", DOMAINS)
def test_held_out_text_and_prompts_are_not_in_the_training_text(domain: str) -> None:
    training = generate(domain, seed=0, characters=TRAINING_CHARACTERS)
    held = held_out(domain)
    assert HELD_OUT_CHARACTERS <= len(held) < HELD_OUT_CHARACTERS + 1_000
    assert set(held.strip().split("\n\n")).isdisjoint(training.strip().split("\n\n"))
    long_lines = {line for line in held.split("\n") if len(line) >= LONG_LINE}
    assert long_lines.isdisjoint(training.split("\n"))
    assert all(prompt not in training and prompt not in held for prompt in prompts(domain))


@pytest.mark.parametrize("domain", DOMAINS)
def test_prompts_are_eight_short_and_different(domain: str) -> None:
    openings = prompts(domain)
    assert len(set(openings)) == 8
    assert all(PROMPT_CHARACTERS / 2 < len(opening) <= PROMPT_CHARACTERS for opening in openings)
    assert openings == prompts(domain)


def test_an_unknown_domain_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="poetry"):
        generate("poetry", seed=0, characters=10)
