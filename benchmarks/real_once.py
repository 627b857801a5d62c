"""One fit in a process of its own, for benchmarks/real.py: how many forward passes over the text it takes.

Counts the tokens that go through each decoder layer, forward and backward; a backward pass counts as two forward ones.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch


class Passes:
    """Tokens that went through the layers, in units of one layer."""

    def __init__(self) -> None:
        self.forward = self.backward = 0
        self.layers: set[int] = set()

    def watch(self, layer_class: Any) -> None:
        """Counts in every call of a layer of this class from now on."""
        plain = layer_class.forward

        def counted(layer: Any, hidden_BTD: torch.Tensor, *args: Any, **inputs: Any) -> Any:
            tokens = hidden_BTD.shape[:-1].numel()
            self.forward += tokens
            self.layers.add(layer.self_attn.layer_idx)
            out = plain(layer, hidden_BTD, *args, **inputs)
            first = out[0] if isinstance(out, tuple) else out
            if first.requires_grad:
                first.register_hook(lambda _: self._back(tokens))
            return out

        layer_class.forward = counted

    def _back(self, tokens: int) -> None:
        self.backward += tokens


def main() -> None:
    method, file, out = sys.argv[1:]
    torch.set_num_threads(1)
    from transformers.models.llama import modeling_llama

    import frankenmoe as fm
    from frankenmoe.gates.fitted import computing_dtype

    if method == "load":
        # as `fit` loads it: on a CPU without units for 16 bits in float32, which takes memory of its own
        kind = computing_dtype(fm.plan(fm.Recipe.load(Path(file))), torch.device("cpu"))
        model = fm.load(Path(file), dtype=kind).model
        for parameter in model.parameters():  # mapped pages are no anonymous memory, but a read of them is fair
            parameter.sum()
        return
    passes = Passes()
    passes.watch(modeling_llama.LlamaDecoderLayer)
    recipe = fm.Recipe.load(Path(file))
    texts = [Path(path) for expert in recipe.experts for path in expert.data]
    begun = time.perf_counter()
    done = fm.fit(recipe, Path(out), method=method)
    tokenizer = fm.load(done.artifact).tokenizer()
    limit = recipe.fit.tokens if recipe.fit else 32768
    tokens = sum(min(limit, len(tokenizer(path.read_text(), add_special_tokens=False)["input_ids"])) for path in texts)
    each = tokens * len(passes.layers)
    found = {
        "passes": (passes.forward + 2 * passes.backward) / each,
        "forward": passes.forward / each,
        "backward": passes.backward / each,
        "tokens": tokens,
        "seconds": time.perf_counter() - begun,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
