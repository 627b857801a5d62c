"""Loads one model, `dense` or `virtual`, in this process, runs it once, and prints what that took as JSON.

Knows nothing of contestants: load.py starts it for each.
"""

import json
import sys
import time
from pathlib import Path

import torch
from common import status
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama  # noqa: F401  (transformers imports it on first use)

from frankenmoe.loading import load

TOKENS = 32
LOADERS = {
    "dense": lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype="auto"),
    "virtual": lambda folder: load(folder).model,
}


def main(form: str, folder: str) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # from here VmHWM, the kernel's own peak, counts anew
    before, begun = status("self")["VmRSS"], time.perf_counter()
    model = LOADERS[form](folder)
    loaded = facts(before, begun)
    with torch.inference_mode():
        model(input_ids=torch.arange(TOKENS)[None])
    print(json.dumps({"loaded": loaded, "first logits": facts(before, begun)}))


def facts(before: int, begun: float) -> dict[str, float]:
    """Seconds since `begun`, the peak of resident memory in bytes (anonymous and file), and its growth."""
    seconds, now = time.perf_counter() - begun, status("self")
    return {"seconds": seconds, "peak": now["VmHWM"], "grown": now["VmHWM"] - before, "anon": now["RssAnon"]}


if __name__ == "__main__":
    main(*sys.argv[1:])
