"""A small benchmark made from any texts: which of four endings belongs to a beginning? Needs no lm-eval."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from frankenmoe.counted import counted
from frankenmoe.errors import SourceError
from frankenmoe.evaluate.memory import budget
from frankenmoe.evaluate.scorer import Answer, Query, Scorer
from frankenmoe.evaluate.sharing import sharing

CHOICES = 4
QUESTIONS = 12


@dataclass(frozen=True)
class Question:
    """A beginning and four endings. The first ending is right."""

    beginning: str
    endings: tuple[str, ...]


def questions(text: str, *, count: int = QUESTIONS) -> list[Question]:
    """A question for each document: cut at a word near the middle, with the next documents' endings as wrong ones.

    Blank lines separate documents. Raises SourceError for fewer than four.
    """
    halves = [half for document in text.split("\n\n") if (half := _halves(document.strip())) is not None]
    if len(halves) < CHOICES:
        raise SourceError(
            f"the text has {counted(len(halves), 'document')} of two words or more, expected {CHOICES} at least",
            hint="separate documents by blank lines",
        )
    return [
        Question(beginning, (ending, *(halves[(at + step) % len(halves)][1] for step in range(1, CHOICES))))
        for at, (beginning, ending) in enumerate(halves[:count])
    ]


def _halves(document: str) -> tuple[str, str] | None:
    at = document.find(" ", len(document) // 2)
    return (document[:at], document[at:]) if at > 0 else None


def quiz(model: Any, tokenizer: Any, texts: Mapping[str, str], *, count: int = QUESTIONS) -> dict[str, float]:
    """Domain -> share of questions answered right, by log-likelihood per character. Chance is a quarter.

    Long endings are cut to half of the model's context.
    """
    asked = [(name, question) for name, text in texts.items() for question in questions(text, count=count)]
    allowed = budget(model)
    scorer = Scorer(model, allowed, sharing(model, allowed))
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
    queries = [
        _query(tokenizer, question.beginning, ending, longest) for _, question in asked for ending in question.endings
    ]
    scores = [0.0] * len(queries)

    def on_answer(number: int, answer: Answer) -> None:
        question = asked[number // CHOICES][1]
        scores[number] = answer.loglikelihood / len(question.endings[number % CHOICES])

    scorer.score(queries, on_answer)
    right: dict[str, list[bool]] = {}
    for at, (name, _) in enumerate(asked):
        own = scores[at * CHOICES : (at + 1) * CHOICES]
        right.setdefault(name, []).append(max(own) == own[0])
    return {name: sum(marks) / len(marks) for name, marks in right.items()}


def _query(tokenizer: Any, beginning: str, ending: str, longest: int) -> Query:
    head: Sequence[int] = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    context = [*head, *tokenizer(beginning, add_special_tokens=False)["input_ids"]][-(longest // 2) :]
    rest = tokenizer(ending, add_special_tokens=False)["input_ids"][: longest // 2]
    return Query(tuple([*context, *rest][:-1]), tuple(rest))
