"""The demo's own questions: made from text, answered by likelihood."""

import pytest

import tiny
from frankenmoe.demo.text import DOMAINS, held_out
from frankenmoe.errors import SourceError
from frankenmoe.evaluate.quiz import CHOICES, questions, quiz


def test_questions_put_the_right_ending_first() -> None:
    for domain in DOMAINS:
        text = held_out(domain)
        made = questions(text, count=5)
        assert len(made) == 5
        for question in made:
            assert question.beginning + question.endings[0] in text
            assert len(question.endings) == CHOICES
            assert question.beginning + question.endings[1] not in text


def test_too_few_documents_are_refused() -> None:
    with pytest.raises(SourceError, match="1 document of"):
        questions("one document only")


def test_a_model_answers_by_likelihood(tmp_path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.make_parent(tmp_path, "llama", seed=0), dtype=torch.float32)
    tokenizer = tiny.make_tokenizer()
    aaa, bbb = "\n\n".join(["aaaa aaaa"] * 4), "\n\n".join(f"{word} {word}" for word in ("ab", "cd", "ef", "gh"))
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token equally likely: all endings of one length score the same
    assert quiz(model, tokenizer, {"same": aaa, "differ": bbb}) == {"same": 1.0, "differ": 1.0}
