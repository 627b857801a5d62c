"""Artifact + prompts -> samples.json: the model's replies, for its card."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from frankenmoe.artifact.folder import Artifact
from frankenmoe.artifact.reports import SamplesReport, about
from frankenmoe.moe.device import AUTO
from frankenmoe.moe.generate import Reply, reply
from frankenmoe.progress import SILENT, Progress
from frankenmoe.recipe.sections import CardSettings
from frankenmoe.subject import Subject, open_subject

REPORT = "reports/samples.json"
TRACED = 32  # tokens of a sample with recorded experts


def sample(
    what: Subject | Artifact | str | Path,
    settings: CardSettings,
    *,
    device: str = AUTO,
    dtype: str | None = None,
    progress: Progress = SILENT,
) -> Path:
    """Sends each prompt in a new conversation, and writes the replies to reports/samples.json in the artifact.

    The seed is set again for each prompt, so that samples do not depend on one another.
    """
    subject = open_subject(what)
    artifact = subject.need_artifact(hint="build it first")
    moe = subject.load(dtype=dtype, device=device, progress=progress)
    tokenizer = moe.tokenizer()
    rows = []
    progress.start("samples", len(settings.prompts), "prompts")
    for prompt in settings.prompts:
        torch.manual_seed(settings.seed)
        history = [{"role": "user", "content": prompt}]
        made = reply(moe, tokenizer, history, max_new_tokens=settings.max_new_tokens, temperature=settings.temperature)
        rows.append({"prompt": prompt, "reply": made.text, "trace": _trace(made, tokenizer)})
        progress.advance(1)
    file = artifact.folder / REPORT
    file.parent.mkdir(exist_ok=True)
    report = SamplesReport.model_validate(
        {
            **about(artifact),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "experts": moe.experts,
            "settings": settings.model_dump(include={"max_new_tokens", "temperature", "seed"}),
            "samples": rows,
        }
    )
    report.write(file)
    return file


def _trace(made: Reply, tokenizer: Any) -> list[dict[str, Any]]:
    """The first tokens with their first expert in each layer; -1 if the assignment was dropped."""
    seen = min(len(made.layers[0].ids_TK), TRACED)
    return [
        {
            "token": tokenizer.decode([made.tokens[at]]),
            "experts": [int(layer.ids_TK[at, 0]) for layer in made.layers],
        }
        for at in range(seen)
    ]
