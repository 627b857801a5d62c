"""Models without an attention layer generate, though transformers cannot count the tokens in their cache."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import frankenmoe as fm
import tiny
from family_cases import apart, make_parent, write_recipe
from frankenmoe.evaluate.parents import stock_model
from frankenmoe.moe.continuation import Continuation
from frankenmoe.moe.counting import CountingCache, counting
from frankenmoe.moe.generate import reply
from frankenmoe.moe.promptcache import PromptCache
from gguf_cases import ALL
from refusals import cli

WITHOUT = ("nemotron_h-mamba", "granite4-mamba", "lfm2-conv", "qwen3_5-linear")
NEW = 6


def recipe(root: Path, name: str) -> Path:
    base, one = (make_parent(root / f"{name}{seed}", ALL[name], seed=seed) for seed in range(2))
    return write_recipe(root / f"{name}.yml", ALL[name], base, [base, one])


def greedy(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, return_dict_in_generate=True, **settings, **options)


@pytest.mark.parametrize("name", WITHOUT)
def test_a_cache_changes_nothing(name: str, tmp_path: Path) -> None:
    moe: Any = fm.load(recipe(tmp_path, name))
    ids = tiny.ids(batch=1)
    with torch.no_grad():
        read = moe.model(input_ids=ids)  # a cache is the default
        assert apart(moe.model(input_ids=ids, use_cache=False).logits, read.logits) < 1e-6
    assert read.past_key_values.get_seq_length() == ids.shape[1]
    cached = greedy(moe.model, ids)
    assert torch.equal(cached.sequences, greedy(moe.model, ids, use_cache=False).sequences)
    assert isinstance(cached.past_key_values, CountingCache)
    assert cached.past_key_values.seen == ids.shape[1] + NEW - 1
    on = Continuation(moe, moe.tokenizer(), ids[0].tolist(), max_new_tokens=NEW)
    assert [on.choose(on.read()) for _ in range(NEW)] == cached.sequences[0, ids.shape[1] :].tolist()
    assert on.known == ids.shape[1] + NEW - 1


def test_models_with_a_cache_of_their_own_keep_it() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes)).eval()
    ids = tiny.ids(batch=1)
    before = greedy(model, ids).sequences
    assert torch.equal(greedy(counting(model), ids).sequences, before)
    assert not model.get_decoder()._forward_pre_hooks


def test_a_known_history_is_not_read_again(tmp_path: Path) -> None:
    moe: Any = fm.load(recipe(tmp_path, "nemotron_h-mamba"))
    tokenizer, cache = moe.tokenizer(), PromptCache()
    history = [{"role": "user", "content": "a beginning"}]
    first = reply(moe, tokenizer, history, max_new_tokens=4, cache=cache)
    history += [{"role": "assistant", "content": first.text}, {"role": "user", "content": " goes on"}]
    plain, known = (reply(moe, tokenizer, history, max_new_tokens=4, cache=each) for each in (None, cache))
    assert known.tokens == plain.tokens
    assert len(known.read) == len(known.layers[0].ids_TK)


def test_commands_run_and_say_what_stock_transformers_needs(tmp_path: Path) -> None:
    file = recipe(tmp_path, "granite4-mamba")
    assert "generate(use_cache=False)" in cli("plan", file).stderr
    outcome = cli("chat", file, "--prompt", "a beginning", "--max-new-tokens", 4, "--trace")
    assert outcome.code == 0, outcome.stderr
    built = fm.build(file, tmp_path / "out").folder
    ids = tiny.ids(batch=1)
    stock = AutoModelForCausalLM.from_pretrained(built)
    with pytest.raises(ValueError, match="get_seq_length"):
        greedy(stock, ids)
    expected = greedy(stock, ids, use_cache=False).sequences
    assert torch.equal(greedy(stock_model(built, dtype=None), ids).sequences, expected)
    assert "use_cache" not in cli("plan", recipe(tmp_path, "granite4")).stderr
