"""Router-only training against stock Mixtral with everything but its gates frozen: tokens per second and peak memory.

Both take the same batch through the same loss, backward pass and AdamW on the gates; each in a process of its own.
"""

import json
import resource
import sys
import time
from functools import partial
from itertools import product
from pathlib import Path

import torch
from common import Row, arguments, interleave, measure, publish, ratio, workspace
from safetensors.torch import save_file
from sources import EXPERTS, SHAPES, make_source, write_recipe
from torch.nn import functional
from transformers import AutoModelForCausalLM

import frankenmoe as fm
from frankenmoe.train import losses
from frankenmoe.train.parts import gate_modules, make_learnable
from frankenmoe.train.run import precision

BATCH, LENGTH, STEPS, RANK = 4, 128, 2, 8
CASES = {"adapters": "16 adapters on one source", "different": "16 different sources"}
DTYPES = ("bfloat16", "float32")


def main() -> None:
    if sys.argv[1:2] == ["--once"]:
        return once(sys.argv[2], Path(sys.argv[3]))
    options = arguments(__doc__ or "", name="train-speed")
    shape = SHAPES["smoke" if options.scale == "smoke" else "small"]
    table: list[Row] = []
    with workspace(options.work) as work:
        for (case, words), dtype in product(CASES.items(), DTYPES):
            folder, title = work / f"{case}-{dtype}", f"{words}, {dtype}"
            recipe = _make(folder, case, shape, dtype=dtype)
            fm.build(recipe, folder / "built")
            runs = {
                who: partial(measure, [sys.executable, __file__, "--once", who, str(target)])
                for who, target in (("ours", recipe), ("stock", folder / "built"))
            }
            found = interleave(runs, rounds=options.rounds)
            told = {who: [json.loads(run.stdout) for run in each] for who, each in found.items()}
            rate = {who: [each["tokens_per_second"] for each in rows] for who, rows in told.items()}
            peak = {who: [float(each["peak"]) for each in rows] for who, rows in told.items()}
            table.append(
                Row(f"{title}: tokens/s against stock", ratio(rate, "ours", to="stock"), "x", None, rate, at_least=2.0)
            )
            table.append(Row(f"{title}: peak memory", ratio(peak, "ours", to="stock"), "x", 0.5, peak))
        publish("train-speed", table, options=options, work=work)


def _make(folder: Path, case: str, shape: object, *, dtype: str) -> Path:
    """Sources and a recipe: sixteen, or one with sixteen random adapters."""
    count = EXPERTS if case == "different" else 1
    sources = [make_source(folder / f"s{number}", shape, dtype=dtype, seed=number) for number in range(count)]  # type: ignore[arg-type]
    file = write_recipe(folder / "recipe.yml", sources)
    import yaml

    recipe = yaml.safe_load(file.read_text()) | {"dtype": dtype}
    if case == "adapters":
        for number, expert in enumerate(recipe["experts"]):
            expert["adapter"] = str(_adapter(folder / f"a{number}", shape, seed=number))
    file.write_text(yaml.safe_dump(recipe))
    return file


def _adapter(folder: Path, shape: object, *, seed: int) -> Path:
    """A random LoRA on every FFN matrix, as PEFT writes one."""
    draw = torch.Generator().manual_seed(seed)
    sizes = {"gate_proj": (shape.ffn, shape.hidden), "up_proj": (shape.ffn, shape.hidden)}  # type: ignore[attr-defined]
    sizes["down_proj"] = (shape.hidden, shape.ffn)  # type: ignore[attr-defined]
    tensors = {}
    for layer in range(shape.layers):  # type: ignore[attr-defined]
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
    context = precision(model, torch.device("cpu"))
    optimizer = torch.optim.AdamW(gates, lr=1e-3)
    draw = torch.Generator().manual_seed(0)
    for step in range(STEPS + 1):
        if step == 1:
            begun = time.perf_counter()
        ids_BT = torch.randint(model.config.vocab_size, (BATCH, LENGTH), generator=draw)
        if who == "ours":
            with context():
                logits = model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
                loss = losses.next_token(logits.flatten(0, 1), ids_BT[:, 1:].flatten()).mean()
        else:
            logits = model(input_ids=ids_BT, use_cache=False).logits[:, :-1].float()
            loss = functional.cross_entropy(logits.flatten(0, 1), ids_BT[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"tokens_per_second": BATCH * LENGTH * STEPS / seconds, "peak": peak}))


if __name__ == "__main__":
    main()
