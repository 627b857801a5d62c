"""GGUF files against their source, `cp`, and llama.cpp's own quantizer; knows nothing of how they are written."""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from common import MB, REPOSITORY, Row, Run, arguments, discarded, interleave, log, measure, publish, ratio, workspace
from sources import SHAPES, Shape, make_source, write_recipe
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import frankenmoe as fm
from frankenmoe.export.check import Checked, Reference, check, reference
from frankenmoe.export.run import export_gguf
from frankenmoe.planning import plan
from frankenmoe.planning.forecast import forecast
from frankenmoe.recipe import Recipe

SHARED = REPOSITORY.parent / "shared"
DOMAINS = ("python", "math", "french", "shakespeare")
OURS, FLOOR, PEER = "frankenmoe", "cp", "llama.cpp"
QUALITY = ("q8_0", "q5_k_m", "q4_k_m")
NUMBER = {"q8_0": 7, "q5_k_m": 17, "q4_k_m": 15}
EXPERTS = 4
THREADS = 2
# prompts, tokens of a reply, texts, tokens of a text, positions of a text
AMOUNTS = {"smoke": (4, 4, 2, 24, 4), "small": (12, 12, 4, 64, 16), "full": (50, 24, 8, 128, 32)}
QUANTIZER = (
    "import sys; from cyllama.llama import llama_cpp as l; p = l.LlamaModelQuantizeParams(); "
    "p.ftype = int(sys.argv[1]); p.nthread = int(sys.argv[2]); l.model_quantize(sys.argv[3], sys.argv[4], p)"
)


def main() -> None:
    options = arguments("Export to GGUF: fidelity, speed and memory.", name="export")
    torch.set_num_threads(THREADS)
    with workspace(options.work) as work:
        rows = [*quality(options, work), *speed(options, work)]
        publish("export", rows, options=options, work=work)


def quality(options: argparse.Namespace, work: Path) -> list[Row]:
    """The real-text parents, four experts: f32 and f16 against transformers, quantized files against llama.cpp's."""
    if not (SHARED / "models").is_dir():
        log("no real-text parents here: their rows stay empty")
        return []
    recipe = work / "real.yml"
    recipe.write_text(yaml.safe_dump(real_recipe(), sort_keys=False, allow_unicode=True))
    log("asking the source")
    source = ask(recipe, options.scale)
    kinds = ("f32", "f16", *QUALITY)
    files = {file.type: file for file in export_gguf(recipe, work / "real", types=kinds, threads=THREADS)}
    vocab = source.passages[0].logprobs.shape[1]
    found = {name: check(files[name].path, source, top=vocab) for name in log_each(kinds)}
    rows = [row for name in ("f32", "f16") for row in fidelity(name, found[name])]
    for name in QUALITY:
        theirs = work / f"theirs-{name}.gguf"
        measure(quantizer(NUMBER[name], files["f16"].path, theirs))
        peer = check(theirs, source, top=vocab)
        rows.append(
            Row(
                f"GGUF {name}: KL over that of llama.cpp's own file",
                found[name].kl / peer.kl,
                "x",
                1.05,
                {OURS: [found[name].kl], PEER: [peer.kl]},
            )
        )
        rows.append(Row(f"GGUF {name}: best tokens that differ", 100 * (1 - found[name].top1), "%", None, {}))
    return [*rows, sizes(recipe, files)]


def fidelity(name: str, found: Checked) -> list[Row]:
    """Greedy replies and divergence of an unquantized file."""
    wrong = found.prompts - found.same_replies
    limit = {"f32": 1e-5, "f16": 1e-3}[name]
    return [
        Row(f"GGUF {name}: prompts of {found.prompts}, another greedy reply", wrong, "", 0, {OURS: [wrong]}),
        Row(f"GGUF {name}: mean KL over {found.positions} positions", found.kl, "nats", limit, {OURS: [found.kl]}),
    ]


def sizes(recipe: Path, files: Mapping[str, Any]) -> Row:
    """How far `plan` is from the files, at most."""
    rows = forecast(plan(Recipe.load(recipe))).files
    off = [100 * abs(row.bytes / files[row.type].path.stat().st_size - 1) for row in rows if row.type in files]
    return Row("GGUF: size against what plan said, at most", max(off), "%", 1, {OURS: off})


def speed(options: argparse.Namespace, work: Path) -> list[Row]:
    """A built MoE of four random experts: bf16 as it is against `cp`, q4_k_m against llama.cpp's quantizer."""
    built = random_artifact(work / "random", SHAPES[options.scale])
    command = [sys.executable, "-m", "frankenmoe.cli", "export", "--no-check", "--allow-random", "--types"]
    reference, out = work / "bf16.gguf", work / "out.gguf"
    measure([*command, "bf16", str(built), str(reference)])  # also the warm-up
    log("conversion against cp")
    copies = {
        OURS: partial(turn, [*command, "bf16", str(built), str(out)], out),
        FLOOR: partial(turn, ["cp", str(reference), str(out)], out),
    }
    plain = interleave(copies, rounds=options.rounds)
    log("quantization against llama.cpp")
    races = {
        OURS: partial(turn, [*command, "q4_k_m", "--threads", str(THREADS), str(built), str(out)], out),
        PEER: partial(turn, quantizer(15, reference, out), out),
    }
    quantized = interleave(races, rounds=min(options.rounds, 2))
    seconds = {name: [run.seconds for run in runs] for name, runs in plain.items()}
    anon = {name: [run.anon / MB for run in runs] for name, runs in plain.items()}
    slow = {name: [run.seconds for run in runs] for name, runs in quantized.items()}
    work_anon = {name: [run.anon / MB for run in runs] for name, runs in quantized.items()}
    return [
        Row("GGUF bf16 as it is: time against cp", ratio(seconds, OURS, to=FLOOR), "x", 1.5, seconds),
        Row("GGUF bf16 as it is: anonymous memory", max(anon[OURS]), "MB", 500, anon),
        Row(f"GGUF q4_k_m, {THREADS} threads: time over llama.cpp's", ratio(slow, OURS, to=PEER), "x", 1 / 0.9, slow),
        Row("GGUF q4_k_m: anonymous memory", max(work_anon[OURS]), "MB", 500, work_anon),
        Row("GGUF q4_k_m: memory of llama.cpp's quantizer", max(work_anon[PEER]), "MB", None, {}),
    ]


def turn(command: Sequence[str], out: Path) -> Run:
    """One run whose file is synced, and gone afterwards."""
    script = 'out=$1; shift; "$@" && sync -f "$out"'
    try:
        return measure(["sh", "-c", script, "sh", str(out), *command])
    finally:
        out.unlink(missing_ok=True)
        (out.parent / "export.json").unlink(missing_ok=True)


def quantizer(number: int, source: Path, out: Path) -> list[str]:
    """llama.cpp's own quantizer, by cyllama, as a command."""
    return [sys.executable, "-c", QUANTIZER, str(number), str(THREADS), str(source), str(out)]


def random_artifact(folder: Path, shape: Shape) -> Path:
    """Four random experts, built in bfloat16, with a tokenizer that GGUF can hold."""
    sources = [make_source(folder / f"source-{seed}", shape, dtype="bfloat16", seed=seed) for seed in range(EXPERTS)]
    words = Tokenizer(models.BPE({token: at for at, token in enumerate(["<s>", "</s>", *map(chr, range(33, 60))])}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for source in sources:
        PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>").save_pretrained(source)
    recipe = write_recipe(folder / "recipe.yml", sources)
    text = recipe.read_text().split("experts:\n")
    recipe.write_text(text[0] + "experts:\n" + "".join(f"- source_model: {source}\n" for source in sources))
    fm.build(recipe, folder / "built")
    with discarded(folder / "source-0"):
        for source in sources[1:]:
            for file in source.iterdir():
                file.unlink()
    return folder / "built"


def real_recipe() -> dict[str, Any]:
    """Prompt gates over the four real-text parents, the prompts being the beginnings of their training texts."""
    experts = [
        {
            "source_model": str(SHARED / "models" / f"expert-{name}"),
            "positive_prompts": beginnings(SHARED / "text" / f"{name}.train.txt"),
        }
        for name in DOMAINS
    ]
    return {
        "name": "real",
        "base_model": str(SHARED / "models" / "base"),
        "gate_mode": "hidden_avg",
        "experts_per_token": 2,
        "experts": experts,
    }


def beginnings(file: Path) -> list[str]:
    """The first four pieces of a text."""
    return [piece[:200] for piece in file.read_text()[:2000].split("\n\n") if piece.strip()][:4]


def ask(recipe: Path, scale: str) -> Reference:
    """Prompts and texts out of the held-out files, in turns over the domains."""
    prompts, reply, texts, length, positions = AMOUNTS[scale]
    moe = fm.load(recipe, dtype="float32")
    tokenizer = moe.tokenizer()
    held = {name: (SHARED / "text" / f"{name}.heldout.txt").read_text() for name in DOMAINS}
    asked = [held[DOMAINS[at % 4]][700 * at + 13 : 700 * at + 73] for at in range(prompts)]
    read = [tokenizer(held[DOMAINS[at % 4]][900 * at :][:2000])["input_ids"][:length] for at in range(texts)]
    return reference(moe, tokenizer, texts=read, prompts=asked, tokens=reply, positions=positions)


def log_each(names: Sequence[str]) -> Iterator[str]:
    """Says what is being checked, name by name."""
    for name in names:
        log(f"checking {name}")
        yield name


if __name__ == "__main__":
    main()
