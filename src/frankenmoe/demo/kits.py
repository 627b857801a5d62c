"""The two demos: with toys that train in a minute, and with fine-tunes of a real model that writes English."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from frankenmoe.demo.parents import BASE, make_parents
from frankenmoe.demo.real import TUNINGS, Text, make_base, make_tuned, real_folder
from frankenmoe.demo.text import DOMAINS, generate, held_out
from frankenmoe.progress import Progress

CHARACTERS = 150_000  # of text that a real fine-tune may read


@dataclass(frozen=True)
class Kit:
    """What differs between the demos.

    `parents` makes them, given a folder of the demo's own, and returns each by name, the base first. `prompts` are the
    card's; the first one is also the reply that is shown. `random_seeds` random gates are measured. `threads`: of
    torch, by default as many as there are. `blocks` of each text are measured by the recipe's stage `eval`. `rows`: a
    folder with rows of the leaderboard's tasks, some of whose questions base and MoE then answer.
    """

    name: str
    parents: Callable[[Path, Progress], dict[str, Path]]
    prompts: tuple[str, ...]
    reply_tokens: int
    random_seeds: int
    train_steps: int
    threads: int | None = None
    blocks: int | None = None
    rows: Path | None = None


def real(*, rows: Path | None = None) -> Kit:
    """The demo with SmolLM2-135M-Instruct and fine-tunes of its FFNs, made once in the user's cache."""
    return Kit(
        name="demo-real",
        parents=_real_parents,
        prompts=(
            "How do I make tomato soup?",
            "Write a Python function that counts the vowels of a word.",
            "Ada has 12 apples and buys 7 more. How many apples does she have?",
            "Write four lines of verse about the sea.",
        ),
        reply_tokens=80,
        random_seeds=1,
        train_steps=20,
        blocks=6,
        rows=rows,
    )


def _real_parents(_: Path, progress: Progress) -> dict[str, Path]:
    root = real_folder()
    base = make_base(root / BASE)
    found = {BASE: base}
    for domain in DOMAINS:
        text = Text(generate(domain, seed=0, characters=CHARACTERS), held_out(domain))
        tuned = make_tuned(root / "demo" / domain, base=base, text=text, tuning=TUNINGS["ffn"], progress=progress)
        found[domain] = tuned.folder
    return found


# one thread, because threads wait longer than they compute on models of this size
TOY = Kit(
    name="demo",
    parents=lambda folder, progress: make_parents(folder, progress=progress),
    prompts=("def count_",),
    reply_tokens=24,
    random_seeds=3,
    train_steps=60,
    threads=1,
)
