"""A seeded fuzzer of the files that other people make: what it breaks must be computed with, or refused in a sentence.

`python tests/fuzzing.py KIND SEED` repeats one mutation and shows what the commands say.
"""

import contextlib
import faulthandler
import gc
import json
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from random import Random

import family_cases
import mutations
import tiny
from refusals import cli

BEGUN = "begun"  # in a report, for a seed whose end is not there yet
SECONDS = 10  # of processor time, so that a busy machine does not matter
MEMORY = 2 * 10**9
LONGEST = 2000  # characters of a message

TEXT = """\
base_model: base
gate_mode: hidden
dtype: float32
experts_per_token: 2
seed: 3
name: a name
backbone:
  method: task_arithmetic
  lambda: 0.5
experts:
  - source_model: base
    name: first
    positive_prompts: [one, "two words"]
    negative_prompts: [other]
    residual_scale: 0.5
  - source_model: one+lora
    name: second
    positive_prompts:
      - three
    noise_scale: 0.1
  - merge:
      method: slerp
      models: [base, shards]
    name: third
    positive_prompts: [four]
"""


READING_TEXT = """\
base_model: base
gate_mode: centroid
fit:
  tokens: 512
  block: 32
experts:
  - {source_model: base, name: first, data: plain.jsonl}
  - {source_model: one, name: second, data: [chat.jsonl]}
"""
README = """\
---
license: apache-2.0
tags: [merge, moe]
base_model: {a: b}
---
# A model
"""


@dataclass(frozen=True)
class Kind:
    """Files that are broken, one at a time, each with what is opened then; ways to break them, and commands.

    A command's {what} is what is opened. Commands come in order, until one is refused.
    """

    files: tuple[tuple[str, str], ...]
    ways: tuple[Callable[[Random, bytes], bytes], ...]
    commands: tuple[tuple[str, ...], ...]


PLAN = "plan {what}"
VIRTUAL = "build {what} out --virtual --no-cache"
BUILD = "build {what} out --no-cache"
CHAT = "chat {what} --prompt hi --max-new-tokens 2 --no-cache"
VERIFY = "verify {what}"
CARD = "card {what}"
EXTRACT = "extract {what} out --expert first"
RECIPE = "r.yml"
READING = "reading.yml"
JSON, TENSORS = (mutations.odd_json,), (mutations.odd_tensors, mutations.odd_tensors, mutations.odd_numbers)
# dense families and formats whose tables read most of the settings there are
FAMILIES = ("qwen3", "granite", "phi3-longrope", "qwen3_5", "lfm2", "smollm3", "granite4")

KINDS: Mapping[str, Kind] = {
    "recipe": Kind(((RECIPE, RECIPE),), (mutations.odd_yaml,), ((PLAN, VIRTUAL), (PLAN, BUILD), (PLAN + " --json",))),
    "header": Kind(
        tuple((f"{name}.safetensors", RECIPE) for name in ("base/model", "one/model", "lora/adapter_model")),
        TENSORS,
        ((PLAN, VIRTUAL), (PLAN, BUILD)),
    ),
    "index": Kind((("shards/model.safetensors.index.json", RECIPE),), JSON, ((PLAN, VIRTUAL), (PLAN, BUILD))),
    "config": Kind(
        (("base/config.json", RECIPE), ("one/config.json", RECIPE)),
        JSON,
        ((PLAN, VIRTUAL), (PLAN, BUILD), (PLAN, CHAT)),
    ),
    "family": Kind(
        tuple((f"{name}/config.json", f"{name}.yml") for name in FAMILIES),
        JSON,
        ((PLAN, VIRTUAL), (PLAN, BUILD), (PLAN, CHAT)),
    ),
    "adapter": Kind((("lora/adapter_config.json", RECIPE),), JSON, ((PLAN, VIRTUAL), (PLAN, BUILD))),
    "tokenizer": Kind(
        tuple((f"base/{name}.json", RECIPE) for name in ("tokenizer", "tokenizer_config", "generation_config")),
        JSON,
        ((PLAN, VIRTUAL), (PLAN, BUILD), (PLAN, CHAT)),
    ),
    "readme": Kind((("base/README.md", RECIPE),), (mutations.odd_head,), ((PLAN, VIRTUAL),)),
    "text": Kind(
        (("chat.jsonl", READING), ("plain.jsonl", READING)), (mutations.odd_json_lines,), ((PLAN, VIRTUAL), (CHAT,))
    ),
    "record": Kind(
        (("virtual/frankenmoe.json", "virtual"), ("built/frankenmoe.json", "built"), ("built/config.json", "built")),
        JSON,
        ((VERIFY,), (CARD,), (CHAT,), (EXTRACT,)),
    ),
    "built": Kind(
        (("built/model.safetensors.index.json", "built"), ("built/tokenizer.json", "built")),
        JSON,
        ((VERIFY,), (CHAT,), (EXTRACT,)),
    ),
    "routers": Kind(
        tuple((f"{what}/model-routers.safetensors", what) for what in ("virtual", "built")),
        TENSORS,
        ((VERIFY,), (CHAT,), (CARD,)),
    ),
}


def make_world(folder: Path) -> Path:
    """What mutations start from: two parents, one of them in shards, an adapter, a recipe, and its artifacts."""
    import torch
    from safetensors.torch import save_file

    tiny.make_parent(folder / "base", seed=0)
    one = tiny.make_parent(folder / "one", seed=1)
    lora, shards = folder / "lora", folder / "shards"
    lora.mkdir()
    sizes = {"gate_proj": (48, 32), "up_proj": (48, 32), "down_proj": (32, 48)}
    tensors = {}
    for layer in range(2):
        for name, (out, into) in sizes.items():
            place = f"base_model.model.model.layers.{layer}.mlp.{name}"
            tensors[f"{place}.lora_A.weight"] = torch.ones(2, into) / 50
            tensors[f"{place}.lora_B.weight"] = torch.ones(out, 2) / 50
    save_file(tensors, lora / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "one", "bias": "none", "r": 2,
        "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": sorted(sizes), "use_rslora": False, "use_dora": False,
        "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"layers.0.mlp.up_proj": 3}, "init_lora_weights": True,
        "modules_to_save": None, "layers_to_transform": None, "fan_in_fan_out": False,
    }  # fmt: skip
    (lora / "adapter_config.json").write_text(json.dumps(settings))
    from transformers import AutoModelForCausalLM

    shutil.copytree(one, shards)
    (shards / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(one).save_pretrained(shards, max_shard_size="20KB")
    (folder / "r.yml").write_text(TEXT)
    (folder / "base" / "README.md").write_text(README)
    template = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}{% endfor %}"
    (folder / "base" / "chat_template.jinja").write_text(template)
    words = [" ".join(f"{(place * step) % 97}" for place in range(60)) for step in range(1, 40)]
    (folder / "plain.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in words))
    turns = ([{"role": "user", "content": text[:9]}, {"role": "assistant", "content": text}] for text in words)
    (folder / "chat.jsonl").write_text("\n".join(json.dumps({"messages": each}) for each in turns))
    (folder / READING).write_text(READING_TEXT)
    for name in FAMILIES:
        case = family_cases.CASES[name]
        family_cases.make_parent(folder / name, case)
        family_cases.make_parent(folder / f"{name}-2", case, seed=1)
        family_cases.write_recipe(folder / f"{name}.yml", case, Path(name), [Path(name), Path(f"{name}-2")])
    inside(folder, "build r.yml virtual --virtual")
    inside(folder, "build r.yml built")
    return folder


def copy_of(world: Path, folder: Path, *, written: str) -> Path:
    """`folder` with links to what is in the world, and a copy of what has the file `written` in it."""
    for each in world.iterdir():
        if each.name != written.partition("/")[0]:
            (folder / each.name).symlink_to(each)
        elif each.is_dir():
            shutil.copytree(each, folder / each.name)
        else:
            shutil.copy(each, folder)
    return folder


def inside(folder: Path, command: str) -> None:
    """Runs a command in a folder. AssertionError unless it ends well or is refused as users are told it is."""
    with contextlib.chdir(folder):
        outcome = cli(*command.split())
    if outcome.code == 0:
        return
    said = [line for line in outcome.stderr.splitlines() if line.startswith(("error: ", "  hint: "))]
    assert outcome.code == 2, f"exit code {outcome.code} of {command}: {outcome.stderr}"
    assert len(said) == 2, f"{command} is refused with {len(said)} lines: {outcome.stderr}"
    assert max(map(len, said)) < LONGEST, f"{command} is refused with {len(outcome.stderr)} characters: {said}"
    assert "system error" not in outcome.stderr, f"{command}: {outcome.stderr}"
    raise RefusedError(outcome.stderr)


class RefusedError(Exception):
    """A command was refused, as it should be."""


def try_one(world: Path, name: str, seed: int, *, show: bool = False) -> None:
    """Breaks one file of a copy of the world and runs commands on it. Raises what they raise, or AssertionError."""
    random, kind = Random(f"{name} {seed}"), KINDS[name]
    with tempfile.TemporaryDirectory(dir=world.parent) as folder:
        file_name, what = mutations.pick(random, kind.files)
        scratch = copy_of(world, Path(folder), written=file_name)
        file = scratch / file_name
        if random.random() < 0.05:
            mutations.odd_file(random, file)
        else:
            file.write_bytes(mutations.pick(random, kind.ways)(random, file.read_bytes()))
        commands = mutations.pick(random, kind.commands)
        if show:
            print(file, commands, sep="\n")
        try:
            for command in commands:
                inside(scratch, command.format(what=what))
                if show:
                    print("done:", command)
        except RefusedError as refusal:
            if show:
                print(refusal)


def try_unbroken(world: Path, name: str) -> None:
    """Runs every command of a kind on what is not broken. Raises RefusedError if one is refused."""
    kind = KINDS[name]
    for what, commands in product(sorted({what for _, what in kind.files}), kind.commands):
        with tempfile.TemporaryDirectory(dir=world.parent) as folder:
            scratch = copy_of(world, Path(folder), written=what)
            for command in commands:
                inside(scratch, command.format(what=what))


def limited(world: Path, name: str, seed: int) -> str | None:
    """What went wrong, if anything. The process ends if a mutation takes too long, and asks in vain for memory."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        try_one(world, name, seed)
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return None


def used() -> int:
    """Bytes that count against the limit of data."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmData"))


def work(world: Path, cases: Sequence[tuple[str, int]], report: Path) -> None:
    """Works through kinds and seeds; the report gets a line before and after each."""
    gc.collect()
    faulthandler.register(signal.SIGPROF, chain=True)  # a hang is then ended by the signal, with a traceback
    resource.setrlimit(resource.RLIMIT_DATA, (used() + MEMORY, resource.RLIM_INFINITY))
    with report.open("a", buffering=1) as lines:
        for kind, seed in cases:
            print(json.dumps([kind, seed, BEGUN]), file=lines)
            print(json.dumps([kind, seed, limited(world, kind, seed)]), file=lines)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        try_one(make_world(Path(folder) / "world"), sys.argv[1], int(sys.argv[2]), show=True)
