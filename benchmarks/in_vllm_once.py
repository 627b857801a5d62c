"""Runs models in vLLM, each in a process of its own: greedy tokens and times. in_vllm.py starts it in its environment.

Reads a line of JSON for each model from stdin: {"model", "prompt": ids, "tokens": how many, "engine": options of vLLM}.
Answers with a line: {"tokens", "loading", "writing"}, or {"error"} where vLLM does not run the model. vLLM is imported
once and its processes are forked, as importing takes longer than a small model.
"""

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
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

    # vLLM would look at the class in one more process, which takes longer than all else
    (name,) = json.loads((Path(asked["model"]) / "config.json").read_text())["architectures"]
    if name in ModelRegistry.models:
        ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())
    begun = time.perf_counter()
    model = LLM(
        asked["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=len(asked["prompt"]) + asked["tokens"],
        max_num_seqs=1,
        skip_tokenizer_init=True,
        seed=0,
        **asked["engine"],
    )
    loading = time.perf_counter() - begun
    how = SamplingParams(temperature=0, max_tokens=asked["tokens"], ignore_eos=True, detokenize=False)
    begun = time.perf_counter()
    (done,) = model.generate([TokensPrompt(prompt_token_ids=asked["prompt"])], how, use_tqdm=False)
    return {
        "tokens": list(done.outputs[0].token_ids),
        "loading": loading,
        "writing": time.perf_counter() - begun,
    }


if __name__ == "__main__":
    main()
