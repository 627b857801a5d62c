"""Router-only training against stock Mixtral with everything but its gates frozen: tokens per second and peak memory.

Both take the same batch through the same loss, backward pass and AdamW on the gates; each in a process of its own.
Peak memory is all that is resident, mapped source files too; of these pages the kernel can drop any at any time, so
what only the process itself holds (RssAnon, sampled every 20 ms) has a row of its own.
"""

import json
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import yaml
from common import Row, arguments, interleave, measure, publish, ratio, workspace
from safetensors.torch import save_file
from sources import EXPERTS, SHAPES, Shape, make_source, write_recipe
from torch.nn import functional
from transformers import AutoModelForCausalLM

import frankenmoe as fm
from frankenmoe.train import losses
from frankenmoe.train.head import is_direct, summed
from frankenmoe.train.loop import precision
from frankenmoe.train.parts import gate_modules, make_learnable

BATCH, LENGTH, RANK = 4, 128, 8
VOCABULARY = 32_000  # tokens of Llama 2 and Mistral
# after one of a single block; stock takes most of a minute for a step in bfloat16 where the CPU has no such products
STEPS = {"bfloat16": 1, "float32": 3}


@dataclass(frozen=True)
class Case:
    """What is trained: one source under sixteen adapters, or sixteen sources; its vocabulary where not the shape's."""

    words: str
    dtype: str
    sources: int = 1
    vocab: int | None = None

    @property
    def title(self) -> str:
        return f"{self.words}, {self.dtype}"


CASES = (
    Case("16 adapters on one source", "bfloat16"),
    Case("16 adapters on one source", "float32"),
    Case("16 adapters, 32k tokens", "float32", vocab=VOCABULARY),
    Case("16 different sources", "bfloat16", sources=EXPERTS),
    Case("16 different sources", "float32", sources=EXPERTS),
)


def main() -> None:
    if sys.argv[1:2] == ["--once"]:
        return once(sys.argv[2], Path(sys.argv[3]))
    options = arguments(__doc__ or "", name="train-speed")
    shape = SHAPES["smoke" if options.scale == "smoke" else "small"]
    table: list[Row] = []
    with workspace(options.work) as work:
        for number, case in enumerate(CASES):
            folder = work / f"case{number}"
            recipe = _make(folder, case, replace(shape, vocab=case.vocab or shape.vocab))
            fm.build(recipe, folder / "built")
            runs = {
                who: partial(measure, [sys.executable, __file__, "--once", who, str(target)])
                for who, target in (("ours", recipe), ("stock", folder / "built"))
            }
            found = interleave(runs, rounds=options.rounds)
            told = {who: [json.loads(run.stdout) for run in each] for who, each in found.items()}
            rate = {who: [each["tokens_per_second"] for each in rows] for who, rows in told.items()}
            peak = {who: [float(each["peak"]) for each in rows] for who, rows in told.items()}
            anon = {who: [float(run.anon) for run in each] for who, each in found.items()}
            table += [
                Row(f"{case.title}: tokens/s", ratio(rate, "ours", to="stock"), "x", None, rate, at_least=2.0),
                Row(f"{case.title}: peak memory", ratio(peak, "ours", to="stock"), "x", 0.5, peak),
                Row(f"{case.title}: of it own", ratio(anon, "ours", to="stock"), "x", None, anon),
            ]
        publish("train-speed", table, options=options, work=work)


def _make(folder: Path, case: Case, shape: Shape) -> Path:
    """Sources and a recipe: sixteen, or one with sixteen random adapters."""
    sources = [
        make_source(folder / f"s{number}", shape, dtype=case.dtype, seed=number) for number in range(case.sources)
    ]
    file = write_recipe(folder / "recipe.yml", sources)
    recipe = yaml.safe_load(file.read_text()) | {"dtype": case.dtype}
    if case.sources == 1:
        for number, expert in enumerate(recipe["experts"]):
            expert["adapter"] = str(_adapter(folder / f"a{number}", shape, seed=number))
    file.write_text(yaml.safe_dump(recipe))
    return file


def _adapter(folder: Path, shape: Shape, *, seed: int) -> Path:
    """A random LoRA on every FFN matrix, as PEFT writes one."""
    draw = torch.Generator().manual_seed(seed)
    sizes = {"gate_proj": (shape.ffn, shape.hidden), "up_proj": (shape.ffn, shape.hidden)}
    sizes["down_proj"] = (shape.hidden, shape.ffn)
    tensors = {}
    for layer in range(shape.layers):
        for name, (outputs, inputs) in sizes.items():
            key = f"base_model.model.model.layers.{layer}.mlp.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, inputs, generator=draw) * 0.02
            tensors[f"{key}.lora_B.weight"] = torch.randn(outputs, RANK, generator=draw) * 0.02
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}))
    return folder


def once(who: str, target: Path) -> None:
    """Trains the gates of one model for a few steps after a first one, and prints tokens/s and the peak in bytes."""
    torch.set_num_threads(1)
    if who == "ours":
        moe = fm.load(target)
        model = moe.model
        made = fm.plan(fm.Recipe.load(target), weights=True)
        names = gate_modules(model, made.router_names)
        slots = make_learnable(model, ("routers",), plan=made, gate_names=names, rank=1, seed=0)
        gates = [slot.parameter for slot in slots.values()]
    else:
        model = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
        model.requires_grad_(False)
        gates = [value for name, value in model.named_parameters() if name.endswith("gate.weight")]
        for gate in gates:
            gate.requires_grad_(True)
    model.train()
    context, steps = precision(model, torch.device("cpu")), STEPS[str(model.dtype).removeprefix("torch.")]
    head = model.get_output_embeddings() if who == "ours" and is_direct(model, context=context) else None
    optimizer = torch.optim.AdamW(gates, lr=1e-3)
    draw = torch.Generator().manual_seed(0)
    for step in range(steps + 1):
        if step == 1:
            begun = time.perf_counter()
        ids_BT = torch.randint(model.config.vocab_size, (BATCH if step else 1, LENGTH), generator=draw)
        labels_T = ids_BT[:, 1:].flatten()
        if who == "ours":
            with context():
                loss = summed(model, ids_BT, partial(_next_token, labels_T=labels_T), head=head) / len(labels_T)
        else:
            logits = model(input_ids=ids_BT, use_cache=False).logits[:, :-1].float()
            loss = functional.cross_entropy(logits.flatten(0, 1), labels_T)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - begun
    # not getrusage's maximum, which takes over the parent's when a process is started
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(status.split("VmHWM:")[1].split()[0])
    print(json.dumps({"tokens_per_second": BATCH * LENGTH * steps / seconds, "peak": peak}))


def _next_token(logits_TV: torch.Tensor, rows: slice, *, labels_T: torch.Tensor) -> torch.Tensor:
    return losses.next_token(logits_TV, labels_T[rows]).sum()


if __name__ == "__main__":
    main()
