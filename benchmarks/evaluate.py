"""Scoring the leaderboard's tasks against lm-eval's own HF backend: time, memory and agreement, in fresh processes."""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import MB, REPOSITORY, Row, arguments, interleave, log, measure, publish, workspace
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from frankenmoe.evaluate.rows import read_rows

ONCE = Path(__file__).parent / "evaluate_once.py"
OURS, PEER = "frankenmoe", "HFLM"
VOCABULARY = 32000  # as in the models of Raiden's family; the head over it is a good part of a small model's work
# what the issue asks: task, how many times as fast as the peer
FASTER = {"arc_challenge": 3.5, "hellaswag": 3.5, "truthfulqa": 3.5, "mmlu": 4.0, "winogrande": 1.4, "gsm8k": 2.0}
SHAPES = {
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "20M": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 8},
    "300M": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 18, "num_attention_heads": 16},
}
# scale -> model -> task -> documents
DOCUMENTS: Mapping[str, Mapping[str, Mapping[str, int]]] = {
    "smoke": {"tiny": {"truthfulqa": 2}},
    "small": {"20M": {"arc_challenge": 2, "truthfulqa": 4, "mmlu": 8, "winogrande": 6}},
    "full": {
        "20M": {"arc_challenge": 6, "hellaswag": 6, "truthfulqa": 16, "mmlu": 24, "winogrande": 40, "gsm8k": 24},
        "300M": {"arc_challenge": 1, "hellaswag": 1, "truthfulqa": 2, "mmlu": 12, "winogrande": 6, "gsm8k": 8},
    },
}
THREADS = (1, 2)
AGREE = 1e-4  # nats
Facts = Mapping[str, Any]


def main() -> None:
    options = arguments("Score tasks, and score them with lm-eval's HFLM.", name="evaluate", more=own_options)
    rows: list[Row] = []
    with workspace(options.work) as work:
        asked = DOCUMENTS[options.scale]
        for shape, tasks in asked.items():
            if options.model and shape not in options.model:
                continue
            model = make_model(work / shape, shape, options.data_dir)
            for task, documents in tasks.items():
                if options.task and task not in options.task:
                    continue
                for threads in THREADS[: 1 if options.scale == "smoke" else None]:
                    if options.threads and threads not in options.threads:
                        continue
                    log(f"{shape}, {task}, {threads} threads")
                    turns = {
                        who: partial(score_once, who, model, task, documents, threads, options.data_dir)
                        for who in (OURS, PEER)
                    }
                    rows += rows_of(f"{shape}, {threads} thr", task, interleave(turns, rounds=options.rounds))
        publish("evaluate", rows, options=options, work=work)


def own_options(parser: argparse.ArgumentParser) -> None:
    """The rows to score, and what to leave out."""
    default = REPOSITORY.parent / "shared" / "data" / "leaderboard"
    parser.add_argument("--data-dir", type=Path, default=default, help=f"folder with the rows (default: {default})")
    parser.add_argument("--model", action="append", choices=SHAPES, help="only this model; may be repeated")
    parser.add_argument("--task", action="append", choices=FASTER, help="only this task; may be repeated")
    parser.add_argument("--threads", action="append", type=int, choices=THREADS, help="only so many threads")


def make_model(folder: Path, shape: str, data_dir: Path) -> Path:
    """A random Llama and a byte-level BPE made of the rows' own text, so that prompts have the length that they have
    in practice."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    splits = {"gsm8k": "train", "arc_challenge": "train", "hellaswag": "validation", "winogrande": "validation"}
    rows = (row for name, split in splits.items() for row in read_rows(name, split, data_dir=data_dir))
    texts = (value for row in rows for value in row.values() if isinstance(value, str))
    tokenizer.train_from_iterator(texts, trainer=trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=4096, bos_token_id=0, eos_token_id=1, **SHAPES[shape]
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def score_once(who: str, model: Path, task: str, documents: int, threads: int, data_dir: Path) -> Facts:
    """What evaluate_once.py measured of itself in a fresh process."""
    command = [sys.executable, str(ONCE), who, str(model), task, str(documents), str(threads), str(data_dir)]
    facts: Facts = json.loads(measure(command).stdout.splitlines()[-1])
    return facts


def rows_of(where: str, task: str, facts: Mapping[str, list[Facts]]) -> list[Row]:
    """Ratios of medians for time and memory; the largest difference between scores, or how many texts differ."""
    ours, peer = facts[OURS], facts[PEER]
    seconds = {who: [found["seconds"] for found in runs] for who, runs in facts.items()}
    memory = {who: [found["peak"] / MB for found in runs] for who, runs in facts.items()}
    fast = statistics.median(seconds[OURS]) / statistics.median(seconds[PEER])
    lean = max(memory[OURS]) / max(memory[PEER])
    rows = [
        Row(f"{where}: {task}: time against HFLM", fast, "x", 1 / FASTER[task], seconds),
        Row(f"{where}: {task}: peak memory against HFLM", lean, "x", 1.0, memory),
    ]
    if task == "gsm8k":
        differ = sum(a != b for a, b in zip(ours[0]["answers"], peer[0]["answers"], strict=True))
        return [*rows, Row(f"{where}: {task}: texts that differ", differ, "", 0, {})]
    pairs = list(zip(ours[0]["answers"], peer[0]["answers"], strict=True))
    worst = max(abs(a[0] - b[0]) for a, b in pairs)
    picked = [found[0]["picked"] for found in (ours, peer)]
    differ = sum(a != b for a, b in zip(*picked, strict=True))
    return [
        *rows,
        Row(f"{where}: {task}: largest difference", worst * 1e6, "e-6", AGREE * 1e6, {}),
        Row(f"{where}: {task}: other answer picked", differ, "", 0, {}),
    ]


if __name__ == "__main__":
    main()
