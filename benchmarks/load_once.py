"""Loads one model, by stock transformers or by us, in this process, runs it once, and prints what that took as JSON.

Knows nothing of contestants: load.py starts it for each.
"""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from common import status
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama  # noqa: F401  (transformers imports it on first use)
from transformers.models.mixtral import modeling_mixtral  # noqa: F401

from frankenmoe.subject import load

TOKENS = 32
LOADERS = {
    "stock": lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype="auto"),
    "ours": lambda folder: load(folder).model,
    "auto": AutoModelForCausalLM.from_pretrained,  # of a virtual artifact, through transformers
}


def main(loader: str, folder: str) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # from here VmHWM, the kernel's own peak, counts anew
    before, begun = status("self"), time.perf_counter()
    model = LOADERS[loader](folder)
    loaded = facts(before, begun)
    with torch.inference_mode():
        model(input_ids=torch.arange(1)[None])
        first = facts(before, begun)
        model(input_ids=torch.arange(TOKENS)[None])
    print(json.dumps({"loaded": loaded, "first logits": first, f"{TOKENS} tokens more": facts(before, begun)}))


def facts(before: Mapping[str, int], begun: float) -> dict[str, float]:
    """Seconds since `begun`; in bytes the peak of resident memory, its growth, and the growth of what is no file's."""
    seconds, now = time.perf_counter() - begun, status("self")
    return {
        "seconds": seconds,
        "peak": now["VmHWM"],
        "grown": now["VmHWM"] - before["VmRSS"],
        "anon": now["RssAnon"] - before["RssAnon"],
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
