"""Loads one model in vLLM and prints its greedy tokens and times as JSON; in_vllm.py starts it in its environment.

Reads {"model", "prompt": ids, "tokens": how many} from stdin.
"""

import json
import os
import sys
import time

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_DO_NOT_TRACK": "1",
}


def main() -> None:
    asked = json.load(sys.stdin)
    from vllm import LLM, SamplingParams, TokensPrompt

    begun = time.perf_counter()
    model = LLM(
        asked["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=len(asked["prompt"]) + asked["tokens"],
        max_num_seqs=1,
        skip_tokenizer_init=True,
        seed=0,
    )
    loading = time.perf_counter() - begun
    how = SamplingParams(temperature=0, max_tokens=asked["tokens"], ignore_eos=True, detokenize=False)
    begun = time.perf_counter()
    (done,) = model.generate([TokensPrompt(prompt_token_ids=asked["prompt"])], how, use_tqdm=False)
    writing = time.perf_counter() - begun
    print(json.dumps({"tokens": list(done.outputs[0].token_ids), "loading": loading, "writing": writing}))


if __name__ == "__main__":
    main()
