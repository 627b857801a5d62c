"""Loads one model in this process, generates greedily, and prints as JSON what that took; raiden.py starts it for each.

Seconds to load, to the first token of a prompt, and per token after that (the median); the kernel's peak of memory.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import status
from transformers import AutoModelForCausalLM

from frankenmoe.moe.dense import load_source
from frankenmoe.planning.sources import open_source
from frankenmoe.recipe.sourcename import parse_source
from frankenmoe.subject import load

PROMPT = 16  # tokens


def main(loader: str, folder: str, tokens: str) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    begun = time.perf_counter()
    model = LOADERS[loader](Path(folder))
    loaded = time.perf_counter()
    seconds: list[float] = []
    with torch.inference_mode():
        ids, cache = torch.arange(3, 3 + PROMPT)[None], None
        for _ in range(int(tokens)):
            before = time.perf_counter()
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            seconds.append(time.perf_counter() - before)
    found = {"load": loaded - begun, "first": seconds[0], "token": statistics.median(seconds[2:])}
    print(json.dumps(found | {"peak": status("self")["VmHWM"], "anon": status("self")["RssAnon"]}))


def _dense(folder: Path) -> Any:
    source = open_source(parse_source(str(folder), folder=folder), folder=folder, weights=True)
    return load_source(source, stored="BF16")


LOADERS = {
    "stock": lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype="auto"),
    "dense": _dense,
    "virtual": lambda folder: load(folder).model,
}

if __name__ == "__main__":
    main(*sys.argv[1:])
