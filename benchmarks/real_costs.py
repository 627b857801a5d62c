"""Rows of benchmarks/real.py about cost: adapters extracted from whole parents, fitting, and the memory of merges."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import yaml
from common import MB, Row, measure
from real_bed import Bed, Losses, folder_for
from real_parts import attempted, command, kept_row, make_row
from real_rows import BACKBONES, FRANKENMOE, fit_keys

LIMIT = 400 * MB


def extracted(bed: Bed, rank: int = 32) -> Iterator[Row]:
    """Every parent as a LoRA of rank 32 of its difference: what it keeps, its size, the memory of the extraction."""
    with attempted(f"extracted rank {rank}: kept by each parent itself") as rows, folder_for(bed, "loras") as root:
        losses: Losses = {}
        size, peaks = 0, []
        for domain, folder in bed.parents.folders.items():
            out = root / domain
            root.mkdir(parents=True, exist_ok=True)
            words = [*FRANKENMOE, "extract-lora", str(folder), str(out), "--base", str(bed.parents.base)]
            peaks.append(command([*words, "--rank", str(rank)]).anon)
            losses |= bed.losses(bed.dense(out), (domain,))
            size += sum(file.stat().st_size for file in out.glob("*.safetensors"))
        whole = (bed.parents.base / "model.safetensors").stat().st_size
        rows.append(kept_row(bed, f"extracted rank {rank}: kept by each parent itself", losses))
        rows.append(make_row(f"extracted rank {rank}: all adapters, of the base's size", 100 * size / whole, "%"))
        rows.append(make_row("extraction: anonymous memory", max(peaks) / MB, "MB", limit=LIMIT / MB))
    yield from rows
    with attempted(f"as_adapter rank {rank}: memory over base + adapters") as rows:
        experts = {domain: {"as_adapter": {"rank": rank}} for domain in bed.domains}
        moe = bed.load(bed.recipe(experts, backbone="average"))
        rows.append(kept_row(bed, f"as_adapter rank {rank}, forced, average", bed.forced(moe)))
        held = sum({each.data_ptr(): each.numel() * each.element_size() for each in moe.model.parameters()}.values())
        rows.append(make_row(f"as_adapter rank {rank}: weights held, of the base's", held / whole, "x"))
    yield from rows


def fit_cost(bed: Bed) -> Iterator[Row]:
    """Forward passes over the text that fitting takes, and memory above the loaded model."""
    count = len(bed.domains)
    file = bed.work / "fit.yml"
    recipe = bed.recipe(bed.with_texts(), gate_mode="random", backbone="average", **fit_keys(bed))
    file.write_text(yaml.safe_dump(recipe.to_dict(), allow_unicode=True))
    script = str(Path(__file__).with_name("real_once.py"))
    before = measure([sys.executable, script, "load", str(file), str(bed.work / "none")])
    for method, limit in (("logistic", 2.5), ("regret", 2.5 + count / 3)):
        with attempted(f"fit {method}: forward passes") as rows, folder_for(bed, "fit-cost") as out:
            run = measure([sys.executable, script, method, str(file), str(out)])
            facts = json.loads(run.stdout.splitlines()[-1])
            rows.append(make_row(f"fit {method}: forward passes", facts["passes"], "x", limit=limit, by=facts))
            above = (run.anon - before.anon) / MB
            rows.append(make_row(f"fit {method}: memory above the model", above, "MB", limit=1000.0))
            rows.append(make_row(f"fit {method}: time", run.seconds, "s"))
        yield from rows


def memory(bed: Bed) -> Iterator[Row]:
    """Anonymous memory of building an MoE with a merged backbone, by method.

    Every command first runs with an empty cache: such a build asks transformers about the result, in a process beside
    the merge, whose imports are most of the memory. That is reported for itself.
    """
    cache = bed.work / "empty-cache"
    for name in ("average", "task arithmetic 0.7", "ties 0.5"):
        what = f"build, {name}: anonymous memory"
        file = bed.work / "build.yml"
        file.write_text(yaml.safe_dump(bed.recipe(backbone=BACKBONES[name]).to_dict(), allow_unicode=True))
        with attempted(what) as rows:
            for asked, limit in ((", of a first build", None), ("", LIMIT / MB)):
                with folder_for(bed, "built") as out:
                    words = [*FRANKENMOE, "build", str(file), str(out)]
                    run = command(["env", f"XDG_CACHE_HOME={cache}", *words])
                rows.append(make_row(f"{what}{asked}", run.anon / MB, "MB", limit=limit))
        shutil.rmtree(cache, ignore_errors=True)
        yield from rows


COSTS: Mapping[str, Callable[[Bed], Iterator[Row]]] = {"extracted": extracted, "fit-cost": fit_cost, "memory": memory}
