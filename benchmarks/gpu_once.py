"""Makes one model with random weights on a GPU, in this process, and prints the seconds that its work takes as JSON.

Knows nothing of contestants: gpu.py starts it for each, since one card does not hold two of them.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpu import CONTEXT, EXPERTS, LARGE, PREFILL, RANK, SHAPES, TOP_K, weights
from sources import Shape
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from frankenmoe.moe.adapter import with_adapter
from frankenmoe.moe.block import MoEBlock
from frankenmoe.moe.gpu import packing
from frankenmoe.moe.router import Router

DTYPE = torch.bfloat16
PASSES, STEPS = 5, 16
COPIED = {"cuda": 2**32, "cpu": 2**22}  # bytes that are read to learn how fast memory is
SQUARE = {"cuda": 8192, "cpu": 256}  # rows and columns of the product that tells how fast the card multiplies
Work = Callable[[], object]


def main(form: str, scale: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    packing.DEVICES = frozenset({device.type})  # where there is no GPU, what would run on one
    check_room(form, scale, device)
    with torch.inference_mode():
        found = (floors(device), {}) if form == "floors" else timings(make(form, SHAPES[scale], device), scale, device)
    print(json.dumps(found))


def check_room(form: str, scale: str, device: torch.device) -> None:
    """Ends the process where the card cannot hold the weights: at full scale, 16 distinct experts are 72 GB."""
    if device.type != "cuda" or form == "floors":
        return
    free, needed = torch.cuda.mem_get_info()[0] / 1e9, weights(form, scale) / 1e9
    if needed > free:
        raise SystemExit(f"{form} at scale {scale} has {needed:.0f} GB of weights, the GPU {free:.0f} GB free")


def floors(device: torch.device) -> dict[str, float]:
    """Bytes read a second, the better of a copy and a sum, and operations a second of a large product."""
    numbers = torch.ones(COPIED[device.type] // 2, dtype=DTYPE, device=device)
    other = torch.empty_like(numbers)
    a, b = (torch.randn(SQUARE[device.type], SQUARE[device.type], dtype=DTYPE, device=device) for _ in "ab")
    size = numbers.numel() * numbers.itemsize
    copied = 2 * size / seconds(lambda: other.copy_(numbers), device)
    read = size / seconds(lambda: numbers.view(torch.int64).max(), device)
    return {"bytes": max(copied, read), "operations": 2 * len(a) ** 3 / seconds(lambda: a @ b, device)}


def make(form: str, shape: Shape, device: torch.device) -> Any:
    """The dense parent, stock Mixtral with one of its ways to compute experts, or the parent with our blocks."""
    with device:  # made where it stays, and only made under it: it costs every operation some time
        return build(form, shape).requires_grad_(False).eval()


def build(form: str, shape: Shape) -> Any:
    """That model on the device of the moment."""
    sizes = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.hidden // (100 if shape.hidden % 100 == 0 else 16),
        "vocab_size": shape.vocab,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    if form not in ("dense", "distinct", "adapters"):
        heads = {"num_key_value_heads": sizes["num_attention_heads"]}  # as many as the parent has
        config = MixtralConfig(**sizes, **heads, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K)
        return MixtralForCausalLM._from_config(config, dtype=DTYPE, experts_implementation=form)
    config = LlamaConfig(**sizes)
    model = LlamaForCausalLM._from_config(config, dtype=DTYPE)
    for layer in model.model.layers if form != "dense" else ():
        gate_ED = torch.randn(EXPERTS, shape.hidden, dtype=DTYPE)
        experts = (distinct if form == "distinct" else adapters)(layer.mlp, config)
        layer.mlp = MoEBlock(Router(gate_ED, top_k=TOP_K, renormalize=True), experts)
    return model


def distinct(mlp: nn.Module, config: Any) -> list[nn.Module]:
    """The parent's FFN and others like it."""
    return [mlp, *(LlamaMLP(config).to(DTYPE) for _ in range(EXPERTS - 1))]


def adapters(mlp: nn.Module, _config: Any) -> list[nn.Module]:
    """Random LoRAs over the parent's FFN, on all three of its projections."""

    def lora(name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        outputs, inputs = mlp.get_submodule(name).weight.shape
        return 0.02 * torch.randn(RANK, inputs, dtype=DTYPE), 0.02 * torch.randn(outputs, RANK, dtype=DTYPE), 1.0

    return [
        with_adapter(mlp, {name: lora(name) for name in ("gate_proj", "up_proj", "down_proj")}) for _ in range(EXPERTS)
    ]


def timings(model: Any, scale: str, device: torch.device) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of each kind of work, and why not for a kind that fits no memory or that no graph can hold."""
    layers = [layer.mlp for layer in model.model.layers]
    hidden_1D = torch.randn(1, 1, model.config.hidden_size, dtype=DTYPE, device=device)
    works: dict[str, Callable[[], float]] = {
        "prefill": lambda: seconds(reading(model, 1, PREFILL), device),
        "large": lambda: seconds(reading(model, *LARGE[scale]), device),
        "decode": lambda: decoding(model, device),
        # last, since a capture that failed may leave the device unusable
        "layers": lambda: seconds(replayed(lambda: [layer(hidden_1D) for layer in layers], device), device),
    }
    found, failed = {}, {}
    for name, work in works.items():
        try:
            found[name] = work()
        except RuntimeError as error:
            failed[name] = str(error).partition("\n")[0]
    for layer in layers:
        if isinstance(layer, MoEBlock) and layer._packing.of(layer.groups, hidden_1D) is None:
            raise SystemExit("a block was not packed, so what was measured is not what is meant")
    return found, failed


def reading(model: Any, rows: int, length: int) -> Work:
    """One forward of `rows` texts of `length` tokens."""
    ids_BT = torch.randint(model.config.vocab_size, (rows, length), device=model.device)
    return lambda: model(input_ids=ids_BT, logits_to_keep=1, use_cache=False)


def decoding(model: Any, device: torch.device) -> float:
    """Median seconds for one more token behind a short context."""
    vocabulary = model.config.vocab_size
    prompt_1T = torch.randint(vocabulary, (1, CONTEXT), device=device)
    cache = model(input_ids=prompt_1T, use_cache=True).past_key_values
    ids_S11 = torch.randint(vocabulary, (STEPS + 2, 1, 1), device=device)
    steps = [lambda ids=ids: model(input_ids=ids, past_key_values=cache, use_cache=True) for ids in ids_S11]
    return statistics.median(times(steps, device)[2:])


def replayed(work: Work, device: torch.device) -> Work:
    """The work as a CUDA graph, without what it costs the host to start every product."""
    if device.type != "cuda":
        return work
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def seconds(work: Work, device: torch.device) -> float:
    """Median seconds, after two runs that do not count."""
    return statistics.median(times([work] * (PASSES + 2), device)[2:])


def times(works: Sequence[Work], device: torch.device) -> list[float]:
    """Seconds of each, until the device has done it."""
    found = []
    for work in works:
        finish(device)
        begun = time.perf_counter()
        work()
        finish(device)
        found.append(time.perf_counter() - begun)
    return found


def finish(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
