"""Texts are those of transformers' own greedy generation, cut where lm-eval cuts them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import tiny
from frankenmoe.errors import NumericsError, PlanError, SourceError
from frankenmoe.evaluate.generation import cut
from frankenmoe.evaluate.lm import PrefixLM

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 1,
}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return made


def tokenizer() -> Any:
    made = tiny.make_tokenizer()
    made.pad_token = made.eos_token
    return made


def asked(contexts: list[str], until: list[str], tokens: int = 24) -> list[Instance]:
    settings = {"until": until, "do_sample": False, "temperature": 0.0, "max_gen_toks": tokens}
    return [
        Instance("generate_until", {}, (context, dict(settings)), 0, ("t", at, 1))
        for at, context in enumerate(contexts)
    ]


CONTEXTS = [
    "Once upon",
    "Question: 1 + 1?\nAnswer:",
    "x",
    "The end of the world is near, said",
    "ab" * 30,
    "Why",
    "A B C",
]


@pytest.fixture(scope="module")
def texts(model: Any) -> list[str]:
    """lm-eval's own texts for CONTEXTS, of which some stop early."""
    peer = HFLM(pretrained=model, tokenizer=tokenizer(), backend="causal", batch_size=3, add_bos_token=False)
    made: list[str] = peer.generate_until(asked(CONTEXTS, ["~", "q"]), disable_tqdm=True)
    assert len(set(map(len, made))) > 1
    return made


@pytest.mark.parametrize("rows", [1, 3, None])
def test_texts_are_lm_evals(model: Any, texts: list[str], rows: int | None) -> None:
    assert PrefixLM(model, tokenizer(), rows=rows).generate_until(asked(CONTEXTS, ["~", "q"])) == texts


def test_prompts_that_are_too_long_lose_their_left_end(model: Any) -> None:
    requests = asked(["ab" * 300, "cd" * 200], ["~"], tokens=100)
    lm = PrefixLM(model, tokenizer())
    peer = HFLM(pretrained=model, tokenizer=tokenizer(), backend="causal", batch_size=2, add_bos_token=False)
    assert lm.generate_until(requests) == peer.generate_until(requests, disable_tqdm=True)
    assert lm.counts["cut"] == 1


def test_requests_that_differ_in_their_stops_share_one_text(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    import frankenmoe.evaluate.lm as module

    whole = module.generate
    monkeypatch.setattr(module, "generate", lambda *a, **k: read.append(len(a[2])) or whole(*a, **k))
    (long,) = PrefixLM(model, tokenizer()).generate_until(asked(["Once upon"], ["Question"]))
    stop = long[len(long) // 2]
    both = [*asked(["Once upon"], [stop, "Question"]), *asked(["Once upon"], ["Question"])]
    assert PrefixLM(model, tokenizer()).generate_until(both) == [cut(long, [stop]), long]
    assert read == [1, 1]


def test_a_model_without_shared_reading_says_the_same(
    model: Any, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = PrefixLM(model, tokenizer())
    monkeypatch.setattr(lm, "sharing", type(lm.sharing)(0, True, "for this test"))
    assert lm.generate_until(asked(CONTEXTS, ["~", "q"])) == texts


def test_a_hybrid_model_is_told_where_it_is() -> None:
    torch.manual_seed(0)
    heads = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 16}
    config = AutoConfig.for_model("bamba", **SIZES, attn_layer_indices=[1], **heads)
    hybrid = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in hybrid.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    lm = PrefixLM(hybrid, tokenizer())
    assert lm.sharing.up_to == 0
    peer = HFLM(pretrained=hybrid, tokenizer=tokenizer(), backend="causal", batch_size=1, add_bos_token=False)
    assert lm.generate_until(asked(CONTEXTS, ["~"])) == peer.generate_until(asked(CONTEXTS, ["~"]), disable_tqdm=True)


def test_a_tokenizer_without_eos_is_refused(model: Any) -> None:
    without = tiny.make_tokenizer()
    without.eos_token = None
    with pytest.raises(SourceError, match="no EOS token"):
        PrefixLM(model, without).generate_until(asked(["Once"], ["~"]))


def test_a_model_shorter_than_the_text_to_be_made_is_refused(model: Any) -> None:
    with pytest.raises(SourceError, match="600 tokens are to be made, but the model sees 512"):
        PrefixLM(model, tokenizer()).generate_until(asked(["Once"], ["~"], tokens=600))


def test_nan_is_not_a_token(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    broken = AutoModelForCausalLM.from_pretrained(tmp_path)
    lm = PrefixLM(broken, tokenizer())
    with torch.no_grad():
        broken.lm_head.weight[5] = float("nan")
    with pytest.raises(NumericsError, match="document 1 of t: the model computes NaN or infinity"):
        lm.generate_until(asked(["Once", "Twice as long"], ["~"]))


def test_when_memory_runs_out_fewer_slots_go_on(model: Any, texts: list[str]) -> None:
    lm = PrefixLM(model, tokenizer())

    def scarce(_module: Any, _args: Any, inputs: dict[str, Any]) -> None:
        if len(inputs["input_ids"]) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    hook = model.base_model.register_forward_pre_hook(scarce, with_kwargs=True)
    try:
        assert lm.generate_until(asked(CONTEXTS, ["~", "q"])) == texts
    finally:
        hook.remove()
    assert lm.budget.rows == 1


def test_too_little_memory_for_one_text_is_said_before_it_is_tried(model: Any) -> None:
    lm = PrefixLM(model, tokenizer())
    lm.budget.bytes = 1000
    with pytest.raises(PlanError, match="too little memory for a single sequence"):
        lm.generate_until(asked(CONTEXTS, ["~"]))


def test_cut_at_the_first_stop() -> None:
    assert cut("so: Question", ["Question", ":"]) == "so"
    assert cut("so", []) == "so"
