"""Artifact and prompts -> what the model says, as a report that a card can quote; chooses and edits nothing."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from frankenmoe.artifact import ROUTERS, Artifact, write_json
from frankenmoe.building import versions
from frankenmoe.checkpoint.fingerprint import sha256
from frankenmoe.loading import load
from frankenmoe.moe.generate import Reply, reply
from frankenmoe.progress import SILENT, Progress

REPORT = "reports/samples.json"
TRACED = 32  # tokens of a sample whose way is kept


def sample(
    artifact: Artifact,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 120,
    temperature: float = 0.0,
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
) -> Path:
    """Asks an artifact every prompt, each in a conversation of its own, and writes reports/samples.json into it.

    The seed is set before each prompt, so that one sample does not depend on the others.
    """
    moe = load(artifact, trust_remote_code=trust_remote_code)
    tokenizer = moe.tokenizer()
    rows = []
    progress.start("samples", len(prompts), "prompts")
    for prompt in prompts:
        torch.manual_seed(seed)
        history = [{"role": "user", "content": prompt}]
        made = reply(moe, tokenizer, history, max_new_tokens=max_new_tokens, temperature=temperature)
        rows.append({"prompt": prompt, "reply": made.text, "trace": _trace(made, tokenizer)})
        progress.advance(1)
    file = artifact.folder / REPORT
    file.parent.mkdir(exist_ok=True)
    write_json(
        file,
        {
            "kind": "frankenmoe samples",
            "version": 1,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "recipe_digest": artifact.record["recipe_digest"],
            "routers_sha256": sha256(artifact.folder / ROUTERS),
            "experts": list(moe.experts),
            "settings": {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed},
            "samples": rows,
        },
    )
    return file


def _trace(made: Reply, tokenizer: Any) -> list[dict[str, Any]]:
    """The first expert of every layer for the first tokens, prompt and reply; -1 where a choice was dropped."""
    seen = min(len(made.layers[0].ids_TK), TRACED)
    return [
        {
            "token": tokenizer.decode([made.tokens[at]]),
            "experts": [int(layer.ids_TK[at, 0]) for layer in made.layers],
        }
        for at in range(seen)
    ]
