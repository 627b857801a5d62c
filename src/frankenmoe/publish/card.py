"""Facts and reports -> README.md, the model card: a head that the hub accepts, then sections in words.

A section without evidence is left out and listed at the end. All facts come from files on disk.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frankenmoe.artifact.folder import Artifact
from frankenmoe.artifact.reports import AuditReport, EvalReport
from frankenmoe.charts import ChartError
from frankenmoe.checkpoint.writer import write_atomic
from frankenmoe.counted import counted
from frankenmoe.errors import ArtifactError
from frankenmoe.planning.bill import billions
from frankenmoe.publish.facts import Facts, gather
from frankenmoe.publish.found import PICTURE, limits, results, routing, samples
from frankenmoe.publish.leaderboard import TASKS, LeaderboardReport, Origin, eval_results
from frankenmoe.publish.markdown import plain, sentence
from frankenmoe.publish.picture import heat_map
from frankenmoe.publish.reports import Evidence, collect
from frankenmoe.publish.sections import (
    LOCAL,
    Missing,
    bill,
    files,
    licences,
    merged,
    primer,
    recipe,
    routers,
    usage,
)
from frankenmoe.recipe.sections import CardSettings as Settings
from frankenmoe.subject import Subject, open_subject

README = "README.md"
TAGS = ("merge", "moe", "frankenmoe")
SIGNATURE = "<!-- written by frankenmoe; sha256 of the text above: "
Section = Callable[[Facts, Evidence], "str | Missing"]


@dataclass(frozen=True)
class Card:
    """A finished card: its text, its picture, and what was left out with the reason."""

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
    what: Subject | Artifact | str | Path,
    *,
    settings: Settings | None = None,
    reports: Sequence[Path] = (),
) -> Card:
    """Makes the card of an artifact from the files in its folder and the reports given. Writes nothing.

    `settings` replaces the recipe's own `card:`. Raises ArtifactError for a report that cannot be read, or a head that
    the hub would not accept.
    """
    facts = gather(open_subject(what), settings=settings)
    artifact = facts.artifact
    evidence = collect(artifact, given=reports)
    model = facts.settings.repo or LOCAL
    sections: Mapping[str, Section] = {
        "What was merged": merged,
        "What it costs": bill,
        "How its routers were made": routers,
        "Where tokens go": lambda facts, evidence: routing(facts, evidence, picture=picture is not None),
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
    picture, undrawn = _picture(evidence.get(AuditReport))
    missing = dict(lacking)
    body = [f"# {plain(' '.join(facts.name.split()))}", facts.settings.description or "", _opening(facts)]
    for title, section in sections.items():
        said = section(facts, evidence)
        if isinstance(said, Missing):
            missing[title] = said.reason
        else:
            body.append(f"## {title}\n\n{said}")
    missing |= {f"report {number}": text for number, text in enumerate(evidence.stale, 1)}
    if undrawn:
        missing["picture"] = undrawn
    missing = {what: facts.names.text(why) for what, why in missing.items()}
    if missing:
        body.append(
            "## Not in this card\n\n" + "\n".join(f"- {what}: {sentence(why)}" for what, why in missing.items())
        )
    body_text = facts.names.text("\n\n".join(part for part in body if part))
    text = signed(f"---\n{head}\n---\n\n{body_text}\n")
    check(text, facts)
    return Card(text, picture, missing)


def _picture(seen: AuditReport | None) -> tuple[bytes | None, str]:
    """The picture of an audit's routing; or None, and why it cannot be drawn."""
    if seen is None:
        return None, ""
    layers = [router.layer for router in seen.outer]
    try:
        return heat_map(seen.shares, layers=layers, experts=seen.model.experts), ""
    except ChartError as error:
        return None, "; ".join(filter(None, (error.message, error.hint)))


def _opening(facts: Facts) -> str:
    plan = facts.plan
    count = len(facts.experts)
    merged, made = ("", "Adopted by") if facts.adopted else (" merged from dense models", "Made with")
    used = facts.artifact.record.get("experts_per_token")
    kind = f"{facts.fmt.title} checkpoint" if facts.built and facts.fmt else "virtual mixture"
    size = f" {billions(plan.bill.total)} parameters, {billions(plan.bill.active)} active per token." if plan else ""
    return (
        f"A mixture of {counted(count, 'expert')}{merged}, {used} of them per token, as a {kind}.{size} "
        f"{made} frankenmoe, which also wrote this card from what it found on disk."
    )


def _head(facts: Facts, evidence: Evidence) -> tuple[str, dict[str, str]]:
    """The YAML head, made by huggingface_hub's own class, and what is not in it with the reason."""
    from huggingface_hub import ModelCardData

    wanted = facts.settings
    parents = facts.parents
    base_model = _distinct(wanted.base_model or [parent.hub for parent in parents if parent.hub])
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
        "pipeline_tag": "image-text-to-text" if facts.built and facts.fmt and facts.fmt.inside else "text-generation",
        "datasets": datasets,
        "model_name": facts.name if scores else None,
        "eval_results": eval_results(scores, origin=origin) if scores else None,
    }
    reasons = {
        "language": "no source declares one; set `language` under `card:` in the recipe",
        "license": "the sources declare no common one, see Licences; set `license` under `card:` in the recipe",
        "base_model": "no source came from the hub; set `base_model` under `card:` in the recipe",
        "datasets": "no source declares any",
        "eval_results": "the leaderboard's tasks were not run in full; `frankenmoe eval` runs them",
    }
    lacking = {_head_name(key): why for key, why in reasons.items() if not fields[key]}
    data = ModelCardData(**{key: value for key, value in fields.items() if value})
    return data.to_yaml().strip(), lacking


def _head_name(key: str) -> str:
    return f"`{'model-index' if key == 'eval_results' else key}` in the head"


def head_scores(evidence: Evidence) -> tuple[Mapping[str, float], Origin | None]:
    """The scores for the model index, in percent: published ones, else those measured here on all rows of a task."""
    published, measured = evidence.get(LeaderboardReport), evidence.get(EvalReport)
    if published is not None:
        return published.published, published.source
    if measured is None or measured.moe is None:
        return {}, None
    whole = {
        task: score
        for task, score in measured.moe.scores.items()
        if task in TASKS and measured.documents.get(task, 0) >= TASKS[task].documents
    }
    return whole, None


def _distinct(values: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(values))


def check(text: str, facts: Facts) -> None:
    """Parses the card as the hub's client does. ArtifactError if the hub would not accept it."""
    from huggingface_hub import ModelCard
    from huggingface_hub.utils import validate_repo_id

    try:
        data = ModelCard(text, ignore_metadata_errors=False).data
        for name in [*(data.base_model or []), *(data.datasets or [])]:
            validate_repo_id(name)
    except ValueError as error:
        raise ArtifactError(
            f"the card of {facts.artifact.folder} would not be accepted by the hub: {' '.join(str(error).split())}",
            hint="correct `card:` in the recipe, or the report it quotes",
        ) from error


def signed(text: str) -> str:
    """The card with a signature as its last line. `is_ours` checks it to see whether somebody has edited the card."""
    return f"{text}\n{SIGNATURE}{hashlib.sha256(text.encode()).hexdigest()} -->\n"


def is_ours(text: str) -> bool:
    """Whether a card is unchanged since `signed`."""
    body, mark, _ = text.rpartition(f"\n{SIGNATURE}")
    return bool(mark) and text == signed(body)


def is_by_hand(file: Path) -> bool:
    """Whether a README.md exists that a person wrote or changed."""
    return file.is_file() and not is_ours(file.read_text(encoding="utf-8", errors="replace"))


def write_card(what: Subject | Artifact | str | Path, card: Card, *, overwrite: bool = False) -> Path:
    """Writes README.md and its picture into the artifact. ArtifactError if a person wrote or edited README.md."""
    folder = open_subject(what).need_artifact(hint="build it first").folder
    file = folder / README
    if not overwrite and is_by_hand(file):
        raise ArtifactError(
            f"{file} was written or changed by hand",
            hint="use --overwrite to replace it, or put its text under `card: description` in the recipe",
        )
    if card.picture is not None:
        write_atomic(folder / PICTURE, card.picture)
    write_atomic(file, card.text.encode())
    return file
