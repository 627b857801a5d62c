"""Scores a task's first documents in this process with one contestant and prints seconds, peak memory and answers."""

import json
import logging
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

who, folder, name, documents, threads, data_dir = sys.argv[1:]
os.environ["OMP_NUM_THREADS"] = threads
os.environ["TQDM_DISABLE"] = "1"
logging.disable(logging.WARNING)

import torch  # noqa: E402
from common import status  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from frankenmoe.evaluate.lm import PrefixLM  # noqa: E402
from frankenmoe.evaluate.prompts import BENCHMARKS, best  # noqa: E402
from frankenmoe.evaluate.tasks import load_tasks  # noqa: E402

GENERATION_BATCH = 8


def main() -> None:
    torch.set_num_threads(int(threads))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    benchmark = BENCHMARKS[name]
    task = next(iter(load_tasks(benchmark, data_dir=Path(data_dir))[0].values()))  # of MMLU the first subject
    task.build_all_requests(limit=int(documents))
    if who == "HFLM":  # one sequence at a time is its default and, on a CPU, its fastest
        batch = GENERATION_BATCH if benchmark.stops else 1
        lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch, add_bos_token=False)
    else:
        lm = PrefixLM(model, tokenizer, rows=GENERATION_BATCH if benchmark.stops else None)
    began = time.perf_counter()
    answer = lm.generate_until if benchmark.stops else lm.loglikelihood
    answers = answer(task.instances, disable_tqdm=True) if not benchmark.stops else answer(task.instances)
    seconds = time.perf_counter() - began
    by_document = defaultdict(list)
    for instance, found in zip(task.instances, answers, strict=True):
        by_document[instance.doc_id].append(found)
    picked = [] if benchmark.stops else [best([each[0] for each in found]) for found in by_document.values()]
    print(json.dumps({"seconds": seconds, "peak": status("self")["VmHWM"], "answers": answers, "picked": picked}))


main()
