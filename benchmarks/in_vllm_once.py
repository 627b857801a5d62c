"""Runs models in vLLM, each in a process of its own: greedy tokens and times. in_vllm.py starts it in its environment.

Reads a line of JSON for each model from stdin: {"model", "prompt": ids, "tokens": how many, "dtype", "engine": options
of vLLM, "mends": names from MENDS, "scored": whether to add log-probabilities}. Answers with a line: {"tokens",
"scores": a row of all ids for each token, or null, "loading", "writing"}, or {"error"} where vLLM does not run the
model. vLLM is imported once and its processes are forked, as importing takes longer than a small model.
"""

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_DO_NOT_TRACK": "1",
}
LAST = 2000  # characters of what a process that fails has said
LONGEST = 600  # seconds of processor time for a model


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints too
    import vllm  # noqa: F401 (the processes have it already)

    for line in sys.stdin:
        print(json.dumps(forked(json.loads(line))), file=answers, flush=True)


def forked(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What a process of its own finds, which may crash."""
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as found:
        pid = os.fork()
        if pid == 0:
            _child(asked, said, found)
        _, status = os.waitpid(pid, 0)
        for file in (said, found):
            file.seek(0)
        if status == 0:
            return dict(json.load(found))
        if os.WIFSIGNALED(status):
            return {"error": f"vLLM was ended by {signal.Signals(os.WTERMSIG(status)).name}"}
        return {"error": said.read()[-LAST:]}


def _child(asked: Mapping[str, Any], said: IO[str], found: IO[str]) -> None:
    os.dup2(said.fileno(), 1)
    os.dup2(said.fileno(), 2)
    code = 1
    signal.setitimer(signal.ITIMER_PROF, LONGEST)  # ends it
    try:
        json.dump(run(asked), found)
        found.flush()
        code = 0
    except BaseException as error:  # whatever it is, the other models still run
        print(f"\n{type(error).__name__}: {error}", flush=True)
    finally:
        os._exit(code)


def run(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The greedy tokens of one model, and the seconds that loading and writing took."""
    from vllm import LLM, ModelRegistry, SamplingParams, TokensPrompt

    for name in asked["mends"]:
        MENDS[name]()
    # vLLM would look at the class in one more process, which takes longer than all else
    (name,) = json.loads((Path(asked["model"]) / "config.json").read_text())["architectures"]
    if name in ModelRegistry.models:
        ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())
    begun = time.perf_counter()
    model = LLM(
        asked["model"],
        dtype=asked["dtype"],
        enforce_eager=True,
        max_model_len=len(asked["prompt"]) + asked["tokens"],
        max_num_seqs=1,
        skip_tokenizer_init=True,
        seed=0,
        max_logprobs=-1,
        **asked["engine"],
    )
    loading = time.perf_counter() - begun
    how = SamplingParams(
        temperature=0,
        max_tokens=asked["tokens"],
        ignore_eos=True,
        detokenize=False,
        logprobs=-1 if asked["scored"] else None,
    )
    begun = time.perf_counter()
    (done,) = model.generate([TokensPrompt(prompt_token_ids=asked["prompt"])], how, use_tqdm=False)
    writing = time.perf_counter() - begun
    (answer,) = done.outputs
    rows = [[row[token].logprob for token in sorted(row)] for row in answer.logprobs] if asked["scored"] else None
    return {"tokens": list(answer.token_ids), "scores": rows, "loading": loading, "writing": writing}


# ---- what vLLM 0.32 computes otherwise than transformers -------------------------------------------------------------


def flat_rotation() -> None:
    """LFM2's code hands the rotation heads one by one, whose kernel for CPUs then takes every head for a token.

    lfm2_moe.py (and lfm2.py), Lfm2MoeAttention.forward; csrc/cpu/pos_encoding.cpp reads positions past their end.
    """
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    kernel = RotaryEmbedding.forward_cpu

    def forward(self: Any, positions: Any, query: Any, key: Any) -> tuple[Any, Any]:
        flat = kernel(self, positions, query.flatten(1), key.flatten(1))
        return flat[0].view(query.shape), flat[1].view(key.shape)

    RotaryEmbedding.forward_cpu = forward


def own_head() -> None:
    """LFM2 MoE's code ties the head to the embeddings, whatever the config says (lfm2_moe.py)."""
    from vllm.model_executor.models import lfm2_moe

    class Head(lfm2_moe.ParallelLMHead):
        def tie_weights(self, embed_tokens: Any) -> Any:
            return self

    lfm2_moe.ParallelLMHead = Head


def torch_for_empty() -> None:
    """On a CPU, oneDNN divides by zero on a matrix without numbers (layers/utils.py, dispatch_cpu_unquantized_gemm).

    GLM 4 MoE's code makes a shared expert without neurons where the config has none (glm4_moe.py, Glm4MoE). It looks
    for null, but the config's class wants a number, 0. Where oneDNN raises an error, vLLM multiplies with torch.
    """
    from vllm import _custom_ops

    prepared = _custom_ops.create_onednn_mm

    def create(weight: Any, *how: Any) -> Any:
        if not weight.numel():
            raise RuntimeError("a matrix without numbers")
        return prepared(weight, *how)

    _custom_ops.create_onednn_mm = create


MENDS: Mapping[str, Callable[[], None]] = {mend.__name__: mend for mend in (flat_rotation, own_head, torch_for_empty)}


if __name__ == "__main__":
    main()
