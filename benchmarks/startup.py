"""Every command's time to its first output, in a cold process over tiny models, and what it imports on the way.

The models are so small that nearly all the time is Python's own start: interpreter, imports, plan. Knows nothing of
what the commands say. `--before` names an earlier result, whose times stand beside the new ones. Processor time is
measured too, which is the same on a busy machine.
"""

import argparse
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import yaml
from common import ENVIRONMENT, Row, arguments, interleave, log, publish, ratio, workspace
from sources import Shape, make_source
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

EMPTY, TORCH = "python -c pass", "import torch"
SHAPE = Shape(hidden=32, ffn=64, layers=2, vocab=260)
HUB = "huggingface_hub"
HEAVY = ("torch", "transformers", HUB)
IMPORTED = re.compile(r"^import time: +\d+ \| +\d+ \| +(\S+)$", re.M)


@dataclass(frozen=True)
class Case:
    """A command. `{new}` in its words is a path that does not exist. `needs` are those of HEAVY that it may import.

    `cold`: transformers' answers to earlier builds are forgotten. `code` is that of its end.
    """

    name: str
    words: str
    needs: Sequence[str] = HEAVY
    cold: bool = False
    code: int = 0


@dataclass(frozen=True)
class Run:
    """Seconds to the first byte of stdout, or to the end if there is none; processor seconds, children included."""

    first: float
    cpu: float


CASES = (
    Case("--help", "--help", needs=()),
    Case("schema", "schema", needs=()),
    Case("families", "families", needs=()),
    Case("cache", "cache", needs=()),
    Case("plan", "plan random.yml", needs=()),
    Case("plan --json", "plan random.yml --json", needs=()),
    Case("build, the first one", "build random.yml {new}", needs=(), cold=True),
    Case("build, again", "build random.yml {new}", needs=()),
    Case("build --virtual, the first one", "build random.yml {new} --virtual", cold=True),
    Case("build --virtual, again", "build random.yml {new} --virtual", needs=()),
    Case("build, gates of prompts", "build hidden.yml {new} --virtual --no-cache"),
    Case("verify, virtual", "verify virtual", needs=()),
    Case("verify, built", "verify built"),
    Case("verify, built, a body of another size", "verify cut", needs=(), code=2),
    Case("export, virtual", "export virtual {new} --types f16 --allow-random --no-check", needs=()),
    Case("extract", "extract virtual {new} --expert e1", needs=()),
    Case("extract-lora", "extract-lora source-1 {new} --base source-0 --rank 2", needs=()),
    Case("card", "card virtual", needs=(HUB,)),
    Case("push --dry-run", "push virtual me/moe --dry-run", needs=(HUB,)),
    Case("chat", "chat virtual --prompt fox --max-new-tokens 1"),
    Case("fit", "fit virtual --data e0=text.txt --data e1=text.txt --method ridge --keep-anyway"),
    Case("heal", "heal hidden.yml {new} --data e0=text.txt --data e1=text.txt"),
    Case("audit", "audit virtual --data text.txt --out reports"),
    Case("eval", "eval virtual --text text.txt --no-cache"),
    Case("train", "train virtual {new} --data e0=text.txt --data e1=text.txt --steps 1 --batch 1 --block 32"),
)


def main() -> None:
    options = arguments("Every command's time to its first output.", name="startup", more=_more)
    before = _before(options.before)
    with workspace(options.work) as work:
        prepare(work)
        for case in CASES:  # the first one may have to compile modules, and fills the cache
            run(case, work)
        turns = {case.name: partial(run, case, work) for case in CASES}
        floors = {EMPTY: "pass", TORCH: "import torch"}
        turns |= {name: partial(timed, [sys.executable, "-c", code], work) for name, code in floors.items()}
        found = interleave(turns, rounds=options.rounds)
        rows = []
        for name in floors:
            first = [run.first for run in found[name]]
            rows.append(Row(f"floor: {name}", statistics.median(first), "s", None, {name: first}))
        for case in CASES:
            log(f"imports of {case.name}")
            rows += rows_of(case, found, before, heavy=imported(case, work))
        publish("startup", rows, options=options, work=work)


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--before", type=Path, help="JSON file of an earlier run, to compare with")


def _before(file: Path | None) -> Mapping[str, float]:
    """Row -> its value in an earlier result."""
    if file is None:
        return {}
    return {row["what"]: row["value"] for row in json.loads(file.read_text())["rows"]}


def rows_of(case: Case, found: Mapping[str, list[Run]], before: Mapping[str, float], *, heavy: list[str]) -> list[Row]:
    """Time to the first output, processor time, this over the floor's, and the imports.

    The floor is the import of torch, or an empty Python if the command does without it.
    """
    floor = TORCH if "torch" in case.needs else EMPTY
    first, cpu, least = (
        [getattr(run, field) for run in found[name]]
        for name, field in ((case.name, "first"), (case.name, "cpu"), (floor, "cpu"))
    )
    rows = [
        Row(f"{case.name}: first output", statistics.median(first), "s", None, {case.name: first}),
        Row(f"{case.name}: processor time", statistics.median(cpu), "s", None, {case.name: cpu}),
    ]
    return [
        *(replace(row, note=f"before: {before[row.what]:.2f} s" if row.what in before else "") for row in rows),
        Row(f"{case.name}: against {floor}", ratio({"ours": cpu, floor: least}, "ours", to=floor), "x", None, {}),
        Row(f"{case.name}: heavy imports", len(heavy), "", len(case.needs), {}, note=", ".join(heavy)),
    ]


def prepare(work: Path) -> None:
    """Two sources, text, recipes and artifacts over them."""
    octets = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({token: at for at, token in enumerate(["<s>", "</s>", *octets])}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    for seed in range(2):
        folder = make_source(work / f"source-{seed}", SHAPE, dtype="float32", seed=seed)
        tokenizer.save_pretrained(folder)  # one that GGUF can hold
    (work / "text.txt").write_text("The quick brown fox. " * 500)
    for mode in ("random", "hidden"):
        experts = [
            {"source_model": f"source-{seed}", "name": f"e{seed}", "positive_prompts": [f"text {seed}"]}
            for seed in range(2)
        ]
        recipe = {"base_model": "source-0", "gate_mode": mode, "dtype": "float32", "experts": experts}
        (work / f"{mode}.yml").write_text(yaml.safe_dump(recipe))
    for words in ("build random.yml built", "build random.yml virtual --virtual", "build random.yml cut"):
        timed([sys.executable, "-m", "frankenmoe", *words.split()], work)
    body = next((work / "cut").glob("model-0*.safetensors"))
    body.write_bytes(body.read_bytes()[:-4])


def run(case: Case, work: Path) -> Run:
    """One run, which leaves nothing behind but what it remembers."""
    return timed([sys.executable, "-m", "frankenmoe", *_words(case, work)], work, cold=case.cold, code=case.code)


def imported(case: Case, work: Path) -> list[str]:
    """The packages of HEAVY that a command imports in its own process, as the interpreter lists them."""
    command = [sys.executable, "-X", "importtime", "-m", "frankenmoe", *_words(case, work)]
    environment = _environment(work, cold=case.cold)
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, env=environment)
    _check(command, done.returncode, expected=case.code)
    names = {name.partition(".")[0] for name in IMPORTED.findall(done.stderr)}
    return [name for name in HEAVY if name in names]


def _words(case: Case, work: Path) -> list[str]:
    for left in ("new", "cold"):
        shutil.rmtree(work / left, ignore_errors=True)
    return case.words.format(new="new").split()


def _environment(work: Path, *, cold: bool) -> dict[str, str]:
    return {**ENVIRONMENT, "XDG_CACHE_HOME": str(work / ("cold" if cold else "cache"))}


def timed(command: list[str], work: Path, *, cold: bool = False, code: int = 0) -> Run:
    """Runs a command in `work`, with an empty cache if `cold`. RuntimeError if it does not end with `code`."""
    begun = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with subprocess.Popen(
        command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=_environment(work, cold=cold)
    ) as process:
        assert process.stdout is not None
        os.read(process.stdout.fileno(), 1)
        first = time.perf_counter() - begun
        process.stdout.read()
    _check(command, process.returncode, expected=code)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Run(first, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def _check(command: list[str], code: int, *, expected: int) -> None:
    if code != expected:
        raise RuntimeError(f"{' '.join(command)} ended with {code}, expected {expected}")


if __name__ == "__main__":
    main()
