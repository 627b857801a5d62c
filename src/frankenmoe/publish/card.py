"""Facts and reports -> README.md: a head that the hub accepts, then what is known in words; measures nothing itself.

A section without evidence is left out and named at the end. Nothing is written that no file on disk says.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frankenmoe.artifact import Artifact
from frankenmoe.checkpoint.writer import write_atomic
from frankenmoe.errors import ArtifactError
from frankenmoe.publish.facts import Facts, gather
from frankenmoe.publish.found import PICTURE, limits, results, routing, samples
from frankenmoe.publish.leaderboard import TASKS, Origin, eval_results
from frankenmoe.publish.picture import heat_map
from frankenmoe.publish.privacy import local_names, without_folders
from frankenmoe.publish.reports import Evidence, Measured, Published, Routing, collect
from frankenmoe.publish.sections import (
    LOCAL,
    Missing,
    bill,
    billions,
    files,
    licences,
    merged,
    primer,
    recipe,
    routers,
    usage,
)
from frankenmoe.recipestages import Card as Settings

README = "README.md"
TAGS = ("merge", "moe", "frankenmoe")
SIGNATURE = "<!-- written by frankenmoe; sha256 of the text above: "
Section = Callable[[Facts, Evidence], "str | Missing"]


@dataclass(frozen=True)
class Card:
    """A finished card: its text, the picture beside it, and what had to be left out, with the reason."""

    text: str
    picture: bytes | None
    missing: Mapping[str, str]

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The head, parsed back by huggingface_hub."""
        from huggingface_hub import ModelCard

        found: dict[str, Any] = ModelCard(self.text, ignore_metadata_errors=False).data.to_dict()
        return found


def make_card(
    artifact: Artifact,
    *,
    settings: Settings | None = None,
    repo: str | None = None,
    reports: Sequence[Path] = (),
    trust_remote_code: bool = False,
) -> Card:
    """The card of an artifact from what lies in its folder and the reports given; writes nothing.

    `settings` replaces the recipe's own `card:`; `repo` is where the model will be, for the lines that load it.
    Raises ArtifactError for a report that cannot be read, or where the hub's own check refuses the head.
    """
    facts = gather(artifact, settings=settings, trust_remote_code=trust_remote_code)
    evidence = collect(artifact, given=reports)
    model = repo or facts.settings.repo or LOCAL
    sections: Mapping[str, Section] = {
        "What was merged": merged,
        "What it costs": bill,
        "How its routers were made": routers,
        "Where tokens go": routing,
        "Results": results,
        "What it says": samples,
        "Files for llama.cpp": files,
        "How to run it": lambda facts, evidence: usage(facts, evidence, model=model),
        "Limits, and what was found": limits,
        "Licences": licences,
        "How a mixture of experts works": primer,
        "The recipe": recipe,
    }
    head, lacking = _head(facts, evidence)
    missing = dict(lacking)
    body = [f"# {facts.name}", facts.settings.description or "", _opening(facts)]
    for title, section in sections.items():
        said = section(facts, evidence)
        if isinstance(said, Missing):
            missing[title] = said.reason
        else:
            body.append(f"## {title}\n\n{said}")
    missing |= {f"report {number}": text for number, text in enumerate(evidence.stale, 1)}
    names = local_names(artifact)
    missing = {what: without_folders(why, names) for what, why in missing.items()}
    if missing:
        body.append("## Not in this card\n\n" + "\n".join(f"- {what}: {why}" for what, why in missing.items()))
    seen = evidence.get(Routing)
    text = signed(f"---\n{head}\n---\n\n" + "\n\n".join(part for part in body if part) + "\n")
    check(text, facts)
    return Card(text, heat_map(seen.share_LE, layers=seen.layers) if seen else None, missing)


def _opening(facts: Facts) -> str:
    plan = facts.plan
    count = len(facts.experts)
    used = facts.artifact.record.get("experts_per_token")
    kind = f"{facts.fmt.title} checkpoint" if facts.built and facts.fmt else "virtual mixture"
    size = f" {billions(plan.bill.total)} parameters, {billions(plan.bill.active)} active per token." if plan else ""
    return (
        f"A mixture of {count} experts merged from dense models, {used} of them per token, as a {kind}.{size} "
        "Made with frankenmoe, which also wrote this card from what it found on disk."
    )


def _head(facts: Facts, evidence: Evidence) -> tuple[str, dict[str, str]]:
    """The YAML between the dashes, made by huggingface_hub's own class, and what it had to leave out."""
    from huggingface_hub import ModelCardData

    wanted = facts.settings
    parents = facts.parents
    base_model = _distinct(wanted.base_model or [name for parent in parents for name in parent.hub])
    languages = _distinct(wanted.language or [name for parent in parents for name in parent.languages])
    datasets = _distinct(wanted.datasets or [name for parent in parents for name in parent.datasets])
    scores, origin = head_scores(evidence)
    own = re.fullmatch(r"other \((.+)\)", facts.licences.chosen or "")
    fields: dict[str, Any] = {
        "language": languages,
        "license": "other" if own else facts.licences.chosen,
        "license_name": own[1] if own else None,
        "base_model": base_model,
        "tags": _distinct([*TAGS, *wanted.tags]),
        "library_name": "transformers"
        if facts.built and facts.fmt and facts.fmt.loads_in_transformers
        else "frankenmoe",
        "pipeline_tag": "text-generation",
        "datasets": datasets,
        "model_name": facts.name if scores else None,
        "eval_results": eval_results(scores, origin=origin) if scores else None,
    }
    reasons = {
        "language": "no source declares one; say `language` under `card:` in the recipe",
        "license": "the sources declare no common one, see Licences; say `license` under `card:` in the recipe",
        "base_model": "no source came from the hub; say `base_model` under `card:` in the recipe",
        "datasets": "no source declares any",
        "eval_results": "no full run of the leaderboard's tasks is at hand; `frankenmoe eval` makes one",
    }
    lacking = {_head_name(key): why for key, why in reasons.items() if not fields[key]}
    data = ModelCardData(**{key: value for key, value in fields.items() if value})
    return data.to_yaml().strip(), lacking


def _head_name(key: str) -> str:
    return f"`{'model-index' if key == 'eval_results' else key}` in the head"


def head_scores(evidence: Evidence) -> tuple[Mapping[str, float], Origin | None]:
    """The scores for the model index, in percent: published ones, else those measured here on all rows of a task."""
    published, measured = evidence.get(Published), evidence.get(Measured)
    if published is not None:
        return published.scores, published.origin
    own = next((row for row in measured.rows if row.role == "moe"), None) if measured else None
    if measured is None or own is None:
        return {}, None
    whole = {
        task: score
        for task, score in own.scores.items()
        if task in TASKS and measured.documents.get(task, 0) >= TASKS[task].documents
    }
    return whole, None


def _distinct(values: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(values))


def check(text: str, facts: Facts) -> None:
    """Parses the card back as the hub's client does; ArtifactError where it would not be accepted."""
    from huggingface_hub import ModelCard

    try:
        data = ModelCard(text, ignore_metadata_errors=False).data
        names = [*(data.base_model or []), *(data.datasets or [])]
        _check_ids(names)
    except ValueError as error:
        raise ArtifactError(
            f"the card of {facts.artifact.folder} would not be accepted by the hub: {' '.join(str(error).split())}",
            hint="correct `card:` in the recipe, or the report it quotes",
        ) from error


def _check_ids(names: Sequence[str]) -> None:
    from huggingface_hub.utils import validate_repo_id

    for name in names:
        validate_repo_id(name)


def signed(text: str) -> str:
    """A card with a line at its end by which `is_ours` sees whether somebody has edited it since."""
    return f"{text}\n{SIGNATURE}{hashlib.sha256(text.encode()).hexdigest()} -->\n"


def is_ours(text: str) -> bool:
    """Whether a card is as `signed` left it."""
    body, mark, _ = text.rpartition(f"\n{SIGNATURE}")
    return bool(mark) and text == signed(body)


def write_card(artifact: Artifact, card: Card, *, overwrite: bool = False) -> Path:
    """Puts README.md and its picture into the artifact. ArtifactError rather than replace what a person wrote."""
    file = artifact.folder / README
    if file.is_file() and not overwrite and not is_ours(file.read_text(encoding="utf-8", errors="replace")):
        raise ArtifactError(
            f"{file} was written or changed by hand",
            hint="--overwrite replaces it; or move it away, and put its words under `card: description` in the recipe",
        )
    if card.picture is not None:
        write_atomic(artifact.folder / PICTURE, card.picture)
    write_atomic(file, card.text.encode())
    return file
