"""Artifact or recipe -> its audit, as data or as a report on disk."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from frankenmoe.artifact.folder import Artifact
from frankenmoe.artifact.reports import versions
from frankenmoe.audit.examine import Audit, DomainText, examine
from frankenmoe.audit.tokens import Passage
from frankenmoe.audit.write import check_place, write_report
from frankenmoe.data.blocks import check_vocabulary, encode, packed
from frankenmoe.data.documents import read_documents
from frankenmoe.data.given import Pair
from frankenmoe.data.labelled import Labelled, labelled
from frankenmoe.data.rows import Document
from frankenmoe.errors import SourceError
from frankenmoe.moe.device import AUTO
from frankenmoe.moe.load import MoE
from frankenmoe.planning import Plan
from frankenmoe.planning.kind import kind_of
from frankenmoe.progress import SILENT, Progress
from frankenmoe.recipe import Recipe
from frankenmoe.recipe.sections import AuditSettings
from frankenmoe.recipe.settings import settings_with
from frankenmoe.subject import Subject, open_subject

WINDOW = 256  # tokens read at once, fewer if the model has a shorter context
SHOWN = 96  # tokens of each domain shown if no prompt is given
SHOWN_DOMAINS = 8
NO_CHARACTER = "\ufffd"  # decoders put it for bytes that are no complete character
LONGEST = 4  # bytes of one character in UTF-8
PART = "…"


def audit(
    what: Subject | Recipe | Artifact | str | Path,
    *,
    out: str | Path = "reports",
    data: Sequence[Pair] = (),
    settings: AuditSettings | None = None,
    progress: Progress = SILENT,
    **changes: Any,
) -> Path:
    """Audits one MoE and writes `audit.json` and `audit.html` into a new folder, which is returned.

    The folder is `out`/audit-NAME, with a number if that exists. Arguments are those of `look`.
    """
    check_place(Path(out))
    return write_report([look(what, data=data, settings=settings, progress=progress, **changes)], Path(out))


def look(
    what: Subject | Recipe | Artifact | str | Path,
    *,
    data: Sequence[Pair] = (),
    settings: AuditSettings | None = None,
    device: str = AUTO,
    dtype: str | None = None,
    progress: Progress = SILENT,
    **changes: Any,
) -> Audit:
    """Audits one MoE and writes nothing.

    The text is `data`, pairs of (expert or None, file or hub dataset) with paths from the working directory; by default
    the recipe's `data`, else its positive prompts. The model runs on `device` in `dtype`. `changes` are settings by
    name. Raises RecipeError for an unknown expert, SourceError for text that cannot be read or has no tokens,
    ArtifactError for an invalid artifact.
    """
    subject = open_subject(what)
    settings = settings_with(settings or AuditSettings(), changes)
    domains = labelled(subject.recipe, data)  # before anything is loaded
    moe = subject.load(dtype=dtype, device=device, progress=progress)
    tokenizer = moe.tokenizer()
    window = min(WINDOW, getattr(moe.model.config, "max_position_embeddings", None) or WINDOW)
    texts, openings = {}, []
    for name, domain in domains.items():
        blocks = _checked(_blocks(domain, tokenizer, window), moe, tokenizer, what=f"the text of {name}")
        first = next(blocks, ())
        openings.append((name, first[:SHOWN]))
        texts[name] = DomainText(chain([first], blocks), domain.origin, domain.own)
    return examine(
        moe,
        plan=_plan_with_base(subject),
        texts=texts,
        passages=list(_passages(moe, tokenizer, settings.prompt, openings)),
        subject=_head(subject),
        limit=settings.tokens,
        window=window,
        artifact=subject.origin if subject.artifact or kind_of(subject.origin) == "mixture" else None,
        progress=progress,
    )


def _plan_with_base(subject: Subject) -> Plan | None:
    """The plan, if the MoE has a dense base to compare with: an adopted mixture has none."""
    found = subject.plan_or_none
    return found if found is not None and found.base.part is None else None


def check(what: Subject | Recipe | Artifact | str | Path, *, data: Sequence[Pair] = ()) -> None:
    """Raises the errors of `look` for folder, labels and text files, without loading a model."""
    labelled(open_subject(what).recipe, data)


def _head(subject: Subject) -> dict[str, Any]:
    """The head of a report: versions, the model's name and path, its recipe and record."""
    record = subject.artifact.record if subject.artifact else None
    return {
        "versions": versions(),
        "subject": {"what": subject.kind, "path": subject.origin, "name": subject.name},
        "recipe_digest": record["recipe_digest"] if record else subject.recipe.digest,
        "recipe": record["recipe"] if record else subject.recipe.to_dict(),
        "record": dict(record) if record else None,
    }


def _blocks(domain: Labelled, tokenizer: Any, window: int) -> Iterator[tuple[int, ...]]:
    """Streams blocks of at most `window` token ids; a prompt is not joined with others."""
    if domain.names:
        for block in packed(read_documents(domain.names, folder=domain.folder), tokenizer, length=window):
            yield block.ids
    for prompt in domain.prompts:
        for block in packed([Document(text=prompt, closed=False)], tokenizer, length=window):
            yield block.ids


def _checked(blocks: Iterable[tuple[int, ...]], moe: MoE, tokenizer: Any, *, what: str) -> Iterator[tuple[int, ...]]:
    """The same blocks, each checked against the model's vocabulary as it is read."""
    for ids in blocks:
        check_vocabulary(ids, moe.model.config.vocab_size, tokenizer, what=what)
        yield ids


def _passages(
    moe: MoE, tokenizer: Any, prompt: str | None, openings: Sequence[tuple[str, Sequence[int]]]
) -> Iterator[Passage]:
    """The passages shown token by token: the prompt, by default the start of each of the first domains."""
    if prompt is None:
        for name, ids in openings[:SHOWN_DOMAINS]:
            if not ids:
                raise _no_tokens(f"the text of {name}")
            yield _passage(tokenizer, name, ids)
        return
    ids, _ = encode(Document(text=prompt, closed=False), tokenizer)
    if not ids:
        raise _no_tokens("the prompt")
    head = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for checked in _checked([(*head, *ids)], moe, tokenizer, what="the prompt"):
        yield _passage(tokenizer, "prompt", checked)


def _no_tokens(what: str) -> SourceError:
    return SourceError(f"{what} has no tokens in this tokenizer, so there is nothing to route", hint="give more text")


def _passage(tokenizer: Any, label: str, ids: Sequence[int]) -> Passage:
    return Passage(label, tuple(ids), tuple(_texts(tokenizer, ids)))


def _texts(tokenizer: Any, ids: Sequence[int]) -> Iterator[str]:
    """Each token's text. If several tokens encode one character, all but the last have the text PART."""
    pending: list[int] = []
    for token in ids:
        pending.append(token)
        own, joined = (str(tokenizer.decode(tokens)) for tokens in ([token], pending))
        found = next((text for text in (own, joined) if NO_CHARACTER not in text), None)
        if found is None and len(pending) < LONGEST:
            yield PART
            continue
        yield own if found is None else found
        pending = []
