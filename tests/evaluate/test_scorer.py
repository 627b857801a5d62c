"""Scores do not depend on how the reading is shared: equal to lm-eval's backend, and to one that is known."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import frankenmoe as fm
import tiny
from frankenmoe.errors import NumericsError, PlanError, SourceError
from frankenmoe.evaluate import scorer as scorer_module
from frankenmoe.evaluate.lm import PrefixLM
from frankenmoe.evaluate.prompts import BENCHMARKS
from frankenmoe.evaluate.scorer import Query
from frankenmoe.evaluate.tasks import load_tasks
from rowfiles import write_rows

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
OLD = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 4096}
SHARED = {
    "llama": SIZES,
    "qwen2": SIZES,
    "gpt2": OLD,  # learnt positions
    "mixtral": SIZES | {"num_local_experts": 4},
    "cohere": SIZES,  # logits that are scaled behind the head
}
PARTLY = {"mistral": SIZES | {"sliding_window": 560}, "gemma2": SIZES | {"head_dim": 8, "sliding_window": 560}}
ALONE = {
    "bloom": {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4},  # ALiBi from a flat mask
    "mpt": {"vocab_size": 97, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 4096},
    "gpt_neo": {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],  # a window under another name
        "window_size": 64,
        "max_position_embeddings": 4096,
    },
}


def make_model(family: str, sizes: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)  # far enough from uniform that a wrong mask shows
    return model


def instances(name: str, folder: Path, limit: int | None = 3) -> list[Instance]:
    found = []
    for task in load_tasks(BENCHMARKS[name], data_dir=folder)[0].values():
        task.build_all_requests(limit=limit)
        found += task.instances
    return found


def compare(model: Any, requests: list[Instance], **options: Any) -> PrefixLM:
    """Asserts that ours and lm-eval's backend agree; ours, to be asked more."""
    tokenizer = tiny.make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    ours = PrefixLM(model, tokenizer, **options)
    length = options.get("max_length")
    peer = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", add_bos_token=False, max_length=length)
    found = ours.loglikelihood(requests)
    expected = peer.loglikelihood(requests, disable_tqdm=True)
    assert len(found) == len(expected) > 0
    for (ll, greedy), (peer_ll, peer_greedy) in zip(found, expected, strict=True):
        assert ll == pytest.approx(peer_ll, abs=1e-4)
        assert greedy == peer_greedy
    return ours


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.mark.parametrize("family", SHARED)
def test_shared_reading_scores_as_lm_evals_backend(family: str, data_dir: Path) -> None:
    requests = instances("mmlu", data_dir) + instances("truthfulqa", data_dir) + instances("winogrande", data_dir)
    lm = compare(make_model(family, SHARED[family]), requests)
    assert lm.sharing.reason is None
    texts = {context + rest for context, rest in (request.args for request in requests)}
    assert lm.scorer.tokens_read < sum(map(len, texts)) / 3  # a token is a character here


@pytest.mark.parametrize("family", PARTLY)
def test_beyond_its_window_a_model_is_read_alone(family: str, data_dir: Path) -> None:
    requests = instances("truthfulqa", data_dir) + instances("winogrande", data_dir)
    lm = compare(make_model(family, PARTLY[family]), requests)
    lengths = [len(context + rest) for context, rest in (request.args for request in requests)]
    assert min(lengths) < 560 < max(lengths)
    assert lm.sharing.up_to == 560
    assert "window" in (lm.sharing.reason or "")


@pytest.mark.parametrize("family", ALONE)
def test_a_model_that_cannot_be_read_in_parts_is_found_out_and_scored_right(family: str, data_dir: Path) -> None:
    lm = compare(make_model(family, ALONE[family]), instances("winogrande", data_dir))
    assert lm.sharing.up_to == 0
    assert lm.sharing.reason


def test_inputs_that_are_too_long_lose_their_left_end(data_dir: Path) -> None:
    requests = instances("arc_challenge", data_dir) + instances("hellaswag", data_dir)
    lm = compare(make_model("llama", SIZES), requests, max_length=300)
    assert lm.counts["cut"] == len(requests)


def test_a_virtual_moe_scores_as_lm_evals_backend(
    parents: dict[str, list[Path]], data_dir: Path, tmp_path: Path
) -> None:
    recipe = tiny.write_recipe(tmp_path / "r.yml", parents["llama"][0], parents["llama"])
    moe = fm.load(recipe, dtype="float32")
    requests = instances("winogrande", data_dir) + instances("mmlu", data_dir)
    compare(moe.model, requests, max_length=200)


def test_with_a_capacity_each_sequence_is_read_alone(
    parents: dict[str, list[Path]], data_dir: Path, tmp_path: Path
) -> None:
    recipe = tiny.write_recipe(tmp_path / "r.yml", parents["llama"][0], parents["llama"])
    moe = fm.load(recipe, dtype="float32", capacity_factor=0.75)
    requests = instances("winogrande", data_dir, limit=2)
    lm = compare(moe.model, requests, max_length=100)
    assert lm.sharing.alone
    assert "capacity" in (lm.sharing.reason or "")


class Bigram(torch.nn.Module):
    """A model whose next token depends on the last one only, by a table of logits."""

    def __init__(self, table_VV: torch.Tensor) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(table_VV)
        self.config = PretrainedConfig(
            vocab_size=len(table_VV), hidden_size=8, num_attention_heads=1, num_hidden_layers=1
        )
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.table[input_ids], past_key_values=None)


def test_a_known_likelihood_is_scored_exactly() -> None:
    table = torch.randn(97, 97, generator=torch.Generator().manual_seed(0))
    tokenizer = tiny.make_tokenizer()
    lm = PrefixLM(Bigram(table), tokenizer, max_length=64)
    pairs = [("What is", " it?"), ("What is", " that"), ("", "so"), ("spaces  ", "go over")]
    requests = [Instance("loglikelihood", {}, pair, at) for at, pair in enumerate(pairs)]
    for (context, rest), (ll, _) in zip(pairs, lm.loglikelihood(requests), strict=True):
        ids = tokenizer.encode(context + rest, add_special_tokens=False)
        ids = ids if context else [tokenizer.bos_token_id, *ids]
        first = len(tokenizer.encode(context.rstrip(), add_special_tokens=False)) if context else 1
        logprobs = table.log_softmax(-1)
        expected = sum(float(logprobs[a, b]) for a, b in zip(ids[first - 1 : -1], ids[first:], strict=True))
        assert ll == pytest.approx(expected, abs=1e-5)


def test_rolling_likelihood_is_lm_evals() -> None:
    model, tokenizer = make_model("llama", SIZES), tiny.make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in ("short", "a longer one " * 20)]
    ours = PrefixLM(model, tokenizer, max_length=64).loglikelihood_rolling(requests)
    peer = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", add_bos_token=False, max_length=64)
    assert ours == pytest.approx(peer.loglikelihood_rolling(requests, disable_tqdm=True), abs=1e-3)


def test_when_memory_runs_out_smaller_passes_follow(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama", SIZES)
    lm = PrefixLM(model, tiny.make_tokenizer())
    requests = instances("winogrande", data_dir, limit=None)
    expected = lm.loglikelihood(requests)
    whole = scorer_module.scored
    sizes = []

    def scarce(model: Any, ids_BT: torch.Tensor, *rest: Any, **options: Any) -> Any:
        sizes.append(len(ids_BT))
        if len(ids_BT) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(model, ids_BT, *rest, **options)

    monkeypatch.setattr(scorer_module, "scored", scarce)
    lm.scorer.budget.tokens = 10**6
    found = lm.loglikelihood(requests)
    assert [ll for ll, _ in found] == pytest.approx([ll for ll, _ in expected], abs=1e-4)
    assert sizes[0] > 1
    assert lm.scorer.budget.rows == 1


def test_too_little_memory_for_one_sequence_is_said_before_it_is_tried(data_dir: Path) -> None:
    lm = PrefixLM(make_model("llama", SIZES), tiny.make_tokenizer())
    lm.budget.bytes = 1000
    with pytest.raises(PlanError, match="too little memory for a single sequence"):
        lm.loglikelihood(instances("winogrande", data_dir))


def test_nan_names_its_document(data_dir: Path) -> None:
    model = make_model("llama", SIZES)
    lm = PrefixLM(model, tiny.make_tokenizer())
    with torch.no_grad():
        model.lm_head.weight[:, 0] = math.nan
    with pytest.raises(NumericsError, match=r"document \d of winogrande: the model computes NaN"):
        lm.loglikelihood(instances("winogrande", data_dir))


def test_an_answer_longer_than_the_model_sees_is_refused(data_dir: Path) -> None:
    lm = PrefixLM(make_model("llama", SIZES), tiny.make_tokenizer(), max_length=10)
    with pytest.raises(SourceError, match=r"document \d of winogrande: its answer alone has 14 tokens"):
        lm.loglikelihood(instances("winogrande", data_dir))


def test_an_answer_that_is_no_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = PrefixLM(make_model("llama", SIZES), tiny.make_tokenizer())
    monkeypatch.setattr(lm, "_encode", lambda texts: [[5] * len(text.rstrip()) for text in texts])
    request = Instance("loglikelihood", {}, ("Why?", " "), 0, ("t", 7, 1))
    with pytest.raises(SourceError, match="document 7 of t: the tokenizer makes no token of its answer ' '"):
        lm.loglikelihood([request])


def test_a_tokenizer_of_a_larger_model_is_refused(data_dir: Path) -> None:
    lm = PrefixLM(make_model("llama", SIZES | {"vocab_size": 40}), tiny.make_tokenizer())
    with pytest.raises(SourceError, match="but the model has 40 embeddings"):
        lm.loglikelihood(instances("winogrande", data_dir))
    settings = {"until": ["~"], "max_gen_toks": 5}
    with pytest.raises(SourceError, match="but the model has 40 embeddings"):
        lm.generate_until([Instance("generate_until", {}, ("zZ~", settings), 0, ("t", 0, 1))])


def test_a_head_of_its_own_runs_where_something_is_scored_only(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("cohere", SIZES)
    lm = PrefixLM(model, tiny.make_tokenizer())
    assert not lm.sharing.plain_head
    sizes = []
    head = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: sizes.append(hidden.shape[1]) or head(hidden))
    lm.loglikelihood(instances("mmlu", data_dir))
    assert min(sizes) == 1  # of the stretch before all documents, in which nothing is scored
    assert max(sizes) == 6  # in each of three documents the places before the space and before the letter


def test_answers_are_kept_by_what_ends_a_text(tmp_path: Path) -> None:
    model, tokenizer = make_model("llama", SIZES), tiny.make_tokenizer()
    digests = {PrefixLM(model, tokenizer, folder=tmp_path).digest}
    model.generation_config.eos_token_id = [1, 7]
    digests.add(PrefixLM(model, tokenizer, folder=tmp_path).digest)
    tokenizer.eos_token = "x"
    digests.add(PrefixLM(model, tokenizer, folder=tmp_path).digest)
    assert len(digests) == 3


def test_equal_requests_are_read_once() -> None:
    lm = PrefixLM(make_model("llama", SIZES), tiny.make_tokenizer())
    found: dict[int, float] = {}
    queries = [Query((5, 6, 7), (8,)), Query((5, 6, 7), (9,)), Query((5, 6, 7), (8,))]
    lm.scorer.tokens_read = 0
    lm.scorer.score(queries, lambda number, answer: found.update({number: answer.loglikelihood}))
    assert found[0] == found[2] != found[1]
    assert lm.scorer.tokens_read == 3
