"""Runs an artifact and another tool's model on the same text: how far apart are their words and their routers?

A quantized model is dequantized into a temporary folder and runs with the artifact's own code, so the numbers are those
of its weights alone. Shape suffixes: T tokens, V vocabulary, K top-k.
"""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from frankenmoe.after.compare import finite
from frankenmoe.after.experts import State
from frankenmoe.after.findings import Compared
from frankenmoe.after.plain import write_plain
from frankenmoe.artifact.folder import RECORD
from frankenmoe.data.blocks import Block, check_vocabulary, text_blocks
from frankenmoe.data.documents import check_data, read_documents
from frankenmoe.data.given import Pair
from frankenmoe.errors import FrankenMoEError, PlanError, SourceError
from frankenmoe.moe.load import MoE
from frankenmoe.moe.trace import RoutingTrace
from frankenmoe.progress import Progress
from frankenmoe.subject import Subject, open_subject

WINDOW = 256  # tokens read at once
MOST = 32  # blocks of a domain
AT_ONCE = 64  # tokens whose distributions are compared at a time
UNLABELLED = "text"

Texts = Mapping[str, tuple[tuple[str, ...], Path]]
"""Domain -> files or hub datasets, and the folder that relative names start at."""


@dataclass(frozen=True)
class DomainSeen:
    """Both models on one domain.

    `kl` is the mean divergence from the artifact in nats, `same_token` the share of tokens with the same most likely
    next one, `same_experts` the share of equal expert choices, over all layers. Losses are in nats per token.
    """

    domain: str
    tokens: int
    kl: float
    same_token: float
    same_experts: float
    loss: float
    other_loss: float


@dataclass(frozen=True)
class OnText:
    """Every domain; none, with a reason, if the other model cannot run here."""

    domains: tuple[DomainSeen, ...]
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        return {"domains": [finite(asdict(each)) for each in self.domains], "reason": self.reason}


def read_texts(subject: Subject, pairs: Sequence[Pair]) -> Texts:
    """The given text by domain, by default the recipe's own data. SourceError for text that is not there."""
    found: dict[str, tuple[tuple[str, ...], Path]] = {}
    for label, file in pairs:
        files, _ = found.get(label or UNLABELLED, ((), Path()))
        found[label or UNLABELLED] = ((*files, file), Path.cwd())
    if not pairs:
        recipe = subject.recipe
        found = {expert.name: (expert.data, recipe.folder) for expert in recipe.experts if expert.data}
    if not found:
        raise SourceError(
            f"the recipe of {subject.origin} names no data for its experts", hint="give text: --text FILE"
        )
    for files, folder in found.values():
        check_data(files, folder=folder)
    return found


def run_both(subject: Subject, found: Compared, texts: Texts, *, device: str, progress: Progress) -> OnText:
    """Runs both models on the text. SourceError for text without tokens."""
    with ExitStack() as stack:
        try:
            _check_whole(found)
            theirs = open_subject(_runnable(subject, found, stack, progress)).load(device=device, progress=progress)
        except FrankenMoEError as error:
            return OnText((), error.message)
        ours = subject.load(device=device, progress=progress)
        blocks = {name: _blocks(ours, *text, name=name) for name, text in texts.items()}
        progress.start("running both", sum(map(len, blocks.values())), "blocks")
        return OnText(tuple(_domain(name, ours, theirs, some, found, progress) for name, some in blocks.items()))


def _check_whole(found: Compared) -> None:
    """PlanError for a model that lacks something that is needed to run it."""
    other = found.other
    lacking = [each for each in found.experts if each.state in (State.MISSING, State.MISSHAPEN)]
    fits = all(each.seen.fits for each in found.routers) and all(seen.fits for seen in found.rest.values())
    if other.experts != len(found.names) or other.layers != found.layers or lacking or found.absent or not fits:
        raise PlanError("it lacks tensors, or some have another shape", hint="compare its weights alone")


def _runnable(subject: Subject, found: Compared, stack: ExitStack, progress: Progress) -> Path:
    """A folder that opens as a mixture: the other model's own, or one with its numbers written out.

    With a record beside it, a folder would open as an artifact, with gates that another tool may not have changed.
    """
    folder = Path(found.other.where)
    if folder.is_dir() and found.other.method is None and not (folder / RECORD).is_file():
        return folder
    made = Path(
        stack.enter_context(tempfile.TemporaryDirectory(prefix="frankenmoe-after-", ignore_cleanup_errors=True))
    )
    write_plain(made, found.other, subject, progress)
    return made


def _blocks(moe: MoE, files: tuple[str, ...], folder: Path, *, name: str) -> list[Block]:
    tokenizer = moe.tokenizer()
    length = min(WINDOW, int(moe.model.config.max_position_embeddings))
    blocks = text_blocks(read_documents(files, folder=folder), tokenizer, length=length, limit=MOST)
    if not blocks:
        raise SourceError(f"the text of {name} has no tokens", hint="give more text")
    for block in blocks:
        check_vocabulary(block.ids, moe.model.config.vocab_size, tokenizer, what=f"the text of {name}")
    return blocks


@torch.inference_mode()
def _domain(
    name: str, ours: MoE, theirs: MoE, blocks: Sequence[Block], found: Compared, progress: Progress
) -> DomainSeen:
    sums = dict.fromkeys(("tokens", "kl", "same_token", "loss", "other_loss", "chosen", "same"), 0.0)
    names = {each.layer: [len(found.names) if row is None else row for row in each.rows] for each in found.routers}
    for block in blocks:
        one, two = (
            moe.forward_with_trace(torch.tensor([block.ids], device=moe.model.device)) for moe in (ours, theirs)
        )
        _add_words(sums, one[0].logits[0], two[0].logits[0].to(ours.model.device), block)
        _add_choices(sums, one[1], two[1], names)
        progress.advance(1)
    tokens, chosen = max(1.0, sums["tokens"]), max(1.0, sums["chosen"])
    return DomainSeen(
        domain=name,
        tokens=int(sums["tokens"]),
        kl=sums["kl"] / tokens,
        same_token=sums["same_token"] / tokens,
        same_experts=sums["same"] / chosen,
        loss=sums["loss"] / tokens,
        other_loss=sums["other_loss"] / tokens,
    )


def _add_words(sums: dict[str, float], ours_TV: torch.Tensor, theirs_TV: torch.Tensor, block: Block) -> None:
    """Adds what both models say after every token whose next one is learnt; more words of theirs are ignored."""
    wide = ours_TV.shape[-1]
    places = [at for at in range(len(block.ids) - 1) if block.learn[at + 1]]
    for start in range(0, len(places), AT_ONCE):
        some = places[start : start + AT_ONCE]
        p_TV, q_TV = (logits[some, :wide].float().log_softmax(-1) for logits in (ours_TV, theirs_TV))
        next_T = torch.tensor([block.ids[at + 1] for at in some], device=p_TV.device)[:, None]
        sums["tokens"] += len(some)
        sums["kl"] += float((p_TV.exp() * (p_TV - q_TV)).sum())
        sums["same_token"] += int((p_TV.argmax(-1) == q_TV.argmax(-1)).sum())
        sums["loss"] -= float(p_TV.gather(1, next_T).sum())
        sums["other_loss"] -= float(q_TV.gather(1, next_T).sum())


def _add_choices(
    sums: dict[str, float], ours: RoutingTrace, theirs: RoutingTrace, names: Mapping[int, Sequence[int]]
) -> None:
    """Adds how many of our choices theirs are too; `names` says which of our experts theirs are, by layer."""
    for one in ours.layers:
        two = theirs.layer(one.layer)
        ids_TK = torch.tensor(names[one.layer], device=two.ids_TK.device)[two.ids_TK].to(one.ids_TK.device)
        sums["same"] += int((one.ids_TK[:, :, None] == ids_TK[:, None, :]).any(-1).sum())
        sums["chosen"] += one.ids_TK.numel()
